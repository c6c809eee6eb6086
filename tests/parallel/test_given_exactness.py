"""Two experts, pinned frames and given channels on ranks: the loop's latents, bit for bit."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from vidgen.denoise.given import Given
from vidgen.denoise.loop import LoopState, Task, denoise, run_tick
from vidgen.denoise.timetable import Timetable, dualparal, full
from vidgen.types import ContextMode

BASE = dualparal(11, 6, block_frames=3, context_frames=2)
TIMETABLES: dict[str, Timetable] = {
    "recompute": BASE,
    "cache-anchor": replace(BASE, stride=2, mode=ContextMode.CACHE, anchor_frames=1),
    "full": full(5, 5),
}
cuts = pytest.mark.parametrize("cut", [(2, 2), (1, 2, 1), (1, 1, 1, 1)], ids=str)
timetables = pytest.mark.parametrize("timetable", TIMETABLES.values(), ids=TIMETABLES)


def clean(task: Task) -> list[torch.Tensor]:
    return [block.latents_BCFYX for block in denoise(task)]


def with_experts(make_task: Any, model: Any, timetable: Timetable) -> Task:
    return replace(
        make_task(timetable, guidance_scale=3.0),
        timetable=replace(timetable, switch_step=2),
        second_model=model(num_layers=4, rope_theta=50.0),
        second_guidance_scale=1.5,
    )


def assert_same(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert len(found) == len(expected)
    for index, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert torch.equal(one, other), f"block {index} differs by {(one - other).abs().max()}"


@cuts
@timetables
def test_experts_on_ranks_give_the_loops_latents(
    cut: Any, timetable: Timetable, make_task: Any, model: Any, pipeline: Any
):
    task = with_experts(make_task, model, timetable)
    assert_same(pipeline(task, cut).latents, clean(task))


@cuts
@timetables
def test_given_pictures_on_ranks_give_the_loops_latents(
    cut: Any, timetable: Timetable, make_task: Any, pipeline: Any
):
    generator = torch.Generator().manual_seed(3)
    task = make_task(timetable, guidance_scale=3.0, settings={"condition_channels": 2})
    shape = task.noise(timetable.block(0)).shape
    given = Given(
        pinned_CFYX=torch.randn(shape[1], 4, *shape[3:], generator=generator),
        channels_CFYX=torch.randn(2, 5, *shape[3:], generator=generator),
    )
    task = replace(task, given=given)
    assert_same(pipeline(task, cut).latents, clean(task))


def test_a_pipeline_goes_on_with_experts_from_any_tick(make_task: Any, model: Any, pipeline: Any):
    task = with_experts(make_task, model, TIMETABLES["cache-anchor"])
    expected, state, done = clean(task), LoopState(), []
    for _ in range(task.timetable.num_ticks - 1):
        done += [block.latents_BCFYX for block in run_tick(task, state)]
        copy = LoopState(state.next_tick, dict(state.blocks), state.lent.copy())
        assert_same([*done, *pipeline(task, (1, 3), state=copy).latents], expected)
