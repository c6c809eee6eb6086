"""The driver killed or stopped from outside: no process of it goes on, its job goes on to the same bytes.

Everything here is the command line in processes of its own, as a terminal starts it.
"""

import json
import os
import queue
import random
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from vidgen.config import parse_job
from vidgen.render import render, resume

JOB: dict[str, Any] = {  # 16 blocks, 19 ticks
    "prompt": "a blue square moving up over a white background",
    "num_frames": 125,
    "num_inference_steps": 4,
    "state_every": 2,
    "queue": {"block_frames": 2, "context_frames": 1, "context_mode": "cache", "anchor_frames": 1},
    "parallel": {
        "queue_blocks": 1
    },  # a block per poll: ranks that run ahead could end before they are struck
    "output": {"sheet": False},
}
MARK = "VIDGEN_TEST_RUN"
PATIENCE_S = 120.0  # with what a busy machine takes to start ranks
GONE_WITHIN_S = 30.0  # on a busy machine; else about 1, and Ray's agents would stay for 61
ABORTED_WITHIN_S = 10.0


class Run:
    """`vidgen ... --json` in a session of its own: its events, and every process that it has started."""

    def __init__(self, folder: Path, *argv: object) -> None:
        self.job = folder / "v.job"
        self.events: list[dict[str, Any]] = []
        self._id = uuid.uuid4().hex
        self._errors = folder / f"{self._id}.err"
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        # every process inherits the mark; SPT_NOENV: or Ray's names for its processes overwrite it
        environment = os.environ | {MARK: self._id, "SPT_NOENV": "1"}
        with self._errors.open("w") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "vidgen", *map(str, argv), "--json"],
                cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True,
                start_new_session=True,
            )  # fmt: skip
        threading.Thread(target=self._read, daemon=True).start()

    def until(self, name: str, ticks_done: int = 0) -> dict[str, Any]:
        """The next event of this name, after so many ticks. Every line of stdout has to be an event."""
        while (event := self._next()) is not None:
            if event["event"] == name and event.get("ticks_done", 0) >= ticks_done:
                return event
        raise AssertionError(f"ended without {name}: {self.events[-2:]}, {self.errors()}")

    def end(self) -> int:
        """The exit code, once it has ended by itself and nothing of it is left."""
        while self._next() is not None:
            pass
        code = self.process.wait(PATIENCE_S)
        deadline = time.monotonic() + GONE_WITHIN_S
        while left := self.processes():
            assert time.monotonic() < deadline, f"left running: {left}"
            time.sleep(0.1)
        return code

    def errors(self) -> str:
        return self._errors.read_text()

    def processes(self) -> dict[int, str]:
        """Names of all processes of this run by their ids, whoever is their parent now."""
        found = {}
        for folder in Path("/proc").iterdir():
            with suppress(OSError):  # ended meanwhile, or somebody else's
                if folder.name.isdigit() and self._is_mine(folder):
                    found[int(folder.name)] = (folder / "comm").read_text().strip()
        return found

    def ranks(self) -> dict[str, int]:
        """Process ids of the ranks and the decoder, by name."""
        return {place["name"]: place["pid"] for place in json.loads((self.job / "ranks.json").read_text())}

    def close(self) -> None:
        """End whatever a failed test has left."""
        for pid in self.processes():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait(PATIENCE_S)

    def _is_mine(self, folder: Path) -> bool:
        return f"{MARK}={self._id}".encode() in (folder / "environ").read_bytes().split(b"\0")

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as lines:
            for line in lines:
                self._lines.put(line)
        self._lines.put(None)

    def _next(self) -> dict[str, Any] | None:
        line = self._lines.get(timeout=PATIENCE_S)
        if line is None:
            self._lines.put(None)
            return None
        self.events.append(json.loads(line))
        return self.events[-1]


Vidgen = Callable[..., Run]


@pytest.fixture
def vidgen(tmp_path: Path) -> Iterator[Vidgen]:
    """Starts `vidgen COMMAND [argv]` on the job v.job in tmp_path."""
    (tmp_path / "job.yaml").write_text(json.dumps(JOB))  # JSON is YAML
    runs = []

    def start(command: str, *argv: object) -> Run:
        what = ["--config", "job.yaml", "-o", "v.mp4"] if command == "render" else ["v.job"]
        runs.append(Run(tmp_path, command, *what, *argv))
        return runs[-1]

    yield start
    for run in runs:
        run.close()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, jobs: Any) -> dict[str, bytes]:
    """What one process makes, undisturbed."""
    folder = tmp_path_factory.mktemp("whole")
    render(parse_job(JOB | {"output": {"path": folder / "v.mp4", "sheet": False}}))
    return jobs.files(folder / "v.job")


def test_a_driver_killed_again_and_again_leaves_no_process_and_the_job_ends_in_the_same_bytes(
    vidgen: Vidgen, whole: dict[str, bytes], jobs: Any
):
    ticks = sorted(random.Random(0).sample(range(1, 10), 2))
    for command, ranks, tick in zip(("render", "resume"), (2, 3), ticks, strict=True):
        run = vidgen(command, "--ranks", ranks)
        run.until("progress", tick)
        if ranks > 1:
            mine = run.processes()
            assert {"raylet", "gcs_server"} <= set(mine.values()), mine
            assert len(run.ranks()) == ranks + 1 and set(run.ranks().values()) <= set(mine), mine
        if ranks == 3:  # and while ranks are being replaced
            pid = run.ranks()["rank 1"]
            os.kill(pid, signal.SIGKILL)
            message = run.until("note")["message"]
            assert "rank 1" in message and str(pid) in message
        os.kill(run.process.pid, signal.SIGKILL)
        assert run.end() == -signal.SIGKILL
    run = vidgen("resume", "--ranks", 2)
    evidence = run.until("finished")["evidence"]
    assert [attempt["num_ranks"] for attempt in evidence["attempts"]] == [2]
    assert run.end() == 0
    assert (run.job.parent / "v.mp4").exists()
    assert jobs.files(run.job) == whole


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_a_signal_stops_ranks_after_the_tick_and_the_job_goes_on_to_the_same_bytes(
    number: signal.Signals, vidgen: Vidgen, whole: dict[str, bytes], jobs: Any
):
    run = vidgen("render", "--ranks", 2)
    run.until("progress", 2)
    if number == signal.SIGINT:
        os.killpg(run.process.pid, number)  # a terminal's Ctrl-C reaches Ray's processes, too
    else:
        os.kill(run.process.pid, number)
    assert run.end() == 130, run.errors()
    assert run.events[-1] == {"event": "interrupted", "folder": "v.job"}
    lines = run.errors().splitlines()
    assert len([line for line in lines if "vidgen resume v.job" in line]) == 1, lines
    assert not [line for line in lines if "Traceback" in line or "received at time" in line], lines
    assert not (run.job.parent / "v.mp4").exists()
    resume(run.job, parallel={"ranks": 1})
    assert jobs.files(run.job) == whole


def test_a_second_interrupt_ends_driver_and_ranks_at_once(vidgen: Vidgen, whole: dict[str, bytes], jobs: Any):
    run = vidgen("render", "--ranks", 2)
    run.until("progress")
    os.killpg(run.process.pid, signal.SIGINT)
    deadline = time.monotonic() + PATIENCE_S
    while "once more" not in run.errors():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(run.process.pid, signal.SIGINT)
    struck = time.monotonic()
    assert run.process.wait(PATIENCE_S) == 130
    assert time.monotonic() - struck < ABORTED_WITHIN_S
    assert run.end() == 130
    assert "interrupted" not in {event["event"] for event in run.events}, "it ended before the second one"
    assert "Traceback" not in run.errors()
    resume(run.job, parallel={"ranks": 1})
    assert jobs.files(run.job) == whole
