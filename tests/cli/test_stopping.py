"""Every way to stop a render, and what `vidgen resume` makes of what is left."""

import errno
import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vidgen import render as rendering
from vidgen import run as running
from vidgen.config import parse_job, read_yaml
from vidgen.media.source import VideoSource

Run = Callable[..., Any]
RED = "a red circle moving left over a gray background"
QUICK = ("--num-inference-steps", 2, "--no-sheet")
CONFIGS = sorted((Path(__file__).resolve().parents[2] / "configs").glob("*.yaml"))


def frames_of(path: str | Path) -> np.ndarray:
    with VideoSource(path) as source:
        return np.stack(list(source))


def job_of(folder: str | Path) -> Any:
    """The resolved job that a render left."""
    return parse_job(read_yaml(Path(folder, "job.yaml")))


def events(out: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.splitlines()]


def test_a_reader_who_leaves_does_not_stop_the_render(tmp_path: Path):
    with started(tmp_path, "--num-frames", 65, *QUICK) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.wait(60) == 0
    assert len(frames_of(tmp_path / "out.mp4")) == 65


# being stopped


@contextmanager
def started(folder: Path, *argv: object) -> Iterator[subprocess.Popen[str]]:
    """`vidgen render --json` as a process of its own; killed if the test leaves it running."""
    command = [sys.executable, "-m", "vidgen", "render", RED, "--json", *map(str, argv)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=folder, stdout=pipe, stderr=pipe, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    path = tmp_path_factory.mktemp("uninterrupted") / "whole.mp4"
    job = {"prompt": RED, "num_frames": 129, "num_inference_steps": 4, "output": {"path": path}}
    rendering.render(parse_job(job))
    return frames_of(path)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_after_the_tick_and_resume_gives_the_same_frames(
    number: signal.Signals, uninterrupted: np.ndarray, run: Run, tmp_path: Path
):
    with started(tmp_path, "--num-frames", 129, "--infer-steps", 4) as process:
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(2)]  # started, and the first tick
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    last = events("".join(lines) + out)[-1]
    assert last == {"event": "interrupted", "folder": "out.job"}
    assert "vidgen resume out.job" in err and "Traceback" not in err
    assert not Path("out.mp4").exists()
    ran = run("resume", "out.job", "--json")
    assert ran.code == 0
    assert events(ran.out)[1]["ticks_done"] > 1, "it began anew"
    assert np.array_equal(frames_of("out.mp4"), uninterrupted)


def test_the_second_signal_ends_it_at_once(tmp_path: Path):
    # ticks of more than a second, so that the first signal's tick is not over when the second comes
    size = ("--size", "128x128", "--timetable", "full", "--num-frames", 64, "--infer-steps", 4)
    with started(tmp_path, *size) as process:
        assert process.stdout is not None and process.stderr is not None
        while json.loads(process.stdout.readline())["event"] != "progress":
            pass
        process.send_signal(signal.SIGINT)
        while "once more" not in process.stderr.readline():
            pass
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "vidgen resume" not in err and "Traceback" not in err
    assert (tmp_path / "out.job/job.yaml").exists()


def test_a_disk_that_fills_up_costs_nothing_that_is_finished(
    uninterrupted: np.ndarray, run: Run, monkeypatch: pytest.MonkeyPatch
):
    commit, calls = running.Run._commit, []

    def commit_twice(*parts: Any) -> None:
        calls.append(parts)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, "No space left on device", "out.job/latents")
        commit(*parts)

    monkeypatch.setattr(running.Run, "_commit", commit_twice)
    ran = run("render", RED, "--num-frames", 129, "--infer-steps", 4)
    assert ran.code == 3
    assert len(ran.err.splitlines()) == 1 and ran.err.startswith("vidgen: error: ")
    for part in ("No space left", "32 of 129 frames are kept", "vidgen resume out.job"):
        assert part in ran.err
    assert run("resume", "out.job").code == 0
    assert np.array_equal(frames_of("out.mp4"), uninterrupted)


def test_a_fault_of_the_engine_shows_its_trace_and_keeps_the_job(run: Run, monkeypatch: pytest.MonkeyPatch):
    def fail(*_: object) -> None:
        raise KeyError("fault")

    monkeypatch.setattr(running, "make_sheet", fail)
    ran = run("render", RED, "--num-frames", 5, "--infer-steps", 2)
    assert ran.code == 3 and "Traceback" in ran.err
    assert "KeyError: 'fault'; 5 of 5 frames are kept" in ran.err.splitlines()[-1]


def test_resume_of_a_finished_job_says_so(run: Run):
    assert run("render", RED, "--num-frames", 9, *QUICK).code == 0
    before = Path("out.mp4").stat().st_mtime_ns
    ran = run("resume", "out.job")
    assert ran.code == 0 and "already finished: out.mp4" in ran.out
    assert run("resume", "out.job", "--json").out.startswith('{"event": "finished"')
    assert Path("out.mp4").stat().st_mtime_ns == before


def test_resume_makes_a_lost_output_again(run: Run):
    assert run("render", RED, "--num-frames", 20, *QUICK).code == 0
    data = Path("out.mp4").read_bytes()
    Path("out.mp4").unlink()
    assert run("resume", "out.job").code == 0
    assert Path("out.mp4").read_bytes() == data


def test_overwrite_starts_anew(run: Run):
    assert run("render", RED, "--num-frames", 9, *QUICK).code == 0
    assert run("render", RED, "--num-frames", 5, *QUICK, "--overwrite").code == 0
    assert len(frames_of("out.mp4")) == 5
