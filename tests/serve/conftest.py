"""A running `vidgen serve`, shared by the tests of a module: the real process, with a folder of its own."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

START_DEADLINE_S = 90.0
STOP_DEADLINE_S = 30.0
VIDEO_DEADLINE_S = 60.0
ADDRESS = re.compile(r"vidgen: serving on (http://\S+:(\d+))")
RUN = """
import json, sys
from pathlib import Path
from vidgen.serve.app import serve
from vidgen.serve.config import load_server_config
sys.exit(serve(load_server_config(None, json.loads(sys.argv[1]))))
"""


@dataclass(kw_only=True)
class RunningServer:
    """A server process that has said where it is."""

    process: "subprocess.Popen[bytes]"
    url: str
    port: int
    data: Path
    log_path: Path

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def log(self) -> str:
        """What it has written so far, both streams."""
        return self.log_path.read_text(errors="replace")

    def client(self, key: str | None = None) -> httpx.Client:
        """To be used in a `with`; every request has a deadline."""
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        return httpx.Client(base_url=self.url, timeout=30, headers=headers, trust_env=False)

    def wait(self, video_id: str, *, until: Callable[[dict[str, Any]], bool] | None = None) -> dict[str, Any]:
        """The video's JSON once `until` holds for it, by default once it has ended."""
        deadline = time.monotonic() + VIDEO_DEADLINE_S
        until = until or (lambda video: video["status"] in ("completed", "failed"))
        with self.client() as client:
            while True:
                answer = client.get(f"/v1/videos/{video_id}")
                assert answer.status_code == 200, answer.text
                if until(answer.json()):
                    return answer.json()
                assert time.monotonic() < deadline, f"{answer.json()}\n{self.log}"
                time.sleep(0.05)

    def stop(self) -> int:
        """Ask it to end; its exit code. Killed when it does not within the deadline, which fails a test."""
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(STOP_DEADLINE_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise AssertionError(f"the server did not end in {STOP_DEADLINE_S} s\n{self.log}") from None


@contextmanager
def running(
    data: Path, *, ready: bool = True, key: str | None = None, **config: Any
) -> Iterator[RunningServer]:
    """A server with this data folder and these settings, ended on the way out. `ready`: once workers are.

    Settings are those of ServerConfig; the port is a free one. `key` is for asking whether it is ready.
    """
    data.mkdir(parents=True, exist_ok=True)
    log_path = data.parent / f"{data.name}-{time.monotonic_ns()}.log"
    # sessions as fast as they can be made, where a test does not say how fast
    timings = {"session_lead_s": 3600, **config.pop("timings", {})}
    settings = json.dumps({"port": 0, "data": str(data), "timings": timings, **config})
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "default"}
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", RUN, settings], stdout=log, stderr=subprocess.STDOUT, env=environment
        )
    try:
        yield _started(process, data, log_path, ready, key)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(STOP_DEADLINE_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _started(
    process: "subprocess.Popen[bytes]", data: Path, log_path: Path, ready: bool, key: str | None
) -> RunningServer:
    deadline = time.monotonic() + START_DEADLINE_S
    found = None
    while found is None:
        text = log_path.read_text(errors="replace")
        assert process.poll() is None, f"ended with {process.returncode}\n{text}"
        assert time.monotonic() < deadline, f"said no address in {START_DEADLINE_S} s\n{text}"
        found = ADDRESS.search(text)
        time.sleep(0.02)
    server = RunningServer(process=process, url=found[1], port=int(found[2]), data=data, log_path=log_path)
    with server.client(key) as client:
        while ready and client.get("/ready").status_code != 200:
            assert process.poll() is None, f"ended with {process.returncode}\n{server.log}"
            assert time.monotonic() < deadline, f"not ready in {START_DEADLINE_S} s\n{server.log}"
            time.sleep(0.05)
    return server


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A server without keys on loopback, one replica of the built-in model, ready."""
    with running(tmp_path_factory.mktemp("serve") / "data") as found:
        yield found


@pytest.fixture(scope="session")
def start_server() -> Callable[..., Any]:
    """`running`, for tests that need settings or restarts of their own."""
    return running
