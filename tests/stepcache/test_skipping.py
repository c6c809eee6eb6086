"""What a step cache may do to the loop: nothing at threshold zero, and the same again after a pause."""

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors.torch import save

from tests.stepcache.loops import assert_same, clean, clean_with_errors, timetables
from vidgen.denoise.lending import Lending, Lent
from vidgen.denoise.loop import LoopState, Task, run_tick
from vidgen.denoise.timetable import dualparal, full, moving_buffer, pipefusion
from vidgen.journal import _flatten, _unflatten
from vidgen.stepcache.kept import NOTHING_KEPT
from vidgen.types import GuidanceMode, ResidualGuidance

METHODS = ("tea", "taylor", "gated_taylor", "mag", "first_block")
STEPS = 6
TIMETABLES = timetables(STEPS, switch_step=3)


@pytest.mark.parametrize("timetable", TIMETABLES.values(), ids=TIMETABLES)
@pytest.mark.parametrize("method", METHODS)
def test_threshold_zero_is_bitwise_dense(method: str, timetable: Any, make_task: Any):
    zero = {"max_skips": 0} if method == "taylor" else {"threshold": 0.0}
    task = make_task(timetable, method, **zero)
    assert_same(clean(task), clean(replace(task, cache=None)))
    assert task.cache.tally.skipped == 0
    assert task.cache.tally.forwards == timetable.num_forwards


@pytest.mark.parametrize("timetable", TIMETABLES.values(), ids=TIMETABLES)
@pytest.mark.parametrize("method", METHODS)
def test_some_steps_are_skipped_and_no_first_or_last_one(method: str, timetable: Any, make_task: Any):
    task = make_task(timetable, method)
    found = clean(task)
    skipped = {step for step, count in task.cache.tally.skipped_at.items() if count}
    assert skipped and not skipped & {0, STEPS - 1, timetable.switch_step}
    assert 0 < task.cache.tally.skipped < task.cache.tally.forwards
    assert all(latents.isfinite().all() for latents in found)


@pytest.mark.parametrize("guidance_scale", [3.0], ids=str)
@pytest.mark.parametrize("stop", [3, 8])
@pytest.mark.parametrize("method", METHODS)
def test_a_job_stopped_and_resumed_makes_the_same_decisions(
    method: str, stop: int, guidance_scale: float, make_task: Any, tmp_path: Any
):
    """Through the file that a job leaves."""
    task = make_task(TIMETABLES["cache"], method, guidance_scale=guidance_scale)
    expected, skipped_at = clean(task), dict(task.cache.tally.skipped_at)
    again = make_task(TIMETABLES["cache"], method, guidance_scale=guidance_scale)
    state, found = LoopState(), []
    for _ in range(stop):
        found += [block.latents_BCFYX for block in run_tick(again, state)]
    tensors, header = _flatten(state)
    (tmp_path / "state").write_bytes(save(tensors, metadata={"state": json.dumps(header)}))
    assert_same([*found, *clean(again, _unflatten(tmp_path / "state"))], expected)
    assert dict(again.cache.tally.skipped_at) == skipped_at


def test_an_error_in_a_tick_leaves_what_is_kept_as_it_was(make_task: Any):
    task = make_task(TIMETABLES["cache"], "taylor")
    assert_same(clean_with_errors(task), clean(task))


@pytest.mark.parametrize("method", METHODS)
def test_branches_of_guidance_keep_outputs_of_their_own(method: str, make_task: Any):
    """The branches' outputs differ, and scale 1, which has no negative branch, decides the same."""
    task, state = make_task(TIMETABLES["full"], method), LoopState()
    for _ in range(3):
        run_tick(task, state)
    prompt, negative = state.blocks[0].kept.outputs[0]
    assert not torch.equal(prompt, negative)
    alone, of_one = make_task(TIMETABLES["full"], method, guidance_scale=1.0), LoopState()
    run_tick(alone, of_one)
    assert torch.equal(of_one.blocks[0].kept.outputs[0][0], _first_outputs(task)[0])


def _first_outputs(task: Task) -> tuple[torch.Tensor, ...]:
    state = LoopState()
    run_tick(task, state)
    return state.blocks[0].kept.outputs[0]


@pytest.mark.parametrize("method", METHODS)
def test_stacked_branches_are_skipped_like_split_ones(method: str, make_task: Any):
    split = make_task(TIMETABLES["recompute"], method)
    stacked = make_task(TIMETABLES["recompute"], method, options={"guidance_mode": GuidanceMode.STACKED})
    for one, other in zip(clean(split), clean(stacked), strict=True):
        assert torch.allclose(one, other, atol=1e-4 * float(other.abs().max()))
    assert stacked.cache.tally.skipped_at == split.cache.tally.skipped_at


@pytest.mark.parametrize("residual", [ResidualGuidance.SELF, ResidualGuidance.ONETIME])
def test_residual_guidance_goes_with_a_cache(residual: Any, make_task: Any):
    task = make_task(TIMETABLES["cache"], "tea", options={"residual_guidance": residual})
    assert all(latents.isfinite().all() for latents in clean(task))
    assert task.cache.tally.skipped


def test_nothing_is_kept_of_a_clean_block_nor_over_the_switch_of_experts(make_task: Any):
    timetable = full(2, STEPS, switch_step=3)
    task, state = make_task(timetable, "taylor", order=2), LoopState()
    for tick in range(STEPS):
        run_tick(task, state)
        kept = state.blocks[0].kept if state.blocks else NOTHING_KEPT
        experts_kept = {timetable.expert(step) for step in kept.steps}
        assert experts_kept <= {timetable.expert(tick)}
    assert not state.blocks


@pytest.mark.parametrize("method", ["tea", "delta"])
@pytest.mark.parametrize("change", ["prompt", "steps", "model", "size"])
def test_another_video_by_the_same_cache_is_what_it_would_be_alone(
    method: str, change: str, make_task: Any, threads: Any
):
    """State lies in the blocks of a job, so that there is nothing to reset."""
    first = make_task(TIMETABLES["recompute"], method)
    clean(first)
    second = make_task(TIMETABLES["recompute"], method)
    if change == "steps":
        second = make_task(dualparal(9, STEPS - 2, block_frames=2, context_frames=1), method)
    elif change == "size":
        second = make_task(dualparal(7, STEPS, block_frames=3, context_frames=1), method)
    elif change == "model":
        sizes = threads.denoise_tests.SIZES | {"num_layers": 3}
        model = threads.denoise_tests.redraw(type(second.model)(threads.denoise_tests.DiTConfig(**sizes)), 7)
        second = replace(second, model=model)
    else:
        text = threads.denoise_tests.random_text("another")
        second = replace(second, texts=lambda block: (text, text))
    alone = clean(replace(second, cache=make_task(TIMETABLES["full"], method).cache))
    assert_same(clean(replace(second, cache=first.cache)), alone)


def test_a_skipped_forward_lends_what_its_block_lent_when_it_last_ran():
    """The reader is told the step that it asked for; what was never lent cannot be lent again."""
    timetable = TIMETABLES["cache"]
    lending = Lending(Lent(), remembers=True)
    forward = next(f for f in timetable.forwards(6) if f.block == 1)
    lending.lent.last[1] = (forward.step - 1, dict.fromkeys(forward.lends, ()))
    lending.relend(forward)
    lending.end_tick(timetable.kept_after(6))
    assert lending.lent.for_later[1] == (forward.step, ())
    assert lending.lent.last[1][0] == forward.step - 1
    lending.lent.last[1] = (forward.step - 1, {})
    with pytest.raises(AssertionError, match="lent before"):
        lending.relend(forward)


@pytest.mark.parametrize(
    ("name", "timetable"),
    [
        ("buffer", moving_buffer(9, 4, block_frames=2, context_frames=1, stride=2)),
        ("pipefusion", pipefusion(7, 4, block_frames=2)),
    ],
)
def test_windows_of_several_blocks_know_no_cache(name: str, timetable: Any, make_task: Any):
    with pytest.raises(ValueError, match=f"timetable={name}: knows no step cache; leave cache out"):
        make_task(timetable, "tea")
