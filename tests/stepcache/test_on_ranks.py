"""Step caches on ranks: the loop's decisions and its latents, bit for bit, whatever the cut."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from vidgen.denoise.lockstep import Clips
from vidgen.denoise.loop import LoopState, denoise, run_tick
from vidgen.denoise.timetable import autoregressive, dualparal, full
from vidgen.parallel.topology import Lanes
from vidgen.types import ContextMode, GuidanceMode

METHODS = ("tea", "taylor", "gated_taylor", "mag", "first_block")
TIMETABLES = {
    "recompute": dualparal(9, 6, block_frames=2, context_frames=1),
    "cache": dualparal(9, 6, block_frames=2, context_frames=1, mode=ContextMode.CACHE),
    "anchor": dualparal(13, 6, block_frames=2, context_frames=2, anchor_frames=1, stride=2),
    "autoregressive": autoregressive(5, 6, block_frames=2, context_frames=1),
}
CUTS = [(4,), (1, 2, 1)]


def clean(task: Any) -> list[torch.Tensor]:
    return [block.latents_BCFYX for block in denoise(task)]


@pytest.mark.parametrize("cut", CUTS, ids=str)
@pytest.mark.parametrize("timetable", TIMETABLES.values(), ids=TIMETABLES)
@pytest.mark.parametrize("method", METHODS)
def test_any_number_of_ranks_decides_as_the_loop_and_gives_its_latents_bit_for_bit(
    method: str, timetable: Any, cut: Any, make_task: Any, threads: Any
):
    task = make_task(timetable, method)
    expected = clean(task)
    run = threads.run_pipeline(task, cut)
    assert all(torch.equal(one, other) for one, other in zip(run.latents, expected, strict=True))
    first = run.stages[0]
    assert first.tally.as_dict() == task.cache.tally.as_dict()
    assert first.tally.skipped > 0
    runs = first.tally.forwards - first.tally.skipped
    assert all(stage.stats.items == runs * task.runs_per_forward for stage in run.stages)


@pytest.mark.parametrize("lanes", [Lanes(guidance=2), Lanes(ulysses=2), Lanes(ring=2, guidance=2)], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_all_lanes_decide_as_the_loop(method: str, lanes: Any, make_task: Any, threads: Any):
    task = make_task(TIMETABLES["cache"], method)
    expected = clean(task)
    run = threads.run_pipeline(task, (2, 2), lanes=lanes)
    for one, other in zip(run.latents, expected, strict=True):
        assert torch.equal(one, other) or lanes.sequence > 1
        assert (one - other).abs().max() <= 1e-4 * other.abs().max()
    firsts = [stage for stage in run.stages if stage.stage.is_first]
    assert [first.tally.as_dict() for first in firsts] == [task.cache.tally.as_dict()] * lanes.num_lanes


@pytest.mark.parametrize("method", METHODS)
def test_clips_in_lock_step_on_lanes_are_skipped_as_in_the_loop(method: str, make_task: Any, threads: Any):
    clips = Clips(num_frames=7, clip_frames=2, halo_frames=1, global_frames=2)
    task = make_task(full(7, 6), method, options={"clips": clips})
    expected = clean(task)
    run = threads.run_pipeline(task, (2, 2), lanes=Lanes(clip=2))
    assert (run.latents[0] - expected[0]).abs().max() <= 1e-4 * expected[0].abs().max()
    assert run.stages[0].tally.as_dict() == task.cache.tally.as_dict()


def test_stacked_branches_on_ranks_are_the_loops(make_task: Any, threads: Any):
    task = make_task(TIMETABLES["cache"], "tea", options={"guidance_mode": GuidanceMode.STACKED})
    run = threads.run_pipeline(task, (2, 1, 1))
    assert all(torch.equal(one, other) for one, other in zip(run.latents, clean(task), strict=True))


@pytest.mark.parametrize("after", [(2, 2), (1, 1, 1, 1)], ids=str)
@pytest.mark.parametrize("before", [Lanes(), Lanes(guidance=2), Lanes(ulysses=2)], ids=str)
@pytest.mark.parametrize("method", ["tea", "taylor", "gated_taylor"])
def test_stopped_on_some_ranks_and_gone_on_with_others_the_decisions_are_the_loops(
    method: str, before: Any, after: Any, make_task: Any, threads: Any
):
    task = make_task(TIMETABLES["cache"], method)
    expected = clean(task)
    stopping = threads.Watched(stop_after=4)
    first = threads.run_pipeline(task, (3, 1), lanes=before, watched=stopping)
    (next_tick,) = stopping.states
    second = threads.run_pipeline(task, after, state=first.state(next_tick))
    for one, other in zip([*first.latents, *second.latents], expected, strict=True):
        assert torch.equal(one, other) or before.sequence > 1
        assert (one - other).abs().max() <= 1e-4 * other.abs().max()
    skipped = first.stages[0].tally.skipped_at + second.stages[0].tally.skipped_at
    assert skipped == +task.cache.tally.skipped_at


@pytest.mark.parametrize("cut", [(4,), (2, 1, 1)], ids=str)
def test_states_saved_on_ranks_keep_what_the_loop_keeps(cut: Any, make_task: Any, threads: Any):
    task = make_task(TIMETABLES["cache"], "gated_taylor")
    run, by_loop = threads.run_pipeline(task, cut, state_every=2), LoopState()
    for tick in range(2, task.timetable.num_ticks, 2):
        while by_loop.next_tick < tick:
            run_tick(task, by_loop)
        state = run.state(tick)
        for index, block in by_loop.blocks.items():
            mine, kept = state.blocks[index].kept, block.kept
            assert replace(mine, outputs=(), signals=()) == replace(kept, outputs=(), signals=())
            for one, other in zip((*mine.signals, *sum(mine.outputs, ())),
                                  (*kept.signals, *sum(kept.outputs, ())), strict=True):  # fmt: skip
                assert torch.equal(one, other)
        assert state.lent.last.keys() == by_loop.lent.last.keys()
        for index, (step, lends) in by_loop.lent.last.items():
            assert state.lent.last[index][0] == step and state.lent.last[index][1].keys() == lends.keys()
