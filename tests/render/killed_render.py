"""Renders one job again and again in forked children that kill themselves at the n-th touch of the disk.

Run as a script: `python killed_render.py FOLDER SEED NUM_POINTS`; prints one JSON line per kill point.
"""

import hashlib
import json
import os
import random
import signal
import sys
from pathlib import Path
from typing import Any

from vidgen.config import parse_job
from vidgen.media.source import VideoSource
from vidgen.render import render, resume

TOUCHES = ("open", "os.rename", "os.remove", "os.truncate")  # audit events; os.replace raises os.rename


def job(folder: Path, name: str) -> Any:
    return parse_job(
        {
            "prompt": "a red circle moving left over a gray background",
            "num_frames": 61,
            "num_inference_steps": 3,
            "state_every": 2,
            "queue": {"block_frames": 2, "context_frames": 1, "context_mode": "cache", "anchor_frames": 1},
            "output": {"path": folder / name, "sheet": False},
        }
    )


def digest(video: Path) -> str:
    """SHA-256 of all decoded frames."""
    with VideoSource(video) as source:
        return hashlib.sha256(source.frames(range(source.num_frames)).tobytes()).hexdigest()


class Touches:
    """Counts what this process does to files below a folder, and ends it at one of them."""

    def __init__(self, folder: Path, fatal: int | None) -> None:
        self.folder, self.fatal, self.count = str(folder), fatal, 0
        sys.addaudithook(self)

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event in TOUCHES and str(arguments[0]).startswith(self.folder):
            self.count += 1
            if self.count == self.fatal:
                os.kill(os.getpid(), signal.SIGKILL)


def in_child(work: Any, folder: Path, fatal: int | None = None) -> tuple[int, int]:
    """(signal or exit status, touches of the disk) of `work` in a fork."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        touches = Touches(folder, fatal)
        work()
        os.write(write, str(touches.count).encode())
        os._exit(0)
    os.close(write)
    count = os.read(read, 20)
    os.close(read)
    status = os.waitpid(child, 0)[1]
    return os.waitstatus_to_exitcode(status), int(count or 0)


def main(folder: Path, seed: int, num_points: int) -> None:
    status, touches = in_child(lambda: render(job(folder, "whole.mp4")), folder)
    assert status == 0
    whole = digest(folder / "whole.mp4")
    points = random.Random(seed).sample(range(5, touches + 1), num_points)
    for point in points:
        name = f"killed{point}.mp4"
        killed, _ = in_child(lambda name=name: render(job(folder, name)), folder, point)
        job_folder = folder / f"killed{point}.job"
        live = job_folder / "live.mp4"
        playable = None
        if live.exists() and list((job_folder / "segments").glob("0*.m4s")):
            with VideoSource(live, backend="av") as source:
                playable = sum(1 for _ in source)
        if (job_folder / "job.yaml").exists():
            resumed, _ = in_child(lambda folder=job_folder: resume(folder), folder)
        else:  # killed before there was a job: nothing finished, so it starts anew
            resumed, _ = in_child(lambda name=name: render(job(folder, name), overwrite=True), folder)
        row = {"point": point, "of": touches, "killed": killed, "playable": playable, "resumed": resumed}
        row["same"] = (folder / name).exists() and digest(folder / name) == whole
        sys.stdout.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
