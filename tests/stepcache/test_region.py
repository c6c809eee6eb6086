"""Regions: which tokens run is decided once, on the first rank, and the same whatever ran where."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.stepcache.loops import clean
from vidgen.denoise.attending import Sparsity
from vidgen.denoise.lockstep import Clips
from vidgen.denoise.loop import LoopState, run_tick
from vidgen.denoise.skipping import regions_of
from vidgen.denoise.timetable import full, moving_buffer
from vidgen.model.context import KeyValue
from vidgen.model.region import Region
from vidgen.parallel.topology import Lanes
from vidgen.sharing import check_lanes
from vidgen.sparsity.making import make_policy
from vidgen.sparsity.settings import SparsitySettings
from vidgen.stepcache.region import choose, mix, steps_of_regions, tokens_that_run, wish
from vidgen.stepcache.settings import CacheSettings

STEPS = 8
PATCH = (2, 3)


def by_the_clock(goes_on: Any = lambda step: True, **given: Any) -> str:
    """Per step of 12: `.` where all tokens run, else r."""
    resolved = CacheSettings(method="region", **given).resolved()
    return "".join("r" if region else "." for region in steps_of_regions(resolved, 12, goes_on))


def test_after_so_many_regions_a_step_runs_whole():
    assert by_the_clock(warm_up_steps=2, last_steps=1, max_skips=3) == "..rrr.rrr.r."
    assert by_the_clock(warm_up_steps=1, last_steps=0, max_skips=1) == ".r.r.r.r.r.r"
    assert by_the_clock(warm_up_steps=1, max_skips=3, goes_on=lambda step: step != 3) == ".rr.rrr.rrr."
    assert set(by_the_clock(max_skips=0)) == set(by_the_clock(ratio=1.0)) == {"."}


@settings(max_examples=60, deadline=None)
@given(
    ratio=st.floats(0, 1), highest=st.floats(0, 1), frames=st.integers(1, 4), tokens=st.integers(1, 20),
    seed=st.integers(0, 999),
)  # fmt: skip
def test_as_many_tokens_of_every_frame_are_chosen_from_a_run_of_their_ranks(
    ratio: float, highest: float, frames: int, tokens: int, seed: int
):
    given_settings = CacheSettings(method="region", ratio=ratio, highest=highest).resolved()
    wish_FS = torch.rand(frames, tokens, generator=torch.Generator().manual_seed(seed))
    active_FS = choose(given_settings, wish_FS)
    count = tokens_that_run(given_settings, tokens)
    assert count >= 1 and active_FS.sum(1).tolist() == [count] * frames
    for wishes, chosen in zip(wish_FS, active_FS.bool(), strict=True):
        above = int((wishes[~chosen] > wishes[chosen].max()).sum())
        between = (wishes > wishes[chosen].min()) & (wishes < wishes[chosen].max()) & ~chosen
        assert not between.any() and abs(above - (tokens - count) * highest) <= 0.5 + 1e-9
    region = Region.of(active_FS)
    assert torch.equal(region.active_FS, active_FS)
    whole = torch.rand(2, frames, tokens, 3)
    assert torch.equal(region.fill(whole, region.cut(whole)), whole)


def test_a_token_is_wanted_for_what_there_is_to_say_of_it_and_for_how_long_it_was_left_out():
    said = torch.zeros(1, 5, 2, 4, 6)  # of 2 frames, 2 by 2 tokens
    said[0, :, 1, 2:, :3] = torch.arange(5.0)[:, None, None]  # token 2 of frame 1 differs between channels
    idle = torch.zeros(2, 4)
    found = wish(said, idle, PATCH)
    assert found[1].argmax() == 2 and found.count_nonzero() == 1
    idle[1, 2] = 7
    assert wish(said, idle, PATCH)[1, 2] > 1.9 * found[1, 2]


def test_outputs_are_new_where_tokens_ran_and_old_elsewhere():
    new, old = torch.ones(1, 3, 2, 4, 6), torch.zeros(1, 3, 2, 4, 6)
    active = torch.tensor([[1.0, 0, 0, 0], [0, 0, 1.0, 1.0]])
    found = mix(active, new, old, PATCH)
    assert found[0, 0, 0].nonzero().tolist() == [[row, column] for row in (0, 1) for column in (0, 1, 2)]
    assert found[0, 2, 1, 2:].all() and not found[0, 2, 1, :2].any()


def test_keys_of_a_window_are_new_where_tokens_ran_behind_frames_that_did_not():
    region = Region.of(torch.tensor([[0.0, 1, 1], [1, 0, 1]]), frames_before=1)
    stale = KeyValue(torch.zeros(1, 3, 3, 2, 4), torch.zeros(1, 3, 3, 2, 4))
    own = KeyValue(torch.ones(1, 2, 2, 2, 4), torch.full((1, 2, 2, 2, 4), 2.0))
    window = region.window(stale, own)
    assert window.key_BFSHD[0, :, :, 0, 0].tolist() == [[0, 0, 0], [0, 1, 1], [1, 0, 1]]
    assert window.value_BFSHD[0, :, :, 1, 3].tolist() == [[0, 0, 0], [0, 2, 2], [2, 0, 2]]
    turns = torch.arange(9.0).view(9, 1, 1)
    assert region.turns(turns).flatten().tolist() == [4, 5, 6, 8]


def test_layers_see_so_many_tokens_as_the_clock_says(timetable: Any, make_task: Any):
    task, seen = make_task(timetable, "region"), list[int]()
    hooks = [
        model.layers[1].register_forward_pre_hook(lambda _, given: seen.append(given[0].shape[2]))
        for model in task.models
    ]
    found = clean(task)
    for hook in hooks:
        hook.remove()
    regions, tokens = regions_of(task), max(seen)
    assert regions is not None
    steps = [(block, step) for block in range(timetable.num_blocks) for step in range(timetable.num_steps)]
    expected = [regions.count(tokens) if regions.only_some(*at) else tokens for at in steps for _ in range(2)]
    assert sorted(seen) == sorted(expected) and min(seen) < tokens
    skipped = sum(1 - count / tokens for count in expected) / 2
    assert task.cache.tally.skipped == pytest.approx(skipped)
    dense = clean(replace(task, cache=None))
    assert all(one.isfinite().all() for one in found)
    assert any(not torch.equal(one, other) for one, other in zip(found, dense, strict=True))


def test_what_the_next_step_needs_is_kept_and_nothing_else(timetable: Any, make_task: Any):
    """So memory is bounded: no block that is clean has any, and no live one more than it will read."""
    task, state = make_task(timetable, "region"), LoopState()
    regions = regions_of(task)
    assert regions is not None
    while state.next_tick < task.timetable.num_ticks:
        run_tick(task, state)
        for block, runs in state.lent.attention.items():
            step = state.next_tick - task.timetable.admission_tick(block)
            is_read, last = regions.only_some(block, step), task.model.config.num_layers - 1
            for run in runs:
                assert all(("window_key" in kept) == is_read for kept in run)
                assert [("own_tokens" in kept) for kept in run] == [False] * last + [is_read]
        assert state.lent.attention.keys() <= set(task.timetable.live(state.next_tick))
        assert not state.lent.last, "there is no use for what other caches lend again"
    assert not state.lent.attention


def test_more_tokens_are_nearer_to_all(timetables: Any, make_task: Any):
    """On average over prompts' noise: errors fall as the share of tokens that run grows."""
    errors = dict.fromkeys((0.25, 0.5, 0.75), 0.0)
    for seed in range(4):
        task = make_task(timetables["full"], "region", seed=seed)
        (dense,) = clean(replace(task, cache=None))
        for ratio in errors:
            (found,) = clean(make_task(timetables["full"], "region", seed=seed, ratio=ratio))
            errors[ratio] += float((found - dense).norm() / dense.norm())
    assert sorted(errors, key=errors.__getitem__) == [0.75, 0.5, 0.25]


def test_what_does_not_go_with_it_is_an_error_of_one_line(timetables: Any, make_task: Any):
    clips = Clips(num_frames=7, clip_frames=2, halo_frames=1, global_frames=2)
    with pytest.raises(ValueError, match="cache=region with timetable=lockstep: .* take cache=taylor"):
        make_task(full(7, STEPS), "region", options={"clips": clips})
    buffer = moving_buffer(9, 4, block_frames=2, context_frames=1, stride=2)
    with pytest.raises(ValueError, match="timetable=buffer: knows no step cache"):
        make_task(buffer, "region")
    for lanes in (Lanes(ulysses=2), Lanes(ring=2)):
        with pytest.raises(ValueError, match="cache=region with ulysses=., ring=.: .* take layers on more"):
            check_lanes(make_task(timetables["cache"], "region"), lanes)
    policy = make_policy(SparsitySettings(policy="local", query_block=4, key_block=4))
    assert policy is not None
    with pytest.raises(ValueError, match="cache=region with sparsity: .* leave one of both out"):
        make_task(timetables["cache"], "region", options={"sparsity": Sparsity(policy=policy)})
