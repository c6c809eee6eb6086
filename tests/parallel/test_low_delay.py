"""Low delay on ranks: a block at a time and residual guidance, bit for bit what one process gives."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from vidgen.denoise.lending import join_layers
from vidgen.denoise.loop import LoopState, denoise, run_tick
from vidgen.denoise.timetable import autoregressive, dualparal
from vidgen.parallel.slots import least_slots
from vidgen.render import render
from vidgen.types import ContextMode, GuidanceMode, ResidualGuidance

RECOMPUTE, CACHE = ContextMode.RECOMPUTE, ContextMode.CACHE
NONE, ONETIME, SELF = ResidualGuidance
SIZES: dict[str, Any] = {"block_frames": 2, "context_frames": 1}
TIMETABLES = {
    "queue": dualparal(9, 3, **SIZES),
    "queue-cache": dualparal(9, 3, mode=CACHE, **SIZES),
    "stride-anchor-cache": dualparal(9, 4, mode=CACHE, stride=2, anchor_frames=1, **SIZES),
    "autoregressive": autoregressive(7, 3, **SIZES),
    "autoregressive-cache": autoregressive(7, 3, mode=CACHE, anchor_frames=2, **SIZES),
}
timetables = pytest.mark.parametrize("timetable", TIMETABLES.values(), ids=TIMETABLES)


def clean(task: Any) -> list[torch.Tensor]:
    return [block.latents_BCFYX for block in denoise(task)]


def assert_same(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert [torch.equal(one, other) for one, other in zip(found, expected, strict=True)] == [True] * len(
        expected
    )


@pytest.mark.parametrize("cut", [(2, 2), (1, 2, 1)], ids=str)
@pytest.mark.parametrize("kind", ResidualGuidance)
@timetables
def test_any_cut_gives_the_loops_latents_bit_for_bit(
    timetable: Any, kind: ResidualGuidance, cut: Any, make_task: Any, pipeline: Any
):
    task = replace(make_task(timetable, guidance_scale=3.0), residual_guidance=kind)
    run = pipeline(task, cut)
    assert_same(run.latents, clean(task))
    num_runs = timetable.num_blocks * sum(task.runs_at(step) for step in range(timetable.num_steps))
    assert [stage.stats.items for stage in run.stages] == [num_runs] * len(cut)
    in_flight = 2 * len(cut)
    slots = least_slots(timetable, len(cut), task.runs_at, max_in_flight=in_flight)
    assert run.stages[-1].stats.last_slot == slots


@pytest.mark.parametrize("mode", ContextMode)
def test_a_block_at_a_time_is_the_queue_of_that_stride_on_ranks(mode: Any, make_task: Any, pipeline: Any):
    queue = make_task(dualparal(7, 3, stride=3, mode=mode, **SIZES), guidance_scale=3.0)
    named = replace(queue, timetable=autoregressive(7, 3, mode=mode, **SIZES))
    assert_same(pipeline(named, (2, 2)).latents, clean(queue))


def test_stacked_guidance_without_a_negative_branch_is_split_guidance(make_task: Any, pipeline: Any):
    split = replace(make_task(TIMETABLES["queue"], guidance_scale=3.0), residual_guidance=SELF)
    stacked = replace(split, guidance_mode=GuidanceMode.STACKED)
    assert_same(pipeline(stacked, (2, 2)).latents, clean(split))


@pytest.mark.parametrize("after", [1, 2])
@pytest.mark.parametrize("kind", [ONETIME, SELF])
@timetables
def test_stopped_and_gone_on_with_other_ranks_the_latents_are_the_loops(
    timetable: Any, kind: ResidualGuidance, after: int, make_task: Any, pipeline: Any
):
    task = replace(make_task(timetable, guidance_scale=2.0), residual_guidance=kind)
    stopping = pipeline.__globals__["Watched"](stop_after=after)
    first = pipeline(task, (2, 1, 1), watched=stopping)
    (next_tick,) = stopping.states
    state = stopping.states[next_tick]
    state.lent = join_layers([saved[next_tick] for saved in first.lent])
    by_loop = LoopState()
    while by_loop.next_tick < next_tick:
        run_tick(task, by_loop)
    for index, block in by_loop.blocks.items():
        one, other = state.blocks[index].negative_BCFYX, block.negative_BCFYX
        assert (one is None) == (other is None)
        assert one is None or other is None or torch.equal(one, other)
    rest = pipeline(task, (1, 3), state=state).latents
    assert_same([*first.latents, *rest], clean(task))


def test_renders_on_ranks_leave_the_bytes_of_one_process_and_the_evidence_counts_the_runs(
    tmp_path: Path, local_ray: None, jobs: Any
):
    queue = {**SIZES, "timetable": "autoregressive", "residual_guidance": "onetime"}
    render(jobs.job(tmp_path / "one.mp4", 1, queue=queue))
    done = render(jobs.job(tmp_path / "two.mp4", 2, queue=queue))
    assert jobs.files(tmp_path / "two.job") == jobs.files(tmp_path / "one.job")
    assert done.evidence is not None
    (attempt,) = done.evidence["attempts"]
    num_blocks = len(list((tmp_path / "two.job" / "latents").iterdir()))
    assert [rank["items"] for rank in attempt["ranks"]] == [num_blocks * (3 + 1)] * 2
    assert attempt["least_slots"] <= attempt["slots"] <= 1.2 * attempt["least_slots"]
