"""What holds of every timetable: each step of each block once, and after all that it reads."""

from dataclasses import replace
from typing import Any

from hypothesis import example, given, settings
from hypothesis import strategies as st

from vidgen.denoise.forwards import Forward, Read
from vidgen.denoise.lockstep import Clips
from vidgen.denoise.timetable import (
    Timetable,
    autoregressive,
    dualparal,
    fifo,
    full,
    moving_buffer,
    pipefusion,
)
from vidgen.types import ContextMode

NAMES = ("full", "lockstep", "pipefusion", "fifo", "dualparal", "autoregressive", "buffer")


@st.composite
def timetables(draw: st.DrawFn) -> Timetable:
    name = draw(st.sampled_from(NAMES))
    frames, steps, block = draw(st.integers(1, 25)), draw(st.integers(1, 7)), draw(st.integers(1, 6))
    switch = draw(st.none() | st.integers(0, steps)) if name != "buffer" else None
    if name in ("full", "lockstep"):
        return full(frames, steps, switch_step=switch)
    if name == "pipefusion":
        warm_up = draw(st.integers(1, 8))
        return pipefusion(frames, steps, block_frames=block, warm_up_steps=warm_up, switch_step=switch)
    block = 1 if name == "fifo" else block
    sizes: dict[str, Any] = {"context_frames": draw(st.integers(0, block))}
    stride = draw(st.integers(1, steps))
    if name == "buffer":
        return moving_buffer(frames, steps, block_frames=block, stride=stride, **sizes)
    sizes |= {"mode": draw(st.sampled_from(ContextMode)), "anchor_frames": draw(st.integers(0, block))}
    sizes["switch_step"] = switch
    if name == "fifo":
        return fifo(frames, steps, stride=stride, **sizes)
    if name == "autoregressive":
        return autoregressive(frames, steps, block_frames=block, **sizes)
    return dualparal(frames, steps, block_frames=block, stride=stride, **sizes)


def key_value_reads(forward: Forward) -> list[Read]:
    reads = (forward.before_kv, forward.after_kv, forward.anchor_kv, *forward.patches_kv)
    return [read for read in reads if read is not None]


def lent_by(timetable: Timetable, forward: Forward) -> set[Read]:
    """What a forward lends, as others read it: counted from the start of each block."""
    lent: set[Read] = set()
    first = timetable.block(forward.block).start
    for lend in forward.lends:
        block, step = forward.parts[lend.part]
        offset = timetable.block(block).start - first
        lent.add(Read(block, step, lend.start - offset, lend.stop - offset))
    return lent


# in the last forward of a block the second expert is at work, when the next one begins still the first
LATE_SWITCH = autoregressive(
    5, 4, block_frames=2, context_frames=1, mode=ContextMode.CACHE, switch_step=2
)  # fmt: skip


@given(timetables())
@example(LATE_SWITCH)
@settings(max_examples=100, deadline=None)
def test_each_block_takes_each_step_once_after_the_versions_that_it_reads(timetable: Timetable):
    done = dict.fromkeys(range(timetable.num_blocks), 0)
    lent: set[Read] = set()
    num_forwards = 0
    for tick, forwards in enumerate(timetable.ticks()):
        at_start = dict(done)
        assert forwards, "no tick is empty"
        for forward in forwards:
            num_forwards += 1
            read = forward.before_latents
            if read is not None:
                assert at_start[read.block] == read.step
                assert 0 <= read.start < read.stop <= timetable.block(read.block).num_frames
            assert set(key_value_reads(forward)) <= lent
            for block, step in forward.parts:
                assert done[block] == at_start[block] == step  # once, in order, once a tick
                assert tick == timetable.admission_tick(block) + step
                done[block] = step + 1
            lent |= lent_by(timetable, forward)
    assert set(done.values()) == {timetable.num_steps}
    assert num_forwards == timetable.num_forwards


def test_what_a_block_lent_last_serves_all_steps_of_the_next_one_by_the_same_expert(task: Any, latents: Any):
    first = task(replace(LATE_SWITCH, switch_step=None))
    made = replace(first, timetable=LATE_SWITCH, second_model=first.model)
    assert len(latents(made)) == 3
    read = {f.step for tick in LATE_SWITCH.ticks() for f in tick if f.before_kv}
    assert read == {2, 3}


@given(timetables())
@settings(max_examples=100, deadline=None)
def test_blocks_are_finished_in_order(timetable: Timetable):
    finished = [
        block
        for forwards in timetable.ticks()
        for block in sorted(
            block for f in forwards for block, step in f.parts if step + 1 == timetable.num_steps
        )
    ]
    assert finished == list(range(timetable.num_blocks))


@given(timetables())
@settings(max_examples=100, deadline=None)
def test_nothing_is_lent_that_nobody_reads(timetable: Timetable):
    """Experts read nothing of one another; there a block may lend what the one after it cannot use."""
    forwards = [forward for tick in timetable.ticks() for forward in tick]
    read = {read for forward in forwards for read in key_value_reads(forward)}
    lent = {read for forward in forwards for read in lent_by(timetable, forward)}
    assert read <= lent
    if timetable.switch_step is None or timetable.is_patched:
        assert read == lent


@given(timetables())
@settings(max_examples=100, deadline=None)
def test_what_later_ticks_need_is_kept(timetable: Timetable):
    for tick in range(timetable.num_ticks - 1):
        kept = timetable.kept_after(tick)
        for forward in timetable.forwards(tick + 1):
            begun = {block for block, step in forward.parts if step}
            reads = (forward.before_latents, forward.before_kv)
            begun |= {read.block for read in reads if read is not None}
            begun |= {read.block for read in forward.patches_kv if read.step <= tick}
            assert begun <= set(kept)
    assert not timetable.kept_after(timetable.num_ticks - 1)


@given(st.integers(1, 25), st.integers(1, 7), st.integers(1, 6), st.integers(0, 6), st.integers(0, 6))
def test_in_lock_step_each_clip_takes_each_step_once(frames: int, steps: int, clip: int, halo: int, far: int):
    """Its timetable is `full`: one forward is a step of all clips."""
    clips = Clips(num_frames=frames, clip_frames=clip, halo_frames=halo, global_frames=far)
    timetable = full(frames, steps)
    taken = [
        (frame, forward.step)
        for forwards in timetable.ticks()
        for forward in forwards
        for index in range(clips.num_clips)
        for frame in clips.own(index)
    ]
    assert taken == [(frame, step) for step in range(steps) for frame in range(frames)]
