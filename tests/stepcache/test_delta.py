"""Delta: which layers are left out is known from the clock, and what stands for them from no other rank."""

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.stepcache.loops import clean
from vidgen.denoise.lockstep import Clips
from vidgen.denoise.loop import LoopState, Task, run_tick
from vidgen.denoise.skipping import skipping_layers
from vidgen.denoise.timetable import full, moving_buffer, pipefusion
from vidgen.parallel.topology import Lanes
from vidgen.sharing import check_lanes
from vidgen.stepcache.delta import layers_left_out
from vidgen.stepcache.settings import CacheSettings

STEPS, LAYERS = 8, 4


def plan(task: Task, block: int) -> tuple[range, ...]:
    left_out = skipping_layers(task)
    assert left_out is not None
    return left_out(block)


def by_the_clock(num_steps: int = 12, goes_on: Any = lambda ran, step: True, **settings: Any) -> list[str]:
    """Per step: `.` where all layers run, else R or F by the end that is left out."""
    resolved = CacheSettings(method="delta", **settings).resolved()
    found = layers_left_out(resolved, LAYERS, num_steps, goes_on)
    return ["." if not layers else "F" if layers.start == 0 else "R" for layers in found]


def test_rear_layers_are_left_out_first_then_front_ones_and_every_third_step_runs_all():
    # the 6th runs all since it is the first of the boundary
    assert "".join(by_the_clock(warm_up_steps=2, last_steps=1)) == "..RR.R.FF.F."
    assert "".join(by_the_clock(warm_up_steps=1, last_steps=0, boundary=1.0)) == ".RR.RR.RR.RR"
    assert "".join(by_the_clock(warm_up_steps=3, last_steps=2, boundary=0.0)) == "...FF.FF.F.."
    assert set(by_the_clock(max_skips=0)) == set(by_the_clock(layers=0.0)) == {"."}


def test_a_step_whose_changes_do_not_fit_runs_all_layers_and_is_gone_on_from():
    found = by_the_clock(warm_up_steps=1, last_steps=0, boundary=1.0, goes_on=lambda ran, step: step != 5)
    assert "".join(found) == ".RR.R.RR.RR."


@pytest.mark.parametrize(("share", "count"), [(0.1, 1), (0.25, 1), (0.5, 2), (1.0, 4)])
def test_the_share_of_layers_is_rounded_to_one_at_least(share: float, count: int):
    settings = CacheSettings(method="delta", layers=share).resolved()
    found = layers_left_out(settings, LAYERS, STEPS, lambda ran, step: True)
    assert {len(layers) for layers in found} == {0, count}


def test_layers_run_as_often_as_the_plan_says_and_less_than_dense(timetable: Any, make_task: Any):
    task, runs = make_task(timetable, "delta"), Counter[int]()
    hooks = [
        layer.register_forward_hook(lambda *_, number=number: runs.update([number]))
        for model in task.models
        for number, layer in enumerate(model.layers)
    ]
    found = clean(task)
    for hook in hooks:
        hook.remove()
    plans = [plan(task, block) for block in range(timetable.num_blocks)]
    expected = {
        number: 2 * sum(number not in layers for steps in plans for layers in steps)
        for number in range(LAYERS)
    }
    assert runs == expected
    tally = task.cache.tally
    assert runs.total() == 2 * LAYERS * (tally.forwards - tally.skipped) < 2 * LAYERS * timetable.num_forwards
    assert tally.skipped > 0.15 * tally.forwards
    dense = clean(replace(task, cache=None))
    assert all(one.isfinite().all() for one in found)
    assert any(not torch.equal(one, other) for one, other in zip(found, dense, strict=True))


def test_a_step_leaves_out_layers_only_where_its_block_lent_all_that_it_is_to_lend(
    timetable: Any, make_task: Any
):
    task = make_task(timetable, "delta", last_steps=0)
    for block in range(timetable.num_blocks):
        ran = 0
        for step, layers in enumerate(plan(task, block)):
            ran = ran if layers else step
            assert set(timetable.lends(block, step)) <= set(timetable.lends(block, ran))
            assert timetable.expert(step) == timetable.expert(ran)


def kept_at(task: Task, ticks: int) -> Any:
    """What is kept of block 0 after so many ticks: per run and layer, tensors by name."""
    state = LoopState()
    for _ in range(ticks):
        run_tick(task, state)
    return state.lent.attention[0]


def test_branches_of_guidance_keep_changes_of_their_own(timetables: Any, make_task: Any):
    """The branches' changes differ, and the prompt's is what it is without a negative branch."""
    prompt, negative = kept_at(make_task(timetables["full"], "delta"), 1)
    (alone,) = kept_at(make_task(timetables["full"], "delta", guidance_scale=1.0), 1)
    for layer in (2, 3):
        assert not torch.equal(prompt[layer]["change"], negative[layer]["change"])
        assert torch.equal(prompt[layer]["change"], alone[layer]["change"])


def test_changes_are_kept_of_the_layers_that_the_next_step_leaves_out_and_of_no_other(
    timetable: Any, make_task: Any
):
    """So memory is bounded: no block that is clean has any, and no live one more than it will read."""
    task, state = make_task(timetable, "delta"), LoopState()
    while state.next_tick < task.timetable.num_ticks:
        run_tick(task, state)
        for block, runs in state.lent.attention.items():
            step = state.next_tick - task.timetable.admission_tick(block)
            left_out = plan(task, block)[step]
            assert all(
                ("change" in kept) == (layer in left_out) for run in runs for layer, kept in enumerate(run)
            )
            lends = any(task.timetable.lends(block, at) for at in range(step))
            assert lends or not any("change_key" in kept for run in runs for kept in run)
        assert state.lent.attention.keys() <= set(task.timetable.live(state.next_tick))
        assert not state.lent.last, "there is no use for what other caches lend again"
    assert not state.lent.attention


def test_what_does_not_go_with_it_is_an_error_of_one_line(timetables: Any, make_task: Any):
    clips = Clips(num_frames=7, clip_frames=2, halo_frames=1, global_frames=2)
    with pytest.raises(ValueError, match="cache=delta with timetable=lockstep: .* take cache=taylor"):
        make_task(full(7, STEPS), "delta", options={"clips": clips})
    for name, timetable in {
        "buffer": moving_buffer(9, 4, block_frames=2, context_frames=1, stride=2),
        "pipefusion": pipefusion(7, 4, block_frames=2),
    }.items():
        with pytest.raises(ValueError, match=f"timetable={name}: knows no step cache"):
            make_task(timetable, "delta")
    for lanes in (Lanes(ulysses=2), Lanes(ring=2)):
        with pytest.raises(ValueError, match="cache=delta with ulysses=., ring=.: .* take layers on more"):
            check_lanes(make_task(timetables["cache"], "delta"), lanes)
