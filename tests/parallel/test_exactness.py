"""The same video for any number of ranks: bit for bit what the single-process loop computes."""

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vidgen.denoise.lending import join_layers
from vidgen.denoise.loop import LoopState, denoise, run_tick
from vidgen.denoise.timetable import dualparal, full
from vidgen.types import ContextMode, GuidanceMode

RECOMPUTE, CACHE = ContextMode.RECOMPUTE, ContextMode.CACHE
CUTS = [(2, 2), (3, 1), (1, 3), (2, 1, 1), (1, 1, 1, 1)]


def queue(frames: int = 9, steps: int = 3, block: int = 2, context: int = 1, **options: Any) -> Any:
    return dualparal(frames, steps, block_frames=block, context_frames=context, **options)


TIMETABLES = {
    "plain": queue(),
    "cache": queue(mode=CACHE),
    "long": queue(17, 4),
    "fewer-blocks-than-steps": queue(4, 5),
    "one-block": queue(2, 4),
    "one-short-block": queue(1, 3),
    "one-step": queue(9, 1),
    "no-context": queue(context=0),
    "full-context": queue(context=2),
    "full-context-cache": queue(context=2, mode=CACHE),
    "stride-2": queue(11, 4, stride=2),
    "stride-3-cache": queue(11, 4, stride=3, mode=CACHE),
    "anchor": queue(13, 3, anchor_frames=1),
    "anchor-cache-stride": queue(13, 4, anchor_frames=2, stride=2, mode=CACHE),
    "full": full(5, 4),
}


def clean(task: Any) -> list[torch.Tensor]:
    return [block.latents_BCFYX for block in denoise(task)]


def assert_same(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert len(found) == len(expected)
    for index, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert torch.equal(one, other), f"block {index} differs by {(one - other).abs().max()}"


@pytest.mark.parametrize("cut", CUTS, ids=str)
@pytest.mark.parametrize("timetable", TIMETABLES.values(), ids=TIMETABLES)
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_any_cut_gives_the_loops_latents_bit_for_bit(
    timetable: Any, cut: Any, guidance: float, make_task: Any, pipeline: Any
):
    task = make_task(timetable, guidance_scale=guidance)
    assert_same(pipeline(task, cut).latents, clean(task))


@given(
    frames=st.integers(1, 14), steps=st.integers(1, 5), block=st.integers(1, 4), context=st.integers(0, 4),
    stride=st.integers(1, 3), mode=st.sampled_from(ContextMode), anchor=st.integers(0, 2),
    guidance=st.sampled_from([1.0, 2.5]), guidance_mode=st.sampled_from(GuidanceMode),
    cuts=st.lists(st.booleans(), min_size=3, max_size=3), in_flight=st.integers(1, 9),
    architecture=st.sampled_from([{}, {"linear_skip": True, "convolutions": True}, {"window": (1, 1, 0)}]),
)  # fmt: skip
@settings(
    max_examples=60, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
def test_any_queue_on_any_cut_equals_the_loop(
    make_task: Any, pipeline: Any, frames: int, steps: int, block: int, context: int, stride: int, mode: Any,
    anchor: int, guidance: float, guidance_mode: Any, cuts: list[bool], in_flight: int, architecture: Any,
):  # fmt: skip
    timetable = queue(
        frames, steps, block, min(context, block), stride=min(stride, steps), mode=mode,
        anchor_frames=min(anchor, block),
    )  # fmt: skip
    layers = [1]
    for is_cut in cuts:
        if is_cut:
            layers.append(1)
        else:
            layers[-1] += 1
    if len(layers) == 1:
        layers = [2, 2]
    task = make_task(timetable, guidance_scale=guidance, guidance_mode=guidance_mode, settings=architecture)
    assert_same(pipeline(task, tuple(layers), max_in_flight=in_flight).latents, clean(task))


@pytest.mark.parametrize("mode", ContextMode)
def test_stacked_guidance_is_split_guidance_within_rounding(mode: Any, make_task: Any, pipeline: Any):
    split = make_task(queue(mode=mode), guidance_scale=3.0)
    stacked = make_task(queue(mode=mode), guidance_scale=3.0, guidance_mode=GuidanceMode.STACKED)
    for one, other in zip(pipeline(stacked, (2, 2)).latents, clean(split), strict=True):
        assert (one - other).abs().max() <= 1e-5 * other.abs().max()


@pytest.mark.parametrize("timetable", [TIMETABLES["plain"], TIMETABLES["anchor-cache-stride"]], ids=str)
@pytest.mark.parametrize("after", [1, 2, 5])
def test_stopped_and_gone_on_with_other_ranks_the_latents_are_the_loops(
    timetable: Any, after: int, make_task: Any, pipeline: Any
):
    task = make_task(timetable, guidance_scale=2.0)
    stopping = pipeline.__globals__["Watched"](stop_after=after)
    first = pipeline(task, (2, 1, 1), watched=stopping)
    (next_tick,) = stopping.states
    assert after <= next_tick < timetable.num_ticks
    state = stopping.states[next_tick]
    state.lent = join_layers([saved[next_tick] for saved in first.lent])
    by_loop = LoopState()
    while by_loop.next_tick < next_tick:
        run_tick(task, by_loop)
    assert state.blocks.keys() == by_loop.blocks.keys()
    assert state.lent.for_later.keys() == by_loop.lent.for_later.keys()
    rest = pipeline(task, (1, 3), state=state).latents
    assert_same([*first.latents, *rest], clean(task))


def test_states_saved_on_the_way_are_the_loops(make_task: Any, pipeline: Any):
    task = make_task(TIMETABLES["anchor-cache-stride"], guidance_scale=2.0)
    run = pipeline(task, (1, 2, 1), state_every=2)
    by_loop = LoopState()
    ticks = range(2, task.timetable.num_ticks + 1, 2)
    assert list(run.watched.states) == list(ticks)
    for tick in ticks:
        while by_loop.next_tick < tick:
            run_tick(task, by_loop)
        saved = run.watched.states[tick]
        assert saved.blocks.keys() == by_loop.blocks.keys()
        for index, block in saved.blocks.items():
            assert block.steps_done == by_loop.blocks[index].steps_done
            assert torch.equal(block.latents_BCFYX, by_loop.blocks[index].latents_BCFYX)
        lent = join_layers([saved[tick] for saved in run.lent])
        assert lent.for_later.keys() == by_loop.lent.for_later.keys()
        for block, (step, branches) in lent.for_later.items():
            expected_step, expected = by_loop.lent.for_later[block]
            assert step == expected_step
            for layers, expected_layers in zip(branches, expected, strict=True):
                for kv, expected_kv in zip(layers, expected_layers, strict=True):
                    assert torch.equal(kv.key_BFSHD, expected_kv.key_BFSHD)
                    assert torch.equal(kv.value_BFSHD, expected_kv.value_BFSHD)
