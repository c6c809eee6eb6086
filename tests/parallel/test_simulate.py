"""Laws of the simulator: its times are those of the rules, written plainly, and more trouble is never faster.

With unit times and nothing slow its makespan is that of slots.py, and so a closed form in the live blocks.
"""

import json
import subprocess
import sys
import time
from collections import deque
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from vidgen.denoise.timetable import Timetable, autoregressive, dualparal, full, moving_buffer, pipefusion
from vidgen.parallel.simulation import simulate as simulator
from vidgen.parallel.simulation.attempt import Attempt
from vidgen.parallel.simulation.simulate import Faults, Item, Link, Work, simulate
from vidgen.parallel.simulation.traced import work_from_trace
from vidgen.parallel.simulation.workload import Part
from vidgen.parallel.slots import least_slots
from vidgen.types import ContextMode

RECOMPUTE, CACHE = ContextMode.RECOMPUTE, ContextMode.CACHE


def units(num_stages: int, runs: int = 1, **options: Any) -> Work:
    """Every item takes every stage a second, and messages take no time."""
    return Work(stage_s=lambda item: [1.0] * num_stages, runs_at=lambda step: runs, **options)


@st.composite
def queues(draw: Any, mode: Any = None) -> Timetable:
    steps = draw(st.integers(1, 9))
    frames = draw(st.integers(1, 3))
    return dualparal(
        draw(st.integers(1, 60)), steps, block_frames=frames, context_frames=draw(st.integers(0, frames)),
        stride=draw(st.integers(1, steps)), mode=mode or draw(st.sampled_from(ContextMode)),
        anchor_frames=draw(st.integers(0, 1)),
    )  # fmt: skip


@st.composite
def works(draw: Any) -> Work:
    """Whole seconds of all kinds, so that sums are exact: uneven stages, slow links, a slow decoder.

    Some steps are skipped, some run in part.
    """
    stages = draw(st.lists(st.integers(1, 5), min_size=1, max_size=5))
    runs = draw(st.integers(1, 2))
    seconds = st.integers(0, 7)
    skipped = draw(st.sets(st.integers(1, 8)))
    partial = draw(st.sets(st.integers(1, 8)))
    return Work(
        stage_s=lambda item: [
            float(stage * item.window + item.context) * (2 - len(item.part.left_out)) for stage in stages
        ],
        runs_at=lambda step: 0 if step in skipped else runs,
        part_at=lambda step: Part(left_out=range(int(step in partial))), solver_s=draw(seconds),
        hop=Link(draw(seconds), 1.0), hop_bytes=draw(seconds), back=Link(draw(seconds), 1.0),
        back_bytes=draw(seconds), max_in_flight=draw(st.none() | st.integers(1, 12)),
        decode_s=float(6 * draw(st.integers(0, 12))), decodes_apart=draw(st.booleans()),
        queue_blocks=draw(st.none() | st.integers(1, 3)),
    )  # fmt: skip


def by_the_rules(timetable: Timetable, work: Work) -> tuple[float, list[float]]:
    """Makespan and when blocks are decoded, one event at a time as first.py and pipeline.py say it."""
    num_stages = len(work.stage_s(Item(own=1)))
    free, link_free, decoder_free = [0.0] * num_stages, [0.0] * num_stages, 0.0
    steps_done: dict[int, int] = {}
    away: deque[tuple[float, Any, bool]] = deque()
    decoded: list[float] = []

    def take() -> None:
        nonlocal decoder_free
        back, forward, is_last = away.popleft()
        free[0] = max(free[0], back) + (work.solver_s if is_last else 0)
        for block, step in forward.parts if is_last else ():
            steps_done[block] = step + 1
            if step + 1 == timetable.num_steps:
                decode_s = work.decode_s * timetable.block(block).num_frames / timetable.block_frames
                if work.decodes_apart:
                    decoder_free = max(decoder_free, free[0]) + decode_s
                else:
                    free[0] += decode_s
                decoded.append(decoder_free if work.decodes_apart else free[0])

    def has_room_at() -> float:
        late = len(decoded) - (work.queue_blocks or 10**9)
        return decoded[late] if late >= 0 and work.decodes_apart else 0

    for tick in range(timetable.num_ticks):
        if has_room_at() > free[0]:
            while away:
                take()
            free[0] = max(free[0], has_room_at())
        for forward in timetable.forwards(tick):
            before = forward.before_latents
            reads = [*forward.parts, *([(before.block, before.step)] if before else [])]
            while any(steps_done.get(block, 0) < step for block, step in reads):
                take()
            others = (forward.before_kv, forward.after_kv, forward.anchor_kv, *forward.patches_kv)
            item = Item(
                sum(timetable.block(block).num_frames for block, _ in forward.parts),
                before.num_frames if before else 0,
                sum(read.num_frames for read in others if read),
                work.part_at(forward.step),
            )
            runs = work.runs_at(forward.step)
            if not runs:  # what it says is known at once, and taken when its turn comes
                while work.max_in_flight and len(away) >= work.max_in_flight:
                    take()
                away.append((free[0], forward, True))
            for run in range(runs):
                while work.max_in_flight and len(away) >= work.max_in_flight:
                    take()
                at = 0.0
                for stage, seconds in enumerate(work.stage_s(item)):
                    free[stage] = at = max(free[stage], at) + seconds
                    if num_stages > 1:
                        is_back = stage + 1 == num_stages
                        link, size = (work.back, work.back_bytes) if is_back else (work.hop, work.hop_bytes)
                        link_free[stage] = max(link_free[stage], at) + size / link.bytes_per_s
                        at = link_free[stage] + link.latency_s
                away.append((at, forward, run + 1 == runs))
    while away:
        take()
    return max(free[0], *decoded), decoded


def closed_form(timetable: Timetable, num_stages: int, runs: int) -> int:
    """Slots: a sum over ticks of max(all items of the tick, the wait until the next tick's may follow it).

    An item is followed by the next step of the same block after all stages and the block's other runs; with
    recomputed context that also waits for the block before it, which is one forward later: with one run,
    max(live, W) and max(live, W + 1). Where a block enters in the next tick, it is first, and the others are
    one forward later than their places in this tick: they wait one forward less.
    """
    slots = 0
    for tick in range(timetable.num_ticks):
        live = len(timetable.live(tick))
        enters = enters_after(timetable, tick)
        reads = timetable.mode == RECOMPUTE and timetable.context_frames > 0 and (enters or live > 1)
        is_last = tick + 1 == timetable.num_ticks  # then everything runs out
        wait = num_stages - 1 + runs * (1 + reads - enters)
        slots += live * runs + num_stages - 1 if is_last else max(live * runs, wait)
    return slots


def enters_after(timetable: Timetable, tick: int) -> bool:
    """Whether the next tick admits a block."""
    return bool(tick + 1 < timetable.num_ticks and timetable.live(tick + 1).stop > timetable.live(tick).stop)


@given(timetable=queues(), stages=st.integers(1, 9), runs=st.integers(1, 3),
       in_flight=st.none() | st.integers(1, 20))  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_unit_times_take_the_least_slots(timetable: Any, stages: int, runs: int, in_flight: Any):
    run = simulate(timetable, units(stages, runs, max_in_flight=in_flight))
    assert run.makespan_s == least_slots(timetable, stages, runs, max_in_flight=in_flight)
    assert run.items == timetable.num_forwards * runs
    assert run.busy_s == (run.items,) * stages
    assert run.utilisation == pytest.approx(run.items / run.makespan_s)
    assert run.bubble_share == pytest.approx(1 - run.utilisation)


@given(timetable=queues(RECOMPUTE), stages=st.integers(1, 9), runs=st.integers(1, 3))
@settings(max_examples=60, deadline=None)
def test_with_recomputed_context_the_makespan_is_the_closed_form(timetable: Any, stages: int, runs: int):
    assume(timetable.context_frames)
    assert simulate(timetable, units(stages, runs)).makespan_s == closed_form(timetable, stages, runs)


@given(timetable=queues(CACHE), stages=st.integers(1, 9), runs=st.integers(1, 3))
@settings(max_examples=60, deadline=None)
def test_with_cached_context_it_is_the_closed_form_if_blocks_enter_full_stages(
    timetable: Any, stages: int, runs: int
):
    used, form = simulate(timetable, units(stages, runs)).makespan_s, closed_form(timetable, stages, runs)
    fills = [len(timetable.live(t)) * runs >= stages - 1 for t in range(timetable.num_ticks)
             if enters_after(timetable, t)]  # fmt: skip
    # else a block that enters fills a gap of the tick before, and is ahead of the form: by a gap at most
    assert form - (stages - 1) * fills.count(False) <= used <= form


@given(timetable=queues(), work=works())
@settings(max_examples=60, deadline=None)
def test_times_are_those_of_the_rules_event_by_event(timetable: Any, work: Any):
    makespan_s, decoded = by_the_rules(timetable, work)
    run = simulate(timetable, work)
    assert run.block_done_s == pytest.approx(decoded, abs=1e-6)
    assert run.makespan_s == pytest.approx(makespan_s, abs=1e-6)
    assert run.first_frame_s == run.block_done_s[0]


@pytest.mark.parametrize(
    "timetable",
    [
        full(5, 4),
        autoregressive(12, 3, block_frames=2, context_frames=1, mode=CACHE),
        moving_buffer(12, 6, block_frames=2, context_frames=1, stride=2),
        pipefusion(7, 5, block_frames=2),
        pipefusion(7, 3, block_frames=2, warm_up_steps=3),
    ],
    ids=["full", "autoregressive", "buffer", "patches", "whole-patches"],
)
@pytest.mark.parametrize("num_stages", [1, 3])
def test_every_timetable_has_the_times_of_the_rules(timetable: Any, num_stages: int):
    work = replace(units(num_stages, 2), solver_s=2, decode_s=3.0, queue_blocks=1)
    makespan_s, decoded = by_the_rules(timetable, work)
    run = simulate(timetable, work)
    assert (run.makespan_s, list(run.block_done_s)) == (makespan_s, decoded)


@given(timetable=queues(), work=works(), seed=st.integers(0, 3), rate=st.sampled_from([0.0, 0.05]))
@settings(max_examples=25, deadline=None)
def test_skipping_what_repeats_changes_nothing(timetable: Any, work: Any, seed: int, rate: float):
    timetable = replace(timetable, num_frames=timetable.num_frames * 4)
    faults = Faults(failures_per_rank_hour=rate, restart_s=5, state_every=1)
    with pytest.MonkeyPatch.context() as patch:
        skipped = simulate(timetable, work, faults, seed)
        patch.setattr(Attempt, "_skip_what_repeats", lambda *_: None)
        assert simulate(timetable, work, faults, seed) == skipped


def test_a_long_queue_is_not_worked_out_tick_by_tick(monkeypatch: pytest.MonkeyPatch):
    ticks, run_tick = [], Attempt._run_tick
    monkeypatch.setattr(Attempt, "_run_tick", lambda self: (ticks.append(self.tick), run_tick(self)))
    timetable = dualparal(10**5, 20, block_frames=1, context_frames=1)
    run = simulate(timetable, units(4))
    assert run.makespan_s == closed_form(timetable, 4, 1)
    assert len(ticks) < 200


NOISE = Faults(slow_share=0.05, slow_factor=3, slow_link_share=0.1, slow_link_factor=4, spell_ticks=3,
               failures_per_rank_hour=1.0, restart_s=20, state_every=2)  # fmt: skip
WORSE = [
    {"slow_share": 0.2}, {"slow_factor": 5}, {"slow_link_share": 0.4}, {"slow_link_factor": 8},
    {"failures_per_rank_hour": 2.0}, {"restart_s": 60},
]  # fmt: skip


def noisy(**options: Any) -> Work:
    link = Link(0.1, 100)
    return units(3, 2, hop=link, back=link, hop_bytes=40, back_bytes=20, solver_s=0.1, decode_s=2.0,
                 queue_blocks=2, max_in_flight=9, **options)  # fmt: skip


@pytest.mark.parametrize("worse", WORSE, ids=lambda worse: next(iter(worse)))
@pytest.mark.parametrize("seed", range(3))
def test_more_faults_are_never_faster(worse: dict[str, float], seed: int):
    timetable = dualparal(60, 6, block_frames=2, context_frames=1)
    work = noisy(jitter=0.2)
    bad = simulate(timetable, work, NOISE, seed)
    far_worse = simulate(timetable, work, replace(NOISE, **worse), seed)
    assert simulate(timetable, work, seed=seed).makespan_s <= bad.makespan_s <= far_worse.makespan_s
    assert all(a <= b for a, b in zip(bad.block_done_s, far_worse.block_done_s, strict=True))


def test_the_same_seed_gives_the_same_run_and_another_one_does_not():
    timetable, work = dualparal(60, 6, block_frames=2, context_frames=1), noisy(jitter=0.2)
    one, again, other = (simulate(timetable, work, NOISE, seed) for seed in (1, 1, 2))
    assert one == again
    assert one.makespan_s != other.makespan_s


def test_a_failure_costs_what_was_done_since_the_last_state(monkeypatch: pytest.MonkeyPatch):
    # a tick is a second: at 6.5 s six are done and four are saved; ranks that start fail once more at 20 s
    monkeypatch.setattr(simulator, "_failures", lambda *_: iter([6_500_000_000, 20_000_000_000]))
    run = simulate(full(1, 10), units(1), Faults(restart_s=30, state_every=4))
    assert run.makespan_s == 20 + 30 + 6
    assert run.lost_s == 20 + 30 - 4
    assert run.restarts == 2
    assert run.items == 13  # the one under way at 6.5 s is begun too
    assert run.utilisation == pytest.approx(10 / 56)


def test_jitter_keeps_the_mean_and_the_slowest_lane_sets_the_pace():
    timetable = dualparal(2000, 5, block_frames=1, context_frames=0)
    alone = simulate(timetable, units(1, jitter=0.1))
    assert alone.makespan_s == pytest.approx(timetable.num_forwards, rel=0.01)
    # the mean of the greatest of n exponentials is 1 + 1/2 + ... + 1/n
    many = simulate(timetable, units(1, jitter=0.1, num_lanes=8))
    greatest = 1 + 0.1 * (sum(1 / lane for lane in range(1, 9)) - 1)
    assert many.makespan_s == pytest.approx(greatest * timetable.num_forwards, rel=0.01)


def test_what_is_skipped_takes_no_time_and_sends_nothing():
    timetable = dualparal(24, 6, block_frames=2, context_frames=1)
    skipped = {2, 3, 5}
    half = replace(units(3, 2, hop_bytes=40), runs_at=lambda step: 0 if step in skipped else 2)
    run, whole = simulate(timetable, half), simulate(timetable, units(3, 2, hop_bytes=40))
    assert run.items * 2 == whole.items and run.busy_s == (run.items,) * 3
    assert run.bytes_per_link[0] * 2 == whole.bytes_per_link[0]
    assert run.makespan_s < 0.6 * whole.makespan_s
    alone = simulate(full(5, 6), replace(half, solver_s=1.0))  # first stage, last stage, back, and the steps
    assert alone.makespan_s == 3 * (3 + 1) + 6


def test_bytes_are_those_of_every_item_and_of_lost_ones():
    run = simulate(dualparal(12, 4, block_frames=2, context_frames=1), noisy(), NOISE)
    assert run.bytes_per_link == (run.items * 40, run.items * 40, run.items * 20)
    assert run.items >= 6 * 4 * 2


@pytest.mark.parametrize(
    ("lanes", "faults"), [(1, Faults()), (64, Faults()), (64, Faults(failures_per_rank_hour=1e-3))]
)
def test_five_hours_on_4096_ranks_take_under_ten_seconds(faults: Any, lanes: int):
    num_stages = 4096 // lanes
    timetable = dualparal(5 * 3600 * 16 // 4, 50, block_frames=8, context_frames=8)
    work = Work(
        stage_s=lambda item: [0.4 * item.window / 16 / num_stages * 40 / lanes] * num_stages,
        runs_at=lambda step: 2, solver_s=1e-3, hop=Link(1e-5, 5e10), hop_bytes=5 * 10**7,
        max_in_flight=9 * num_stages, decode_s=0.5, queue_blocks=4, num_lanes=lanes,
    )  # fmt: skip
    start = time.process_time()
    run = simulate(timetable, work, faults)
    assert time.process_time() - start < 10
    assert run.items >= timetable.num_forwards * 2 and 0 < run.utilisation <= 1


def test_the_work_of_a_trace_has_its_times(tmp_path: Path):
    timetable = dualparal(4, 2, block_frames=2, context_frames=1)
    seconds = {(0, 0): 1.0, (0, 1): 2.0, (1, 0): 3.0, (1, 1): 4.0}  # by block and rank
    rows = [
        [0, rank, tick, forward.block, forward.step, run, 0.0, seconds[forward.block, rank] + 0.5 * run]
        for tick in range(timetable.num_ticks)
        for forward in timetable.forwards(tick)
        for run in range(2)
        for rank in range(2)
    ]
    trace = tmp_path / "trace.jsonl"
    trace.write_text("".join(json.dumps(row) + "\n" for row in [["attempt"], *rows]))
    ranks = [
        # besides: 10 - 2 - 1 - 5 = 2 s in 4 forwards; and 10 - 2 - 4 - 2.4 = 1.6 s in 8 items
        {"items": 8, "began_s": 0, "ended_s": 10, "receive_wait_s": 2, "send_wait_s": 1, "busy_s": 5},
        {"items": 8, "began_s": 0, "ended_s": 10, "receive_wait_s": 2, "send_wait_s": 4, "busy_s": 2.4},
    ]
    evidence = {"attempts": [{"num_ranks": 2, "layers_per_rank": [1, 1], "ranks": ranks}]}
    work = work_from_trace(timetable, evidence, trace, hop_bytes=7)
    first, second = Item(own=2, context=1), Item(own=2, before=1)
    assert work.stage_s(first) == pytest.approx([1.25 + 1 / 8, 2.25 + 1 / 8 + 0.2])
    assert work.stage_s(second) == pytest.approx([3.25 + 1 / 8, 4.25 + 1 / 8 + 0.2])
    assert work.stage_s(Item(own=9)) == work.stage_s(second)
    assert (work.runs_at(0), work.solver_s, work.hop_bytes) == (2, 0.5, 7)
    assert 0 < work.jitter < 0.25
    evidence["attempts"][0]["cache"] = {"skipped_at": {"1": 2, "7": 2}}  # two blocks ran step 1 all the same
    work = work_from_trace(timetable, evidence, trace)
    assert [work.runs_at(step) for step in (0, 1, 7)] == [2, 2, 0]
    trace.write_text("[]\n")
    with pytest.raises(ValueError, match="trace"):
        work_from_trace(timetable, evidence, trace)


def test_failures_faster_than_states_are_an_error():
    with pytest.raises(ValueError, match="state_every"):
        simulate(full(1, 10), units(2), Faults(failures_per_rank_hour=3600, restart_s=0))


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: units(1, jitter=1.5), "jitter=1.5"),
        (lambda: units(1, max_in_flight=0), "max_in_flight=0"),
        (lambda: Faults(slow_share=2), "slow_share=2"),
        (lambda: Faults(slow_factor=0.5), "slow_factor=0.5"),
        (lambda: Link(-1, 1), "latency_s=-1"),
    ],
)
def test_a_setting_out_of_range_is_named(make: Any, name: str):
    with pytest.raises(ValueError, match=name):
        make()


def test_the_simulator_needs_no_torch():
    code = "import sys, vidgen.parallel.simulation.simulate; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
