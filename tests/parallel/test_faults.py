"""Nothing finished is ever lost: ranks that die or hang are named and replaced, the bytes stay the same."""

import dataclasses
import json
import os
import random
import re
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from vidgen.engine import Engine
from vidgen.parallel.coordinator import RanksFailed
from vidgen.render import render, resume
from vidgen.types import Block, Progress

RECOMPUTE = {"block_frames": 2, "context_frames": 1}
CACHE = {"block_frames": 2, "context_frames": 1, "context_mode": "cache", "anchor_frames": 1}
LONG = [
    {"prompt": "a blue square moving up over a white background", "num_frames": 109}
]  # 14 blocks, 17 ticks
KILL, STOP = signal.SIGKILL, signal.SIGSTOP
NAMED_WITHIN_S = 40.0  # on a busy machine; the timeouts below are a tenth of it


class Saboteur:
    """Sends signals to ranks of a running job when it reaches certain ticks; called with each Progress."""

    def __init__(self, folder: Path, faults: list[tuple[int, list[str], signal.Signals]]) -> None:
        self.folder, self.faults = folder, list(faults)
        self.done: list[tuple[str, int, float]] = []  # (name, pid, when)
        self.notes: list[tuple[str, float]] = []
        self.pids: set[int] = set()

    def __call__(self, progress: Progress) -> None:
        if not (self.folder / "ranks.json").exists():
            return
        places = {
            place["name"]: place["pid"] for place in json.loads((self.folder / "ranks.json").read_text())
        }
        self.pids |= set(places.values())
        if len(self.notes) < len(self.done) or not self.faults or progress.ticks_done < self.faults[0][0]:
            return
        _, names, number = self.faults.pop(0)
        for name in names:
            os.kill(places[name], number)
        self.done.append((names[0], places[names[0]], time.monotonic()))

    def note(self, text: str) -> None:
        self.notes.append((text, time.monotonic()))


def run(jobs: Any, folder: Path, queue: Any, faults: Any, ranks: int = 3, **parallel: Any) -> Any:
    """Render with faults; the saboteur, after checking that it did and that all was named and cleaned up."""
    saboteur = Saboteur(folder / "v.job", faults)
    parallel = {"max_restarts": 20, "heartbeat_timeout_s": 4, "link_timeout_s": 20, **parallel}
    done = render(
        jobs.job(
            folder / "v.mp4", ranks, queue=queue, segments=LONG, num_inference_steps=4, parallel=parallel
        ),
        report=saboteur, note=saboteur.note,
    )  # fmt: skip
    assert not saboteur.faults, "every fault was made"
    assert len(saboteur.notes) == len(saboteur.done), saboteur.notes
    for (name, pid, struck), (text, noted) in zip(saboteur.done, saboteur.notes, strict=True):
        assert name in text and str(pid) in text, (name, pid, text)
        assert noted - struck < NAMED_WITHIN_S
    assert done.evidence is not None and done.evidence["restarts"] == len(saboteur.done)
    assert not jobs.leftovers()
    deadline = time.monotonic() + 10
    while jobs.alive(saboteur.pids) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not jobs.alive(saboteur.pids)
    return saboteur


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, jobs: Any) -> dict[str, dict[str, bytes]]:
    """What one process makes, undisturbed."""
    folder = tmp_path_factory.mktemp("whole")
    found = {}
    for name, queue in {"recompute": RECOMPUTE, "cache": CACHE}.items():
        render(jobs.job(folder / f"{name}.mp4", 1, queue=queue, segments=LONG, num_inference_steps=4))
        found[name] = jobs.files(folder / f"{name}.job")
    return found


def test_each_rank_and_the_decoder_killed_in_turn(tmp_path: Path, whole: Any, jobs: Any, local_ray: None):
    faults = [
        (tick, [name], KILL)
        for tick, name in [(2, "rank 0"), (5, "rank 1"), (8, "rank 2"), (11, "the decoder")]
    ]
    run(jobs, tmp_path, RECOMPUTE, faults)
    assert jobs.files(tmp_path / "v.job") == whole["recompute"]


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_killed_at_ticks_drawn_from_a_seed(seed: int, tmp_path: Path, whole: Any, jobs: Any, local_ray: None):
    rng = random.Random(seed)
    names = ["rank 0", "rank 1", "the decoder"]
    ticks = sorted(rng.sample(range(1, 11), 4))
    run(jobs, tmp_path, CACHE, [(tick, [rng.choice(names)], KILL) for tick in ticks], ranks=2)
    assert jobs.files(tmp_path / "v.job") == whole["cache"]


def test_a_stopped_rank_or_decoder_is_taken_for_lost(tmp_path: Path, whole: Any, jobs: Any, local_ray: None):
    faults = [(2, ["rank 1"], STOP), (6, ["the decoder"], STOP), (9, ["rank 0"], STOP)]
    run(jobs, tmp_path, RECOMPUTE, faults, ranks=2)
    assert jobs.files(tmp_path / "v.job") == whole["recompute"]


def test_two_ranks_lost_at_once(tmp_path: Path, whole: Any, jobs: Any, local_ray: None):
    saboteur = Saboteur(tmp_path / "v.job", [(4, ["rank 1", "rank 2"], KILL)])
    render(
        jobs.job(tmp_path / "v.mp4", 3, queue=CACHE, segments=LONG, num_inference_steps=4),
        report=saboteur, note=saboteur.note,
    )  # fmt: skip
    assert len(saboteur.notes) == 1 and re.search("rank [12]", saboteur.notes[0][0])
    assert jobs.files(tmp_path / "v.job") == whole["cache"]


class FailsOnce:
    """Noise that raises for one block, the first time it is asked."""

    def __init__(self, noise: Any, block: int, marker: Path) -> None:
        self.noise, self.block, self.marker = noise, block, marker

    def __call__(self, block: Block) -> torch.Tensor:
        if block.index == self.block and not self.marker.exists():
            self.marker.touch()
            raise ArithmeticError("made up by a test")
        return self.noise(block)


def test_an_exception_on_a_rank_is_named_and_survived(
    tmp_path: Path, whole: Any, jobs: Any, local_ray: None, monkeypatch: pytest.MonkeyPatch
):
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(sys.modules[FailsOnce.__module__])
    plain = Engine.plan

    def plan(self: Engine, job: Any, inputs: Any = None) -> Any:
        made = plain(self, job)
        noise = FailsOnce(made.task.noise, 5, tmp_path / "marker")
        return dataclasses.replace(made, task=dataclasses.replace(made.task, noise=noise))

    notes: list[str] = []
    monkeypatch.setattr(Engine, "plan", plan)
    # block 5 is far from what measuring and shapes ask for
    render(
        jobs.job(tmp_path / "v.mp4", 2, queue=RECOMPUTE, segments=LONG, num_inference_steps=4),
        note=notes.append,
    )
    assert len(notes) == 1 and "rank 0: ArithmeticError: made up by a test" in notes[0]
    assert jobs.files(tmp_path / "v.job") == whole["recompute"]


def test_after_too_many_restarts_the_job_is_left_resumable(
    tmp_path: Path, whole: Any, jobs: Any, local_ray: None
):
    folder = tmp_path / "v.job"
    saboteur = Saboteur(folder, [(3, ["rank 1"], KILL), (6, ["rank 0"], KILL)])
    config = jobs.job(
        tmp_path / "v.mp4", 2, queue=CACHE, segments=LONG, num_inference_steps=4, parallel={"max_restarts": 1}
    )
    with pytest.raises(RanksFailed, match=r"rank 0 \(pid \d+.*gave up after 1 restarts"):
        render(config, report=saboteur, note=saboteur.note)
    resume(folder, parallel={"ranks": 1})
    assert jobs.files(folder) == whole["cache"]
