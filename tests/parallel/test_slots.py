"""Laws of time in slots: what a queue needs on a row of stages, what a run really uses, and what is wasted.

A run counts slots by what its messages waited for, not by a clock, so these figures are exact.
"""

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vidgen.denoise.timetable import Timetable, dualparal, full
from vidgen.parallel.slots import least_slots
from vidgen.types import ContextMode

RECOMPUTE, CACHE = ContextMode.RECOMPUTE, ContextMode.CACHE


def queue(
    blocks: int, steps: int, mode: ContextMode = RECOMPUTE, *, context: int = 1, stride: int = 1
) -> Timetable:
    """A queue of full blocks of one frame, so that the model has little to do."""
    return dualparal(blocks, steps, block_frames=1, context_frames=context, stride=stride, mode=mode)


def short(value: Any) -> str:
    """A timetable's name in a test's id."""
    if not isinstance(value, Timetable):
        return str(value)
    return f"{value.num_blocks}-blocks-{value.num_steps}-steps-{value.mode}"


def num_items(timetable: Timetable, runs: int) -> int:
    return timetable.num_forwards * runs


def tick_bound(timetable: Timetable, tick: int, num_stages: int, runs: int) -> int:
    """The design's formula for a tick after which no block enters: max(live, W + 1), with cached context W.

    A block's next step needs its last one back: all its runs, through all stages. With recomputed context it
    also needs that of the block before it, which entered one forward later.
    """
    live = timetable.live(tick)
    waits_for_neighbour = timetable.mode == RECOMPUTE and timetable.context_frames > 0 and len(live) > 1
    return max(len(live) * runs, num_stages + runs - 1 + (runs if waits_for_neighbour else 0))


def slot_bound(timetable: Timetable, num_stages: int, runs: int, first_tick: int = 0) -> int:
    """The formula summed over all ticks."""
    return sum(tick_bound(timetable, t, num_stages, runs) for t in range(first_tick, timetable.num_ticks))


def earliest(timetable: Timetable, num_stages: int, runs: int, max_in_flight: int) -> int:
    return least_slots(timetable, num_stages, runs, max_in_flight=max_in_flight)


def slots_used(pipeline: Any, task: Any, num_stages: int, **options: Any) -> int:
    """What a run on stages of one layer counts; checked to have run every item on every stage."""
    run = pipeline(task, (1,) * num_stages, **options)
    for stage in run.stages:
        assert stage.stats.items == num_items(task.timetable, task.runs_per_forward)
    return run.stages[-1].stats.last_slot


@pytest.mark.parametrize(
    ("timetable", "num_stages", "runs", "bound", "used"),
    [
        # one block: every step goes through all stages before the next may start; runs follow one another
        (full(5, 4), 1, 1, 4, 4),
        (full(5, 4), 3, 1, 4 * 3, 4 * 3),
        (full(5, 4), 3, 2, 4 * (3 + 1), 4 * (3 + 1)),
        (queue(1, 1), 4, 2, 2 + 3, 2 + 3),
        # one stage: an item a slot, nothing to wait for
        (queue(6, 3, CACHE), 1, 1, 6 * 3, 6 * 3),
        (queue(6, 3, CACHE), 1, 2, 6 * 3 * 2, 6 * 3 * 2),
        (queue(6, 3, context=0), 1, 1, 6 * 3, 6 * 3),
        # live blocks by tick are 1 2 3 3 2 1, and two stages take two slots at least; in truth block 1 enters
        # while block 0 is away, which the bound does not count
        (queue(4, 3, CACHE), 2, 1, 2 + 2 + 3 + 3 + 2 + 2, 1 + 2 + 3 + 3 + 2 + 2),
        # two runs each: 2 4 6 6 4 2 items, a step is back after 3
        (queue(4, 3, CACHE), 2, 2, 3 + 4 + 6 + 6 + 4 + 3, 2 + 4 + 6 + 6 + 4 + 3),
        # with recomputed context a block enters when the newest one is back, and the last ones go on when
        # their neighbour is
        (queue(3, 3), 2, 1, 2 + 3 + 3 + 3 + 2, 2 + 2 + 3 + 3 + 2),
    ],
    ids=short,
)  # fmt: skip
def test_bound_and_slots_used_are_those_counted_by_hand(
    timetable: Any, num_stages: int, runs: int, bound: int, used: int
):
    assert slot_bound(timetable, num_stages, runs) == bound
    assert earliest(timetable, num_stages, runs, 2 * num_stages) == used


@pytest.mark.parametrize(
    ("mode", "context", "num_stages", "runs", "slots"),
    [
        # tick 5 of a queue of 4 blocks and 4 steps: blocks 3 and 2 are live, none enters after it
        (CACHE, 1, 2, 1, 2),  # two items fill both stages
        (CACHE, 1, 3, 1, 3),  # block 3's step is back after 3
        (RECOMPUTE, 1, 2, 1, 3),  # and block 2's, which it needs too, one later
        (RECOMPUTE, 1, 3, 1, 4),
        (RECOMPUTE, 0, 3, 1, 3),  # without context there is nothing of block 2's to wait for
        (CACHE, 1, 2, 2, 4),  # four items
        (CACHE, 1, 4, 2, 5),  # block 3's second run enters one later than its first
        (RECOMPUTE, 1, 4, 2, 7),  # block 2's second run enters three later
    ],
)
def test_a_tick_lasts_until_its_first_block_may_go_on(
    mode: Any, context: int, num_stages: int, runs: int, slots: int
):
    timetable = queue(4, 4, mode, context=context)
    assert list(timetable.live(5)) == [2, 3] and list(timetable.live(6)) == [3]
    assert tick_bound(timetable, 5, num_stages, runs) == slots


@pytest.mark.parametrize("guidance", [1.0, 3.0], ids=["one-run", "split"])
@pytest.mark.parametrize("mode", ContextMode)
@pytest.mark.parametrize("num_stages", [2, 3, 4])
def test_a_long_queue_uses_its_bounds_slots_to_within_the_number_of_stages(
    mode: Any, num_stages: int, guidance: float, make_task: Any, pipeline: Any
):
    steps = num_stages + 1  # as many live blocks as keep all stages busy and the neighbour's step in time
    timetable = queue(4 * steps, steps, mode)
    task = make_task(timetable, layers=num_stages, guidance_scale=guidance)
    runs = task.runs_per_forward
    used, bound = slots_used(pipeline, task, num_stages), slot_bound(timetable, num_stages, runs)
    assert bound - (num_stages - 1) <= used <= bound
    assert bound / used >= 0.95
    assert used >= num_items(timetable, runs) + num_stages - 1


@pytest.mark.parametrize("guidance", [1.0, 3.0], ids=["one-run", "split"])
@pytest.mark.parametrize("mode", ContextMode)
@pytest.mark.parametrize(("blocks", "steps"), [(1, 6), (2, 5), (3, 3), (4, 8), (7, 2), (12, 1)], ids=str)
def test_a_short_queue_too_is_done_within_its_bound(
    blocks: int, steps: int, mode: Any, guidance: float, make_task: Any, pipeline: Any
):
    timetable = queue(blocks, steps, mode)
    task = make_task(timetable, guidance_scale=guidance)
    used = slots_used(pipeline, task, 4)
    assert num_items(timetable, task.runs_per_forward) + 3 <= used
    assert used <= slot_bound(timetable, 4, task.runs_per_forward)


@given(
    blocks=st.integers(1, 6), steps=st.integers(1, 5), stride=st.integers(1, 3),
    context=st.integers(0, 1), mode=st.sampled_from(ContextMode), guidance=st.sampled_from([1.0, 2.0]),
    num_stages=st.integers(2, 4), in_flight=st.integers(1, 8),
)  # fmt: skip
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_item_of_a_run_starts_in_the_first_slot_in_which_it_may(
    make_task: Any, pipeline: Any, blocks: int, steps: int, stride: int, context: int, mode: Any,
    guidance: float, num_stages: int, in_flight: int,
):  # fmt: skip
    timetable = queue(blocks, steps, mode, context=context, stride=min(stride, steps))
    task = make_task(timetable, layers=num_stages, guidance_scale=guidance)
    used = slots_used(pipeline, task, num_stages, max_in_flight=in_flight)
    assert used == earliest(timetable, num_stages, task.runs_per_forward, in_flight)


@given(
    blocks=st.integers(1, 30), steps=st.integers(1, 12), stride=st.integers(1, 4), context=st.integers(0, 1),
    mode=st.sampled_from(ContextMode), runs=st.integers(1, 2), num_stages=st.integers(1, 8),
)  # fmt: skip
def test_the_earliest_start_of_every_item_is_within_the_bound_and_twice_the_stages_are_room_enough(
    blocks: int, steps: int, stride: int, context: int, mode: Any, runs: int, num_stages: int
):
    timetable = queue(blocks, steps, mode, context=context, stride=min(stride, steps))
    used = earliest(timetable, num_stages, runs, 2 * num_stages)
    assert num_items(timetable, runs) + num_stages - 1 <= used <= slot_bound(timetable, num_stages, runs)
    assert used == earliest(timetable, num_stages, runs, num_items(timetable, runs))
    if steps // min(stride, steps) > num_stages:  # live blocks enough for all stages
        assert used >= slot_bound(timetable, num_stages, runs) - (num_stages - 1)
