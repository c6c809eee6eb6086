"""`vidgen serve` and the commands that ask it, end to end: the command line starts a server with a key."""

import hashlib
import io
import json
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import httpx
import pytest
import yaml

from vidgen.cli import main

Run = Callable[..., Any]
PROMPT = "a red circle moving right over a gray background"
SHORT = ("--num-frames", 33, "--num-inference-steps", 2, "--seed", 5)
LONG = ("--num-frames", 4001, "--num-inference-steps", 8)
NOBODY = "video_" + "0" * 32
WITHIN_S = 90.0


@dataclass(frozen=True, kw_only=True)
class Served:
    url: str
    key_file: Path

    @property
    def flags(self) -> tuple[object, ...]:
        return ("--server", self.url, "--api-key-file", self.key_file)

    def get(self, path: str) -> httpx.Response:
        key = self.key_file.read_text().strip()
        headers = {"Authorization": f"Bearer {key}"}
        return httpx.get(self.url + path, headers=headers, trust_env=False, timeout=30)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server whose key was made by --new-key, ready."""
    folder = tmp_path_factory.mktemp("served")
    made = subprocess.run(command("serve", "--new-key", "anna"), capture_output=True, text=True, check=True)
    key, _, lines = made.stdout.partition("\n")
    assert key not in lines and key not in made.stderr
    (folder / "key").write_text(key)
    (folder / "serve.yaml").write_text(lines + f"data: {folder / 'data'}\n")
    argv = command("serve", "--config", folder / "serve.yaml", "--port", 0, "--json")
    log = (folder / "log").open("wb")
    with log, subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=log, text=True) as process:
        try:
            served = Served(url=json.loads(first_line(process))["url"], key_file=folder / "key")
            deadline_s = time.monotonic() + WITHIN_S
            while served.get("/ready").status_code != 200:
                assert time.monotonic() < deadline_s and process.poll() is None
                time.sleep(0.1)
            yield served
        finally:
            process.send_signal(signal.SIGINT)
            threading.Timer(30, process.kill).start()
        assert process.wait(60) == 0, (folder / "log").read_text()


def command(*argv: object) -> list[str]:
    return [sys.executable, "-m", "vidgen", *map(str, argv)]


def first_line(process: "subprocess.Popen[str]") -> str:
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()
    assert process.stdout is not None
    threading.Thread(target=lambda: lines.put(process.stdout.readline()), daemon=True).start()  # type: ignore
    return lines.get(timeout=WITHIN_S)


@pytest.fixture(scope="module")
def completed(served: Served) -> str:
    """The id of a short video."""
    argv = command("submit", PROMPT, *SHORT, "--wait", "--json", *served.flags)
    done = subprocess.run(argv, capture_output=True, text=True, timeout=WITHIN_S)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[0])["id"]


def num_frames(data: bytes) -> int:
    with av.open(io.BytesIO(data), "r") as container:
        return sum(1 for _ in container.decode(video=0))


def test_submit_with_an_output_brings_the_servers_video(run: Run, served: Served):
    ran = run("submit", PROMPT, *SHORT, "--output", "a.mp4", "--json", *served.flags)
    assert ran.code == 0, ran.err
    events = [json.loads(line) for line in ran.out.splitlines()]
    assert [event["event"] for event in events] == ["submitted", "completed", "downloaded"]
    content = served.get(f"/v1/videos/{events[0]['id']}/content").content
    assert hashlib.sha256(Path("a.mp4").read_bytes()).digest() == hashlib.sha256(content).digest()
    assert num_frames(content) == 33 and events[1]["seed"] == 5


def test_submit_prints_the_id_that_the_other_commands_take(run: Run, served: Served):
    ran = run("submit", PROMPT, *LONG, *served.flags)
    (made,) = ran.out.split()
    shown = run("status", made, "--json", *served.flags)
    assert shown.code == 0 and json.loads(shown.out)["status"] in ("queued", "in_progress")
    assert run("ls", "--limit", 1, *served.flags).out.startswith(made)
    ended = run("cancel", made, *served.flags)
    assert ended.code == 0 and "failed" in ended.out
    assert "cancelled" in run("status", made, *served.flags).out


def test_watching_a_video_that_fails_ends_with_3(run: Run, served: Served):
    made = run("submit", PROMPT, *LONG, *served.flags).out.strip()
    timer = threading.Timer(2.0, lambda: main(["cancel", made, "--json", *map(str, served.flags)]))
    timer.start()
    ran = run("watch", made, *served.flags)
    timer.join()
    assert ran.code == 3 and "cancelled" in ran.err.splitlines()[-1] and made in ran.err
    again = run("watch", made, "--output", "a.mp4", *served.flags)
    assert again.code == 3


def test_watching_writes_the_chunks_as_a_file_that_plays(run: Run, served: Served):
    made = run("submit", PROMPT, *SHORT, *served.flags).out.strip()
    ran = run("watch", made, "--output", "live.mp4", "--json", *served.flags)
    assert ran.code == 0, ran.err
    chunks = [json.loads(line) for line in ran.out.splitlines()]
    assert [chunk["seq"] for chunk in chunks if chunk["event"] == "chunk"] == list(range(len(chunks)))
    assert num_frames(Path("live.mp4").read_bytes()) == 33
    argv = command("watch", made, "--output", "-", *served.flags)
    piped = subprocess.run(argv, capture_output=True, timeout=WITHIN_S)
    assert piped.returncode == 0 and piped.stdout == Path("live.mp4").read_bytes()


def test_watching_tells_events_until_the_video_is_over(run: Run, served: Served, completed: str):
    ran = run("watch", completed, "--json", *served.flags)
    events = [json.loads(line) for line in ran.out.splitlines()]
    assert ran.code == 0 and events[-1]["event"] == "status" and events[-1]["status"] == "completed"
    assert sum(event["num_frames"] for event in events if event["event"] == "chunk") == 33


def test_ls_lists_what_the_server_has(run: Run, served: Served, completed: str):
    videos = json.loads(run("ls", "--json", *served.flags).out)
    assert completed in [video["id"] for video in videos]
    assert len(json.loads(run("ls", "--limit", 1, "--json", *served.flags).out)) == 1
    text = run("ls", *served.flags).out
    assert len(text.splitlines()) == len(videos) and PROMPT in text


@pytest.mark.parametrize(("variant", "name"), [("video", "{}.mp4"), ("thumbnail", "{}-thumbnail.")])
def test_download_names_the_file_by_the_video(
    run: Run, served: Served, completed: str, variant: str, name: str
):
    ran = run("download", completed, "--variant", variant, "--json", *served.flags)
    facts = json.loads(ran.out)
    assert ran.code == 0 and facts["path"].startswith(name.format(completed))
    content = served.get(f"/v1/videos/{completed}/content?variant={variant}").content
    assert Path(facts["path"]).read_bytes() == content and facts["bytes"] == len(content)
    again = run("download", completed, "--variant", variant, *served.flags)
    assert again.code == 2 and "exists" in again.err
    assert run("download", completed, "--variant", variant, "--overwrite", *served.flags).code == 0


def test_an_interrupted_watch_leaves_the_server_at_work(served: Served, tmp_path: Path):
    argv = command("submit", PROMPT, *LONG, "--wait", "--json", *served.flags)
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    with process:
        made = json.loads(first_line(process))["id"]
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
    assert process.returncode == 130 and f"vidgen watch {made}" in err and "Traceback" not in err
    assert served.get(f"/v1/videos/{made}").json()["status"] in ("queued", "in_progress")
    assert main(["cancel", made, *map(str, served.flags)]) == 0
    assert list(tmp_path.iterdir()) == []


def test_no_server_is_one_line(refused: Callable[..., str]):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    for argv in (
        ("submit", PROMPT),
        ("status", NOBODY),
        ("watch", NOBODY),
        ("watch", NOBODY, "--output", "a.mp4"),
        ("cancel", NOBODY),
        ("ls",),
        ("download", NOBODY),
    ):
        line = refused(*argv, "--server", url)
        assert url in line and "vidgen serve" in line


def test_an_unknown_id_is_one_line(refused: Callable[..., str], served: Served):
    for argv in (
        ("status", NOBODY),
        ("watch", NOBODY),
        ("watch", NOBODY, "--output", "a.mp4"),
        ("cancel", NOBODY),
        ("download", NOBODY),
        ("download", NOBODY, "--output", "a.mp4"),
    ):
        assert NOBODY in refused(*argv, *served.flags)
    for text in ("../../etc/passwd", "a b", "."):
        assert "id" in refused("download", text, *served.flags)


def test_a_bad_key_is_one_line_that_does_not_show_it(
    refused: Callable[..., str], served: Served, tmp_path: Path
):
    server = ("--server", served.url)
    assert "--api-key-file" in refused("ls", *server)
    (tmp_path / "wrong").write_text("vidgen_wrong\n")
    for argv in (("ls",), ("watch", NOBODY), ("watch", NOBODY, "--output", "a.mp4")):
        line = refused(*argv, *server, "--api-key-file", tmp_path / "wrong")
        assert "key" in line and "vidgen_wrong" not in line
    (tmp_path / "two").write_text("one two")
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    (tmp_path / "empty").write_text("\n")
    for name in ("two", "binary", "empty", "absent"):
        assert name in refused("ls", *server, "--api-key-file", tmp_path / name)


@pytest.mark.parametrize("url", ["localhost:8711", "ftp://localhost", "http://", "http://a:b@localhost", ""])
def test_a_bad_address_is_one_line(refused: Callable[..., str], url: str):
    assert "http://127.0.0.1:8711" in refused("ls", "--server", url)


def test_what_the_server_refuses_is_one_line(refused: Callable[..., str], served: Served):
    assert "num_frames" in refused("submit", PROMPT, "--num-frames", "-3", *served.flags)
    assert "no_such_field" in refused("submit", PROMPT, "--set", "no_such_field=1", *served.flags)
    assert "KEY=VALUE" in refused("submit", PROMPT, "--set", "fps", *served.flags)
    assert "prompt" in refused("submit", *served.flags)
    assert "nowhere" in refused("submit", PROMPT, "--output", "nowhere/a.mp4", *served.flags)
    assert "--json" in refused("watch", NOBODY, "--output", "-", "--json", *served.flags)


def test_serve_refuses_bad_settings_in_one_line(refused: Callable[..., str], served: Served, tmp_path: Path):
    assert "keys" in refused("serve", "--host", "0.0.0.0")
    assert "replicas" in refused("serve", "--replicas", 0)
    (tmp_path / "bad.yaml").write_text("replicass: 1\n")
    assert "replicas" in refused("serve", "--config", tmp_path / "bad.yaml")
    assert "--config" in refused("serve", "--config", tmp_path / "bad.yaml", "--model", "builtin")
    assert "b b" in refused("serve", "--new-key", "b b")


def test_a_new_key_is_long_and_new_and_its_hash_is_the_servers(run: Run):
    made = [json.loads(run("serve", "--new-key", "anna", "--json").out) for _ in range(2)]
    assert made[0]["key"] != made[1]["key"] and len(made[0]["key"]) >= 40
    assert made[0]["sha256"] == hashlib.sha256(made[0]["key"].encode()).hexdigest()
    key, _, lines = run("serve", "--new-key", "anna").out.partition("\n")
    (entry,) = yaml.safe_load(lines)["keys"]
    assert entry == {"name": "anna", "sha256": hashlib.sha256(key.encode()).hexdigest()}


def test_the_config_in_the_repository_can_be_served():
    from vidgen.serve.config import load_server_config

    path = Path(__file__).resolve().parents[2] / "configs" / "serve.yaml"
    found = load_server_config(path, {"port": 0})
    assert found.replicas == 2 and found.is_loopback
    assert found.models["builtin"].job["parallel"]["ranks"] > 1


def test_help_of_these_commands_does_not_wait_for_the_engine():
    code = (
        "import sys; from vidgen.cli import main\n"
        "for name in ('serve', 'submit', 'status', 'watch', 'cancel', 'ls', 'download'):\n"
        "    assert main([name, '--help']) == 0\n"
        "print([name for name in ('torch', 'fastapi', 'httpx', 'yaml') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("[]\n")
