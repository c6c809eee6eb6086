"""The client against a running server: what it brings is what the server has, also through cuts."""

import asyncio
import hashlib
import io
import itertools
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import av
import httpx
import pytest

from vidgen.serve.client import AsyncClient, Client, ServerError, Unreachable, Video, VideoFailed
from vidgen.serve.client import asynchronous as client_async

PROMPT = "a red circle moving right over a gray background"
OTHER = "a blue square moving up over a white background"
SHORT: dict[str, Any] = {"num_frames": 33, "num_inference_steps": 2, "seed": 5}
LONG: dict[str, Any] = {"num_frames": 4001, "num_inference_steps": 8, "seed": 5}
# eight blocks, each a moment long
BLOCKS: dict[str, Any] = {"num_frames": 129, "num_inference_steps": 2, "seed": 5}
WITHIN_S = 60.0


class Proxy:
    """A TCP connection to the server that can be cut, stalled or refused. `heard`: what clients sent."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.heard = bytearray()
        self.is_down = False
        self.cuts: list[int] = []  # bytes that the next connections may bring before they are cut
        self.stall_after: int | None = None
        self._open: set[socket.socket] = set()
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def cut_all(self) -> None:
        shut(*self._open)

    def close(self) -> None:
        shut(self._listener)
        self.cut_all()
        for thread in self._threads:
            thread.join(10)
            assert not thread.is_alive()
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                if self.is_down:
                    near.close()
                    continue
                thread = threading.Thread(target=self._carry, args=(near,), daemon=True)
                self._threads.append(thread)
                thread.start()

    def _carry(self, near: socket.socket) -> None:
        cut = self.cuts.pop(0) if self.cuts else None
        with near, socket.create_connection(("127.0.0.1", self._port)) as far:
            self._open |= {near, far}
            up = threading.Thread(target=self._up, args=(near, far), daemon=True)
            up.start()
            if not self._down(far, near, cut):  # else nothing more comes, and no end either
                shut(near, far)
            up.join()
            self._open -= {near, far}

    def _up(self, near: socket.socket, far: socket.socket) -> None:
        with suppress(OSError):
            while data := near.recv(65536):
                self.heard += data
                far.sendall(data)
        shut(near, far)

    def _down(self, far: socket.socket, near: socket.socket, cut: int | None) -> bool:
        """Carry what comes; whether it is to stall now."""
        left = cut if cut is not None else self.stall_after
        with suppress(OSError):
            while left != 0 and (data := far.recv(65536 if left is None else min(left, 65536))):
                near.sendall(data)
                left = None if left is None else left - len(data)
        return cut is None and left == 0


def shut(*sockets: socket.socket) -> None:
    for one in sockets:
        with suppress(OSError):
            one.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def proxy(server: Any) -> Iterator[Proxy]:
    found = Proxy(server.port)
    yield found
    found.close()


@pytest.fixture
def client(server: Any) -> Iterator[Client]:
    with Client(server.url) as found:
        yield found


@pytest.fixture(scope="module")
def video(server: Any) -> Video:
    """A completed one of eight blocks, for tests that only read."""
    with Client(server.url) as client:
        return client.wait(client.create(PROMPT, **BLOCKS).id, timeout_s=WITHIN_S)


def content(server: Any, video_id: str, variant: str = "video") -> bytes:
    with httpx.Client(base_url=server.url, trust_env=False, timeout=30) as http:
        response = http.get(f"/v1/videos/{video_id}/content", params={"variant": variant})
        assert response.status_code == 200, response.text
        return response.content


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def num_frames(data: bytes) -> int:
    with av.open(io.BytesIO(data), "r") as container:
        return sum(1 for _ in container.decode(video=0))


def at_most(seconds: float, is_true: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < deadline_s
        time.sleep(0.02)


def test_what_is_submitted_waited_for_and_downloaded_is_the_servers_content(
    server: Any, client: Client, tmp_path: Path
):
    seen: list[int] = []
    made = client.create(PROMPT, **SHORT)
    done = client.wait(made.id, timeout_s=WITHIN_S, report=lambda video: seen.append(video.progress))
    assert done.status == "completed" and done.facts["seed"] == 5 and done.prompt == PROMPT
    assert seen == sorted(seen) and seen[-1] == 100
    path = client.download(made.id, tmp_path / "a.mp4")
    assert sha(path.read_bytes()) == sha(content(server, made.id))
    assert num_frames(path.read_bytes()) == SHORT["num_frames"]


@pytest.mark.parametrize("variant", ["thumbnail", "spritesheet"])
def test_a_variant_is_the_servers(server: Any, client: Client, video: Video, tmp_path: Path, variant: Any):
    path = client.download(video.id, tmp_path / "picture", variant=variant)
    assert path.read_bytes() == content(server, video.id, variant)


def test_waiting_for_a_job_that_is_cancelled_ends_with_its_error(client: Client):
    made = client.create(PROMPT, **LONG)
    threading.Timer(0.5, client.cancel, [made.id]).start()
    with pytest.raises(VideoFailed) as caught:
        client.wait(made.id, timeout_s=WITHIN_S)
    assert caught.value.code == "cancelled" and caught.value.video.id == made.id
    assert made.id in str(caught.value)
    with pytest.raises(VideoFailed, match=made.id):
        list(client.watch(made.id))


def test_waiting_has_a_deadline(client: Client):
    made = client.create(PROMPT, **LONG)
    begin_s = time.monotonic()
    with pytest.raises(TimeoutError, match=made.id):
        client.wait(made.id, timeout_s=0.5)
    assert time.monotonic() - begin_s < 5
    client.delete(made.id)
    with pytest.raises(ServerError) as caught:
        client.get(made.id)
    assert caught.value.status == 404


def test_a_cancelled_job_is_resumed_and_completed(client: Client):
    made = client.create(PROMPT, **BLOCKS)
    next(iter(client.watch(made.id)))
    cancelled = client.cancel(made.id)
    if cancelled.status == "failed":  # else it was quicker
        assert client.resume(made.id).status in ("queued", "in_progress")
    assert client.wait(made.id, timeout_s=WITHIN_S).status == "completed"


def test_listing_yields_every_video_once_over_all_pages(
    client: Client, video: Video, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
):
    made = [client.create(PROMPT, **SHORT).id for _ in range(3)]
    monkeypatch.setattr(client_async, "PAGE", 2)
    with Client(proxy.url) as through:
        newest_first = [one.id for one in through.list()]
        assert proxy.heard.count(b"GET /v1/videos?") == -(-len(newest_first) // 2)
        assert [one.id for one in through.list(order="asc")] == newest_first[::-1]
        assert [one.id for one in through.list(limit=3)] == newest_first[:3] == made[::-1]
    assert len(set(newest_first)) == len(newest_first) and video.id in newest_first
    for one in made:
        client.wait(one, timeout_s=WITHIN_S)


def test_a_download_that_is_cut_goes_on_by_range(server: Any, proxy: Proxy, video: Video, tmp_path: Path):
    whole = content(server, video.id)
    assert len(whole) > 20_000
    proxy.cuts = [8_000, 5_000]
    with Client(proxy.url) as client:
        path = client.download(video.id, tmp_path / "a.mp4")
    assert path.read_bytes() == whole
    ranges = [line for line in bytes(proxy.heard).lower().split(b"\r\n") if line.startswith(b"range:")]
    assert len(ranges) == 2
    starts = [int(line.partition(b"=")[2].rstrip(b"-")) for line in ranges]
    assert 0 < starts[0] < 8_000 < starts[1] < 13_000


def test_an_interrupted_download_leaves_nothing(proxy: Proxy, video: Video, tmp_path: Path):
    (tmp_path / "a.mp4").write_bytes(b"of before")
    proxy.stall_after = 6_000
    with Client(proxy.url) as client:
        interrupt = threading.Thread(target=interrupt_once_there, args=(tmp_path,))
        interrupt.start()
        with pytest.raises(KeyboardInterrupt):
            client.download(video.id, tmp_path / "a.mp4")
        interrupt.join()
        assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]
    assert (tmp_path / "a.mp4").read_bytes() == b"of before"


def interrupt_once_there(folder: Path) -> None:
    """SIGINT to this process when a temporary file holds something."""
    with suppress(AssertionError):
        at_most(10, lambda: any(p.suffix == ".part" for p in folder.iterdir()))
    time.sleep(0.2)
    os.kill(os.getpid(), signal.SIGINT)


def test_watching_yields_all_chunks_in_order_while_they_are_made(client: Client):
    made = client.create(PROMPT, **BLOCKS)
    chunks, status = [], ""
    for chunk in client.watch(made.id):
        chunks.append(chunk)
        status = status or client.get(made.id).status
    assert status == "in_progress"
    assert [chunk.seq for chunk in chunks] == list(range(len(chunks))) and len(chunks) >= 8
    first = [chunk.first_frame for chunk in chunks]
    assert first == [0, *itertools.accumulate(chunk.num_frames for chunk in chunks)][:-1]
    assert all(chunk.is_keyframe and chunk.pts_s == chunk.first_frame / 16 for chunk in chunks)
    assert num_frames(chunks[0].start.init + b"".join(chunk.data for chunk in chunks)) == BLOCKS["num_frames"]
    assert 'codecs="avc1.' in chunks[0].start.mime


def test_watching_survives_cut_sockets(client: Client, proxy: Proxy, video: Video):
    whole = {chunk.seq: chunk.data for chunk in client.watch(video.id)}
    made = client.create(PROMPT, **BLOCKS)
    with Client(proxy.url) as through:
        chunks = []
        for chunk in through.watch(made.id):
            chunks.append(chunk)
            if chunk.seq in (0, 1, 4):
                proxy.cut_all()
    assert proxy.heard.count(b"GET /v1/realtime/video") >= 3
    assert [chunk.seq for chunk in chunks] == sorted(whole)
    # the same seed and settings: the same bytes
    assert {chunk.seq: sha(chunk.data) for chunk in chunks} == {seq: sha(data) for seq, data in whole.items()}


def test_events_are_numbered_and_none_is_told_twice_after_a_cut(client: Client, proxy: Proxy):
    made = client.create(PROMPT, **BLOCKS)
    told = []
    with Client(proxy.url) as through:
        for event in through.events(made.id):
            told.append(event)
            if event.name == "chunk" and event.data["index"] in (0, 3):
                proxy.cut_all()
    numbers = [event.number for event in told if event.name != "progress"]
    assert numbers == sorted(set(numbers))
    chunks = [event.data["index"] for event in told if event.name == "chunk"]
    assert chunks == list(range(len(chunks))) and len(chunks) >= 8
    assert told[-1].name == "status" and told[-1].data["status"] == "completed"
    assert list(client.events(made.id, after=told[-1].number)) == []


def test_a_sessions_new_prompt_is_applied_at_the_frame_that_is_told(client: Client):
    with client.session(PROMPT, num_frames=1601, seed=3) as session:
        chunks = session.chunks()
        begun = [next(chunks)]
        frame = session.change_prompt(OTHER)
        assert frame >= begun[0].num_frames
        while begun[-1].first_frame < frame:
            begun.append(next(chunks))
        assert begun[-1].first_frame == frame, "no chunk begins with the new prompt"
        session.stop()
        begun += chunks
        made = session.id
    assert made is not None and made.startswith("session_")
    assert [chunk.seq for chunk in begun] == list(range(len(begun)))
    done = client.wait(made, timeout_s=WITHIN_S)
    assert done.facts["kind"] == "session" and done.facts["frames_done"] < 1601


def test_a_new_prompt_survives_a_cut(proxy: Proxy):
    with Client(proxy.url) as through, through.session(PROMPT, num_frames=1601, seed=3) as session:
        first = next(session.chunks())
        proxy.cut_all()
        assert session.change_prompt(OTHER) >= first.num_frames
    assert proxy.heard.count(b"GET /v1/realtime/video") >= 2


def test_one_thread_reads_while_another_prompts(client: Client):
    with client.session(PROMPT, num_frames=1601, seed=3) as session:
        seen: list[int] = []
        reader = threading.Thread(target=lambda: seen.extend(c.seq for c in session.chunks()))
        reader.start()
        at_most(WITHIN_S, lambda: bool(seen))
        frames = [session.change_prompt(prompt) for prompt in (OTHER, PROMPT, OTHER)]
        session.stop()
        reader.join(WITHIN_S)
    assert frames == sorted(frames) and frames[0] > 0
    assert not reader.is_alive() and seen == list(range(len(seen)))


def test_a_server_that_is_away_for_a_moment_is_waited_for(client: Client, proxy: Proxy):
    made = client.create(PROMPT, **BLOCKS)
    with Client(proxy.url) as through:
        through.get(made.id)
        proxy.is_down = True
        proxy.cut_all()
        threading.Timer(1.0, lambda: setattr(proxy, "is_down", False)).start()
        assert through.wait(made.id, timeout_s=WITHIN_S).status == "completed"
    proxy.is_down = True
    with Client(proxy.url, patience_s=0.5) as through, pytest.raises(Unreachable):
        through.get(made.id)


def test_the_async_client_does_several_things_at_once(server: Any):
    async def all_of_it() -> list[int]:
        async with AsyncClient(server.url) as client:
            made = [await client.create(PROMPT, **SHORT) for _ in range(3)]

            async def frames(video: Video) -> int:
                return sum([chunk.num_frames async for chunk in client.watch(video.id)])

            counts = await asyncio.gather(*map(frames, made))
            assert {one.id async for one in client.list(limit=3)} == {video.id for video in made}
            return counts

    assert asyncio.run(asyncio.wait_for(all_of_it(), WITHIN_S)) == [SHORT["num_frames"]] * 3


def test_an_image_and_segments_are_sent(client: Client, tmp_path: Path):
    segments = [{"prompt": PROMPT, "num_frames": 16}, {"prompt": OTHER, "num_frames": 17}]
    made = client.create(segments=segments, num_inference_steps=2, seed=1)
    assert client.wait(made.id, timeout_s=WITHIN_S).facts["num_frames"] == 33
    (tmp_path / "no.png").write_bytes(b"this is no picture")
    with pytest.raises(ServerError) as caught:
        client.create(PROMPT, image=tmp_path / "no.png", **SHORT)
    assert 400 <= caught.value.status < 500 and caught.value.message


def test_errors_have_status_code_and_one_line(client: Client):
    calls = [
        (404, lambda: client.get("video_" + "0" * 32)),
        (404, lambda: client.cancel("video_" + "0" * 32)),
        (404, lambda: list(client.watch("video_" + "0" * 32))),
        (404, lambda: list(client.events("video_" + "0" * 32))),
        (422, lambda: client.create(PROMPT, no_such_field=1)),
        (422, lambda: client.create(PROMPT, num_frames=-1)),
    ]
    for status, call in calls:
        with pytest.raises(ServerError) as caught:
            call()
        assert caught.value.status == status and caught.value.code and caught.value.message
        assert "\n" not in str(caught.value)
    with pytest.raises(ServerError) as caught, client.session(PROMPT, num_frames=-1):
        pass
    assert "num_frames" in caught.value.message


def answers(port: int) -> bool:
    with suppress(OSError), socket.create_connection(("127.0.0.1", port)):
        return True
    return False


def test_a_server_of_another_kind_is_named_as_such():
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    listener.close()
    with Client(f"http://127.0.0.1:{port}") as client, pytest.raises(Unreachable, match="vidgen serve"):
        client.get("video_1")
    command = [sys.executable, "-m", "http.server", "--bind", "127.0.0.1", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        with Client(f"http://127.0.0.1:{port}") as client:
            at_most(10, lambda: answers(port))
            for call in (lambda: client.get("video_1"), lambda: list(client.watch("video_1"))):
                with pytest.raises(ServerError) as caught:
                    call()
                assert caught.value.code == "http_404"
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize(
    "server", ["", "localhost:8711", "ftp://a", "http://", "http://a:b@c", "http://a?x=1", "http://a:99999"]
)
def test_a_bad_address_is_refused_in_one_line(server: str):
    with pytest.raises(ValueError, match="need an address like"):
        Client(server)


@pytest.mark.parametrize("video_id", ["", ".", "..", "a/b", "video_1?x", "é", "a" * 200])
def test_what_is_no_id_is_never_asked_for(video_id: str):
    with Client("http://127.0.0.1:1") as client, pytest.raises(ValueError, match="need one as the server"):
        client.get(video_id)


def test_a_key_that_cannot_be_one_is_not_shown():
    for key in ("", "sec ret", "secrét", "secret\n"):
        with pytest.raises(ValueError, match="api_key") as caught:
            Client(api_key=key)
        assert "sec" not in str(caught.value)


def test_the_client_needs_no_engine():
    heavy = ["torch", "numpy", "fastapi", "starlette", "pydantic", "ray", "av", "typer", "yaml"]
    code = f"import sys, vidgen.serve.client; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
