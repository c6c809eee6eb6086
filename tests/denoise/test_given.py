"""Given pictures: pinned frames stay what they are and are seen as clean; channels reach their frames."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from vidgen.denoise.given import Given
from vidgen.denoise.loop import LoopState, Task, run_tick
from vidgen.denoise.timetable import dualparal, full
from vidgen.types import ContextMode

MakeTask = Callable[..., Task]
QUEUE = dualparal(9, 4, block_frames=3, context_frames=2)
KNOWN = torch.randn(3, 4, 4, 6, generator=torch.Generator().manual_seed(7))  # of 4 frames: into block 1


def pinned(task: Task, known: Tensor = KNOWN) -> Task:
    return replace(task, given=Given(pinned_CFYX=known))


@pytest.mark.parametrize("mode", ContextMode)
def test_pinned_frames_come_out_as_they_went_in(mode: ContextMode, task: MakeTask, latents: Any):
    made = pinned(task(replace(QUEUE, mode=mode), guidance_scale=2.0))
    clean = torch.cat(latents(made), dim=2)
    assert torch.equal(clean[0, :, :4], KNOWN)
    free = torch.cat(latents(replace(made, given=Given())), dim=2)
    assert not torch.equal(clean[:, :, 4:], free[:, :, 4:])


def test_a_pinned_frame_is_seen_clean_at_level_zero(dit: Any, task: MakeTask, latents: Any):
    """By hand: the model sees known latents and level 0, the solver steps as ever."""
    timetable, known = full(4, 3), KNOWN[:, :2]
    made = pinned(task(timetable), known)
    block, now = timetable.block(0), made.noise(timetable.block(0))
    for step in range(3):
        levels = torch.tensor([[0.0, 0.0, made.noise_levels[step], made.noise_levels[step]]])
        seen = torch.cat([known.unsqueeze(0), now[:, :, 2:]], dim=2)
        velocity = made.model(seen, levels, made.texts(block)[0])
        now = now + (made.noise_levels[step + 1] - made.noise_levels[step]) * velocity
    expected = torch.cat([known.unsqueeze(0), now[:, :, 2:]], dim=2)
    torch.testing.assert_close(latents(made)[0], expected, rtol=1e-5, atol=1e-5)


def test_more_pinned_frames_than_there_are_leave_nothing_to_do(task: MakeTask, latents: Any):
    known = torch.randn(3, 12, 4, 6)
    clean = torch.cat(latents(pinned(task(QUEUE), known)), dim=2)
    assert torch.equal(clean[0], known[:, :9])


def test_resuming_between_any_two_ticks_gives_the_same(task: MakeTask, latents: Any):
    made = pinned(task(QUEUE, guidance_scale=2.0))
    expected = latents(made)
    for stop in range(1, QUEUE.num_ticks):
        state, done = LoopState(), []
        for _ in range(stop):
            done += [block.latents_BCFYX for block in run_tick(made, state)]
        rest = latents(made, state)
        for found, wanted in zip([*done, *rest], expected, strict=True):
            assert torch.equal(found, wanted)


@pytest.fixture
def with_channels(dit: Any, task: MakeTask) -> Callable[..., Task]:
    def make(channels: Tensor, timetable: Any = QUEUE) -> Task:
        made = task(timetable, model=dit(condition_channels=2))
        return replace(made, given=Given(channels_CFYX=channels))

    return make


def test_the_last_frames_channels_hold_for_all_after_it(with_channels: Any, latents: Any):
    short = torch.randn(2, 3, 4, 6)
    long = torch.cat([short, short[:, -1:].expand(-1, 6, -1, -1)], dim=1)
    for found, expected in zip(latents(with_channels(short)), latents(with_channels(long)), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("frame", [0, 4, 8])
def test_channels_belong_to_their_frame(frame: int, with_channels: Any, latents: Any):
    """With no context between blocks only the frame's own block changes."""
    alone = replace(QUEUE, context_frames=0)
    one = torch.randn(2, 9, 4, 6)
    other = one.clone()
    other[:, frame] += 1
    pairs = zip(latents(with_channels(one, alone)), latents(with_channels(other, alone)), strict=True)
    assert [not torch.equal(*pair) for pair in pairs] == [frame // 3 == block for block in range(3)]
