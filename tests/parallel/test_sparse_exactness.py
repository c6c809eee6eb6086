"""Sparse attention on ranks is the loop's, bit for bit: what a policy keeps depends on (block, step)."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from vidgen.denoise.attending import Sparsity
from vidgen.denoise.lending import join_layers
from vidgen.denoise.loop import LoopState, Task, denoise, run_tick
from vidgen.denoise.timetable import Timetable, dualparal, full
from vidgen.parallel.topology import Lanes
from vidgen.sharing import check_lanes
from vidgen.sparsity.making import make_policy
from vidgen.sparsity.settings import SparsitySettings
from vidgen.types import ContextMode, GuidanceMode

# 6 tokens a frame: blocks of 4 make rows that are no multiple of anything
BLOCKS = {"query_block": 4, "key_block": 4, "dense_above": 1.0}
POLICIES: dict[str, dict[str, Any]] = {
    "adaspa": {"policy": "adaspa", "density": 0.4},
    "adaspa-recall": {"policy": "adaspa", "recall": 0.7},
    "adaspa-restore": {"policy": "adaspa", "density": 0.4, "restore": True, "restore_drift": 0.05},
    "svg2": {"policy": "svg2", "top_p": 0.5, "query_clusters": 3, "key_clusters": 4},
    "sliding-tile": {"policy": "sliding_tile", "tile": (1, 2, 2), "window": (3, 1, 1)},
    "radial": {"policy": "radial"},
    "local-restore": {"policy": "local", "radius": 1.0, "restore": True},
}
TIMETABLES: dict[str, Timetable] = {
    "queue": dualparal(11, 6, block_frames=3, context_frames=2),
    "cache-anchor": dualparal(
        11, 6, block_frames=3, context_frames=2, stride=2, mode=ContextMode.CACHE, anchor_frames=1
    ),
    "full": full(5, 5),
}


def clean(task: Task) -> list[torch.Tensor]:
    return [block.latents_BCFYX for block in denoise(task)]


def sparse(task: Task, name: str, **instead: Any) -> Task:
    policy = make_policy(SparsitySettings(**{**BLOCKS, "search_at": (0.2, 0.6), **POLICIES[name], **instead}))
    assert policy is not None
    return replace(task, sparsity=Sparsity(policy=policy))


def assert_same(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert len(found) == len(expected)
    for index, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert torch.equal(one, other), f"block {index} differs by {(one - other).abs().max()}"


@pytest.mark.parametrize("cut", [(2, 2), (1, 2, 1), (1, 1, 1, 1)], ids=str)
@pytest.mark.parametrize("timetable", TIMETABLES.values(), ids=TIMETABLES)
@pytest.mark.parametrize("name", POLICIES)
def test_any_cut_gives_the_loops_latents_bit_for_bit(
    name: str, timetable: Timetable, cut: Any, make_task: Any, pipeline: Any
):
    task = sparse(make_task(timetable, guidance_scale=3.0), name)
    expected = clean(task)
    assert task.sparsity is not None
    assert any(row["sparse"] or row["search"] for row in task.sparsity.tally.layers())
    assert_same(pipeline(sparse(task, name), cut).latents, expected)
    dense = clean(replace(task, sparsity=None))
    assert any(not torch.equal(one, other) for one, other in zip(expected, dense, strict=True))


@pytest.mark.parametrize("lanes", [Lanes(ulysses=3), Lanes(guidance=2, ulysses=2)], ids=str)
@pytest.mark.parametrize("timetable", TIMETABLES.values(), ids=TIMETABLES)
@pytest.mark.parametrize("name", ["sliding-tile", "radial", "local-restore"])
def test_windows_that_restore_nothing_are_the_loops_where_ranks_share_heads(
    name: str, timetable: Timetable, lanes: Lanes, make_task: Any, pipeline: Any
):
    task = sparse(make_task(timetable, guidance_scale=3.0), name, restore=False)
    check_lanes(task, lanes)
    expected = clean(task)
    cut = (4,) if timetable.num_blocks == 1 else (2, 2)
    found = pipeline(task, cut, lanes=lanes).latents
    for one, other in zip(found, expected, strict=True):
        assert (one - other).abs().max() <= 1e-5 * other.abs().max()
    with pytest.raises(ValueError, match="ulysses=2 with sparsity"):
        check_lanes(sparse(task, name, restore=True), Lanes(ulysses=2))
    with pytest.raises(ValueError, match="ring=2 with sparsity"):
        check_lanes(task, Lanes(ring=2))


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("timetable", TIMETABLES.values(), ids=TIMETABLES)
def test_a_policy_that_keeps_everything_is_the_dense_run_bit_for_bit(
    timetable: Timetable, name: str, make_task: Any
):
    task = make_task(timetable, guidance_scale=3.0)
    everything = {"density": 1.0} if "recall" not in name else {"recall": 1.0}
    assert_same(clean(sparse(task, name, **everything)), clean(task))


@pytest.mark.parametrize("name", ["adaspa-restore", "svg2", "local-restore"])
@pytest.mark.parametrize("after", [2, 4, 6])
def test_stopped_and_gone_on_with_other_ranks_the_latents_are_the_loops(
    name: str, after: int, make_task: Any, pipeline: Any
):
    task = sparse(make_task(TIMETABLES["queue"], guidance_scale=2.0), name)
    stopping = pipeline.__globals__["Watched"](stop_after=after)
    first = pipeline(task, (2, 1, 1), watched=stopping)
    (next_tick,) = stopping.states
    state = stopping.states[next_tick]
    state.lent = join_layers([saved[next_tick] for saved in first.lent])
    by_loop = LoopState()
    while by_loop.next_tick < next_tick:
        run_tick(task, by_loop)
    assert state.lent.attention.keys() == by_loop.lent.attention.keys()
    for block, runs in by_loop.lent.attention.items():
        for layers, expected in zip(state.lent.attention[block], runs, strict=True):
            for kept, expected_kept in zip(layers, expected, strict=True):
                assert kept.keys() == expected_kept.keys()
                assert all(torch.equal(kept[key], expected_kept[key]) for key in kept)
    rest = pipeline(task, (1, 3), state=state).latents
    assert_same([*first.latents, *rest], clean(task))


def test_what_is_kept_is_of_live_blocks_only(make_task: Any):
    task = sparse(make_task(dualparal(30, 5, block_frames=3, context_frames=2)), "adaspa-restore")
    state = LoopState()
    for tick in range(task.timetable.num_ticks):
        run_tick(task, state)
        last = [block for block in task.timetable.live(tick) if task.timetable.last_tick(block) > tick]
        assert list(state.lent.attention) == sorted(last)
    assert not state.lent.attention


def test_stacked_guidance_is_split_guidance_within_rounding(make_task: Any):
    split = sparse(make_task(TIMETABLES["queue"], guidance_scale=3.0), "adaspa")
    stacked = replace(split, guidance_mode=GuidanceMode.STACKED)
    for one, other in zip(clean(stacked), clean(split), strict=True):
        assert (one - other).abs().max() <= 1e-4 * other.abs().max()
