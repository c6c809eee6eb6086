"""What is said of a cache before a render is what the loop does."""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest

from vidgen.denoise import loop
from vidgen.denoise.foreseen import Foreseen, foresee
from vidgen.denoise.skipping import regions_of, skipping_layers
from vidgen.denoise.timetable import Timetable


def foreseen(task: loop.Task) -> Foreseen:
    config = task.model.config
    return foresee(
        task.cache,
        task.timetable,
        levels=task.noise_levels,
        num_layers=config.num_layers,
        branches=task.num_branches,
        tokens_per_frame=4,
    )


@pytest.mark.parametrize("method", ["taylor", "mag"])
def test_skipped_are_the_steps_that_the_loop_skips(
    make_task: Callable[..., loop.Task], timetable: Timetable, method: str, monkeypatch: pytest.MonkeyPatch
):
    task = make_task(timetable, method)
    found: dict[int, list[bool]] = defaultdict(list)

    def decide(*given: Any) -> Any:
        decision = decided(*given)
        found[given[1].block].append(decision is not None and decision.outputs is not None)
        return decision

    decided = loop.decide
    monkeypatch.setattr(loop, "decide", decide)
    for _ in loop.denoise(task):
        pass
    told = foreseen(task)
    assert told.is_known and any(told.skipped)
    assert list(told.skipped) == found[timetable.num_blocks // 2]


def test_layers_left_out_are_those_of_the_loop(make_task: Callable[..., loop.Task], timetable: Timetable):
    task = make_task(timetable, "delta")
    left_out = skipping_layers(task)
    assert left_out is not None
    assert foreseen(task).left_out == left_out(timetable.num_blocks // 2)


def test_tokens_that_run_are_those_of_the_loop(make_task: Callable[..., loop.Task], timetable: Timetable):
    task = make_task(timetable, "region", ratio=0.25)
    regions, block = regions_of(task), timetable.num_blocks // 2
    assert regions is not None
    steps = range(timetable.num_steps)
    assert foreseen(task).tokens == tuple(0.25 if regions.only_some(block, s) else 1.0 for s in steps)


@pytest.mark.parametrize("method", ["tea", "gated_taylor", "first_block"])
def test_what_hangs_on_the_video_is_said_to_be_unknown(
    make_task: Callable[..., loop.Task], timetable: Timetable, method: str
):
    told = foreseen(make_task(timetable, method))
    assert not told.is_known and not any(told.skipped)


def test_without_a_cache_all_runs(make_task: Callable[..., loop.Task], timetable: Timetable):
    told = foreseen(make_task(timetable))
    assert told.is_known and not any(told.skipped) and set(told.tokens) == {1.0}
