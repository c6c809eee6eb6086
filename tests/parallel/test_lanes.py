"""The same video on lanes: tokens, heads and branches of guidance shared between ranks of several stages."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vidgen.conditioning.prompts import PromptChange
from vidgen.denoise.lockstep import Clips
from vidgen.denoise.loop import LoopState, denoise, run_tick
from vidgen.denoise.timetable import autoregressive, dualparal, full, moving_buffer, pipefusion
from vidgen.parallel.first import OfferedChange
from vidgen.parallel.topology import Lanes
from vidgen.types import ContextMode

RELATIVE = 1e-5

TIMETABLES = {
    "recompute": dualparal(9, 3, block_frames=2, context_frames=1),
    "cache": dualparal(9, 3, block_frames=2, context_frames=1, mode=ContextMode.CACHE),
    "anchor": dualparal(13, 4, block_frames=2, context_frames=2, anchor_frames=1, stride=2),
    "autoregressive": autoregressive(5, 3, block_frames=2, context_frames=1),
    "full": full(5, 3),
    "buffer": moving_buffer(9, 4, block_frames=2, context_frames=1, stride=2),
}
LANES = {
    "ulysses-3": Lanes(ulysses=3),
    "ring-2": Lanes(ring=2),
    "usp-2x2": Lanes(ring=2, ulysses=2),
    "guidance-ulysses": Lanes(guidance=2, ulysses=2),
}


def clean(task: Any) -> list[torch.Tensor]:
    return [block.latents_BCFYX for block in denoise(task)]


def assert_near(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert (one - other).abs().max() <= RELATIVE * other.abs().max()


@pytest.mark.parametrize("lanes", LANES.values(), ids=LANES)
@pytest.mark.parametrize("timetable", TIMETABLES.values(), ids=TIMETABLES)
def test_any_lanes_give_the_loops_latents(timetable: Any, lanes: Any, make_task: Any, pipeline: Any):
    task = make_task(timetable, guidance_scale=3.0)
    cut = (4,) if timetable.num_blocks == 1 else (2, 2)
    assert_near(pipeline(task, cut, lanes=lanes).latents, clean(task))


@pytest.mark.parametrize("cut", [(4,), (2, 1, 1)], ids=str)
@pytest.mark.parametrize("timetable", TIMETABLES.values(), ids=TIMETABLES)
def test_lanes_of_guidance_give_the_loops_latents_bit_for_bit(
    timetable: Any, cut: Any, make_task: Any, pipeline: Any
):
    task = make_task(timetable, guidance_scale=3.0)
    for one, other in zip(pipeline(task, cut, lanes=Lanes(guidance=2)).latents, clean(task), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("cut", [(2, 2), (2, 1, 1)], ids=str)
@pytest.mark.parametrize("frames", [3, 9], ids=str)
def test_a_moving_buffer_on_stages_gives_the_loops_latents_bit_for_bit(
    frames: int, cut: Any, make_task: Any, pipeline: Any
):
    task = make_task(moving_buffer(frames, 4, block_frames=2, context_frames=1), guidance_scale=2.0)
    for one, other in zip(pipeline(task, cut).latents, clean(task), strict=True):
        assert torch.equal(one, other)


def test_stages_sequence_and_guidance_compose_on_eight_ranks(make_task: Any, pipeline: Any):
    task = make_task(TIMETABLES["cache"], guidance_scale=3.0)
    run = pipeline(task, (2, 2), lanes=Lanes(guidance=2, ulysses=2))
    assert run.topology.num_ranks == 8
    assert_near(run.latents, clean(task))


@given(
    ulysses=st.integers(1, 5), ring=st.integers(1, 3), guidance=st.integers(1, 2), stages=st.integers(1, 3),
    mode=st.sampled_from(ContextMode), frames=st.integers(1, 7), steps=st.integers(1, 3),
    architecture=st.sampled_from([{}, {"linear_skip": True, "convolutions": True}, {"window": (1, 1, 0)}]),
)  # fmt: skip
@settings(
    max_examples=15, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
def test_no_number_has_to_divide_another(
    make_task: Any, pipeline: Any, ulysses: int, ring: int, guidance: int, stages: int, mode: Any,
    frames: int, steps: int, architecture: Any,
):  # fmt: skip
    timetable = dualparal(frames, steps, block_frames=2, context_frames=1, mode=mode)
    task = make_task(timetable, guidance_scale=2.0, settings=architecture)
    cut = {1: (4,), 2: (3, 1), 3: (1, 2, 1)}[stages]
    lanes = Lanes(guidance=guidance, ulysses=ulysses, ring=ring)
    assert_near(pipeline(task, cut, lanes=lanes).latents, clean(task))


@pytest.mark.parametrize("before", [Lanes(ulysses=2), Lanes(ring=2), Lanes(guidance=2)], ids=str)
@pytest.mark.parametrize("after", [Lanes(), Lanes(guidance=2, ulysses=3)], ids=str)
def test_stopped_on_some_lanes_and_gone_on_with_others_the_video_is_the_loops(
    before: Any, after: Any, make_task: Any, pipeline: Any
):
    task = make_task(TIMETABLES["anchor"], guidance_scale=2.0)
    stopping = pipeline.__globals__["Watched"](stop_after=5)
    first = pipeline(task, (3, 1), lanes=before, watched=stopping)
    (next_tick,) = stopping.states
    rest = pipeline(task, (2, 2), lanes=after, state=first.state(next_tick)).latents
    assert_near([*first.latents, *rest], clean(task))


def test_states_saved_on_lanes_are_the_loops(make_task: Any, pipeline: Any):
    task = make_task(TIMETABLES["cache"], guidance_scale=2.0)
    run = pipeline(task, (2, 2), lanes=Lanes(guidance=2, ulysses=2), state_every=2)
    by_loop = LoopState()
    for tick in range(2, task.timetable.num_ticks, 2):
        while by_loop.next_tick < tick:
            run_tick(task, by_loop)
        state = run.state(tick)
        assert state.blocks.keys() == by_loop.blocks.keys()
        assert state.lent.for_later.keys() == by_loop.lent.for_later.keys()
        for block, (step, branches) in state.lent.for_later.items():
            expected_step, expected = by_loop.lent.for_later[block]
            assert step == expected_step and len(branches) == len(expected) == 2
            for layers, expected_layers in zip(branches, expected, strict=True):
                for kv, expected_kv in zip(layers, expected_layers, strict=True):
                    assert_near(
                        [kv.key_BFSHD, kv.value_BFSHD], [expected_kv.key_BFSHD, expected_kv.value_BFSHD]
                    )


@pytest.mark.parametrize("lanes", [Lanes(), Lanes(guidance=2), Lanes(ulysses=2)], ids=str)
@pytest.mark.parametrize("after", [0, 2, 5])
def test_a_prompt_changed_on_ranks_gives_what_the_loop_gives_with_the_change(
    lanes: Any, after: int, make_changing_task: Any, pipeline: Any
):
    """The ranks say from which block on it holds."""
    task, _ = make_changing_task(TIMETABLES["recompute"])
    text = pipeline.__globals__["denoise_tests"].random_text("another")
    change = OfferedChange(prompt="another", transition_blocks=1, text_1NT=text)
    watched = pipeline.__globals__["Watched"](changes=[(after, change)])
    found = pipeline(task, (2, 2), lanes=lanes, watched=watched).latents
    (first_block,) = watched.changed_at
    expected, texts = make_changing_task(TIMETABLES["recompute"])
    if first_block is not None:
        assert first_block >= after
        made = PromptChange(prompt="another", first_block=first_block, transition_blocks=1)
        texts.change(made, text)
    else:
        assert after == 5
    assert_near(found, clean(expected))


LOCKSTEP = {
    "clip-2": Lanes(clip=2),
    "clip-3": Lanes(clip=3),
    "guidance": Lanes(guidance=2, clip=2),
    "ulysses": Lanes(clip=2, ulysses=3),
    "ring": Lanes(ring=2),
}


@pytest.mark.parametrize("cut", [(4,), (2, 2)], ids=str)
@pytest.mark.parametrize("lanes", LOCKSTEP.values(), ids=LOCKSTEP)
def test_clips_in_lock_step_on_lanes_give_the_loops_latents(
    lanes: Any, cut: Any, make_task: Any, pipeline: Any
):
    clips = Clips(num_frames=7, clip_frames=2, halo_frames=1, global_frames=2)
    task = replace(make_task(full(7, 3), guidance_scale=2.0), clips=clips)
    assert_near(pipeline(task, cut, lanes=lanes).latents, clean(task))


@pytest.mark.parametrize("lanes", [Lanes(), Lanes(guidance=2), Lanes(ulysses=2)], ids=str)
@pytest.mark.parametrize("cut", [(2, 2), (2, 1, 1)], ids=str)
def test_stale_patches_on_stages_and_lanes_give_the_loops_latents(
    lanes: Any, cut: Any, make_task: Any, pipeline: Any
):
    """The loop says what is stale, so that the stages only overlap what it allows."""
    task = make_task(pipefusion(7, 4, block_frames=2, warm_up_steps=1), guidance_scale=2.0)
    found = pipeline(task, cut, lanes=lanes).latents
    if lanes == Lanes():
        assert all(torch.equal(one, other) for one, other in zip(found, clean(task), strict=True))
    assert_near(found, clean(task))


@pytest.mark.parametrize("timetable", [pipefusion(7, 7, block_frames=2, warm_up_steps=2)], ids=["patches"])
def test_stale_patches_stopped_on_some_ranks_and_gone_on_with_others_are_the_loops(
    timetable: Any, make_task: Any, pipeline: Any
):
    task = make_task(timetable, guidance_scale=2.0)
    stopping = pipeline.__globals__["Watched"](stop_after=2)
    first = pipeline(task, (3, 1), lanes=Lanes(ulysses=2), watched=stopping)
    (next_tick,) = stopping.states
    rest = pipeline(task, (2, 2), state=first.state(next_tick)).latents
    assert_near([*first.latents, *rest], clean(task))
