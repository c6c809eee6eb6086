"""Caches that leave out layers or tokens of a step: the same whatever ran where, and after a pause."""

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors.torch import save

from tests.stepcache.loops import assert_same, clean, clean_with_errors
from vidgen.denoise.attending import Sparsity
from vidgen.denoise.loop import LoopState, Task, run_tick
from vidgen.journal import _flatten, _unflatten
from vidgen.parallel.topology import Lanes
from vidgen.sparsity.making import make_policy
from vidgen.sparsity.settings import SparsitySettings
from vidgen.types import GuidanceMode, ResidualGuidance

METHODS = ("delta", "region")
CUTS = [(4,), (2, 2), (1, 2, 1), (1, 1, 1, 1)]
GUIDANCE: tuple[dict[str, Any], ...] = (
    {"guidance_mode": GuidanceMode.STACKED},
    {"residual_guidance": ResidualGuidance.ONETIME},
    {"residual_guidance": ResidualGuidance.SELF},
)
RESTORING = SparsitySettings(
    policy="adaspa", density=0.4, restore=True, query_block=4, key_block=4, dense_above=1.0,
    search_at=(0.2, 0.6),
)  # fmt: skip


@pytest.mark.parametrize(
    ("method", "nothing"),
    [
        ("delta", {"max_skips": 0}), ("delta", {"layers": 0.0}),
        ("region", {"max_skips": 0}), ("region", {"ratio": 1.0}),
    ],
    ids=str,
)  # fmt: skip
def test_nothing_left_out_is_bitwise_dense(
    method: str, nothing: dict[str, Any], timetable: Any, make_task: Any
):
    task = make_task(timetable, method, **nothing)
    assert_same(clean(task), clean(replace(task, cache=None)))
    assert task.cache.tally.skipped == 0
    assert task.cache.tally.forwards == timetable.num_forwards


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_any_number_of_ranks_gives_the_loops_latents_bit_for_bit(
    method: str, timetable: Any, cut: Any, make_task: Any, threads: Any
):
    task = make_task(timetable, method)
    expected = clean(task)
    run = threads.run_pipeline(task, cut)
    assert_same(run.latents, expected)
    first = run.stages[0]
    assert first.tally.as_dict() == task.cache.tally.as_dict()
    assert first.tally.skipped > 0
    assert all(not stage.lending.lent.attention for stage in run.stages), "nothing is left of a clean block"


@pytest.mark.parametrize(
    ("method", "options"),
    [
        *((method, options) for method in METHODS for options in GUIDANCE),
        ("delta", {"sparsity": RESTORING}),  # region knows dense attention only
    ],
    ids=str,
)
def test_with_other_settings_too_ranks_give_the_loops_latents(
    method: str, options: Any, timetables: Any, make_task: Any, threads: Any
):
    def fresh() -> Task:
        if "sparsity" not in options:
            return make_task(timetables["cache"], method, options=options)
        policy = make_policy(options["sparsity"])
        assert policy is not None
        return make_task(timetables["cache"], method, options={"sparsity": Sparsity(policy=policy)})

    assert_same(threads.run_pipeline(fresh(), (2, 1, 1)).latents, clean(fresh()))


@pytest.mark.parametrize("method", METHODS)
def test_lanes_of_guidance_give_the_loops_latents(method: str, timetables: Any, make_task: Any, threads: Any):
    task = make_task(timetables["recompute"], method)
    assert_same(threads.run_pipeline(task, (2, 2), lanes=Lanes(guidance=2)).latents, clean(task))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("after", [(2, 2), (1, 1, 1, 1)], ids=str)
@pytest.mark.parametrize("before", [Lanes(), Lanes(guidance=2)], ids=str)
@pytest.mark.parametrize("stop", [3, 4, 8])
def test_stopped_on_some_ranks_and_gone_on_with_others_the_latents_are_the_loops(
    method: str, stop: int, before: Any, after: Any, timetables: Any, make_task: Any, threads: Any
):
    task = make_task(timetables["cache"], method)
    expected = clean(task)
    stopping = threads.Watched(stop_after=stop)
    first = threads.run_pipeline(task, (3, 1), lanes=before, watched=stopping)
    (next_tick,) = stopping.states
    second = threads.run_pipeline(task, after, state=first.state(next_tick))
    assert_same([*first.latents, *second.latents], expected)
    skipped = first.stages[0].tally.skipped_at + second.stages[0].tally.skipped_at
    assert skipped == +task.cache.tally.skipped_at


@pytest.mark.parametrize("method", METHODS)
def test_a_job_stopped_anywhere_and_resumed_from_its_file_is_the_same(
    method: str, timetable: Any, make_task: Any, tmp_path: Any
):
    task = make_task(timetable, method)
    expected, skipped_at = clean(task), task.cache.tally.skipped_at
    again, state, found = make_task(timetable, method), LoopState(), list[torch.Tensor]()
    while state.next_tick < task.timetable.num_ticks:
        found += [block.latents_BCFYX for block in run_tick(again, state)]
        tensors, header = _flatten(state)
        (tmp_path / "state").write_bytes(save(tensors, metadata={"state": json.dumps(header)}))
        state = _unflatten(tmp_path / "state")
    assert_same(found, expected)
    assert again.cache.tally.skipped_at == skipped_at


@pytest.mark.parametrize("method", METHODS)
def test_an_error_in_a_tick_leaves_what_is_kept_as_it_was(method: str, timetables: Any, make_task: Any):
    task = make_task(timetables["cache"], method)
    assert_same(clean_with_errors(task), clean(task))
