"""Timetables for step caches, and the loop run over them: as it is, and with ticks that break off."""

from collections import Counter
from typing import Any

import torch

from vidgen.denoise.loop import LoopState, Task, denoise, run_tick
from vidgen.denoise.timetable import Timetable, autoregressive, dualparal, full
from vidgen.types import ContextMode


def timetables(num_steps: int, switch_step: int) -> dict[str, Timetable]:
    """One of each kind that caches know; of two experts the second takes over at a step."""
    queue: dict[str, Any] = {"block_frames": 2, "context_frames": 1}
    return {
        "full": full(5, num_steps),
        "recompute": dualparal(9, num_steps, **queue),
        "cache": dualparal(9, num_steps, mode=ContextMode.CACHE, stride=2, **queue),
        "anchor": dualparal(13, num_steps, block_frames=2, context_frames=2, anchor_frames=1, stride=3),
        "autoregressive": autoregressive(5, num_steps, **queue),
        "experts": dualparal(9, num_steps, switch_step=switch_step, **queue),
    }


def clean(task: Task, state: LoopState | None = None) -> list[torch.Tensor]:
    """Latents of every block."""
    return [block.latents_BCFYX for block in denoise(task, state)]


def clean_with_errors(task: Task) -> list[torch.Tensor]:
    """The same, where every tick breaks off once before its second forward and is run again."""
    state, tried, found = LoopState(), Counter[int](), list[torch.Tensor]()

    def fail() -> None:
        tried[state.next_tick] += 1
        if tried[state.next_tick] == 2:
            raise KeyboardInterrupt

    while state.next_tick < task.timetable.num_ticks:
        try:
            found += [block.latents_BCFYX for block in run_tick(task, state, fail)]
        except KeyboardInterrupt:
            continue
    return found


def assert_same(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    """Bit for bit."""
    assert len(found) == len(expected)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
