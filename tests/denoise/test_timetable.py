"""Laws of the queue: what runs when, what it reads, and that every read is of something that exists."""

from collections.abc import Iterator
from dataclasses import fields, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vidgen.denoise.timetable import Forward, Lender, Read, Timetable, dualparal, full
from vidgen.types import ContextMode


@st.composite
def timetables(draw: st.DrawFn) -> Timetable:
    num_steps = draw(st.integers(1, 7))
    block_frames = draw(st.integers(1, 5))
    return dualparal(
        draw(st.integers(1, 30)),
        num_steps,
        block_frames=block_frames,
        context_frames=draw(st.integers(0, block_frames)),
        stride=draw(st.integers(1, num_steps)),
        mode=draw(st.sampled_from(ContextMode)),
        anchor_frames=draw(st.integers(0, block_frames)),
    )


def all_forwards(timetable: Timetable) -> Iterator[tuple[int, Forward]]:
    """(tick, forward) in the order they run."""
    for tick, forwards in enumerate(timetable.ticks()):
        for forward in forwards:
            yield tick, forward


def steps_done_before(timetable: Timetable, tick: int) -> dict[int, int]:
    """Steps that each block has taken when the tick begins."""
    done: dict[int, int] = {}
    for at, forward in all_forwards(timetable):
        if at < tick:
            done[forward.block] = forward.step + 1
    return done


def key_value_reads(forward: Forward) -> dict[Lender, Read]:
    reads = {
        Lender.EARLIER_BLOCK: forward.after_kv,
        Lender.LATER_BLOCK: forward.before_kv,
        Lender.ALL: forward.anchor_kv,
    }
    return {lender: read for lender, read in reads.items() if read is not None}


@given(timetables())
def test_blocks_partition_the_frames(timetable: Timetable):
    frames = []
    for index in range(timetable.num_blocks):
        block = timetable.block(index)
        assert block.index == index
        assert 1 <= block.num_frames <= timetable.block_frames
        assert block.num_frames == timetable.block_frames or index == timetable.num_blocks - 1
        frames += range(block.start, block.start + block.num_frames)
    assert frames == list(range(timetable.num_frames))


@given(timetables())
def test_each_block_takes_each_step_exactly_once_and_in_order(timetable: Timetable):
    steps: dict[int, list[int]] = {}
    for tick, forward in all_forwards(timetable):
        steps.setdefault(forward.block, []).append(forward.step)
        assert tick == timetable.stride * forward.block + forward.step
    assert steps == {block: list(range(timetable.num_steps)) for block in range(timetable.num_blocks)}
    assert timetable.num_forwards == sum(map(len, steps.values()))


@given(timetables())
def test_a_tick_runs_every_live_block_newest_first(timetable: Timetable):
    for tick, forwards in enumerate(timetable.ticks()):
        blocks = [forward.block for forward in forwards]
        assert blocks == sorted(blocks, reverse=True)
        assert sorted(blocks) == list(timetable.live(tick))
        assert blocks, "no tick is empty"


@given(timetables())
def test_there_are_as_many_ticks_as_the_last_block_needs(timetable: Timetable):
    assert len(list(timetable.ticks())) == timetable.num_ticks
    assert timetable.num_ticks == timetable.last_tick(timetable.num_blocks - 1) + 1
    assert timetable.forwards(timetable.num_ticks) == ()
    for block in range(timetable.num_blocks):
        ticks = [tick for tick, forward in all_forwards(timetable) if forward.block == block]
        assert (ticks[0], ticks[-1]) == (timetable.admission_tick(block), timetable.last_tick(block))


@given(timetables())
def test_ticks_from_the_middle_are_the_rest_of_all_ticks(timetable: Timetable):
    whole = list(timetable.ticks())
    for start in range(timetable.num_ticks + 1):
        assert list(timetable.ticks(start)) == whole[start:]


@given(timetables())
def test_number_of_live_blocks_is_dualparals_formula(timetable: Timetable):
    timetable = replace(timetable, stride=1)
    num_steps, num_blocks = timetable.num_steps, timetable.num_blocks
    for tick in range(timetable.num_ticks):
        expected = min(tick + 1, num_steps, num_blocks, num_steps + num_blocks - 1 - tick)
        assert len(timetable.live(tick)) == expected


@given(timetables())
def test_latents_are_read_as_they_stood_at_the_end_of_the_last_tick(timetable: Timetable):
    for tick, forward in all_forwards(timetable):
        if (read := forward.before_latents) is not None:
            assert read.block == forward.block - 1
            assert read.step == steps_done_before(timetable, tick)[read.block] > 0


@given(timetables())
def test_preceding_keys_are_of_the_block_before_in_the_last_tick_or_its_last_forward(timetable: Timetable):
    for tick, forward in all_forwards(timetable):
        if (read := forward.before_kv) is not None:
            assert read.block == forward.block - 1
            assert read.step == steps_done_before(timetable, tick)[read.block] - 1
            ran_at = timetable.admission_tick(read.block) + read.step
            assert ran_at == min(tick - 1, timetable.last_tick(read.block))


@given(timetables())
def test_following_keys_are_of_the_next_block_earlier_in_the_same_tick(timetable: Timetable):
    for forwards in timetable.ticks():
        ran: set[tuple[int, int]] = set()
        for forward in forwards:
            if (read := forward.after_kv) is not None:
                assert read.block == forward.block + 1
                assert (read.block, read.step) in ran
            ran.add((forward.block, forward.step))


@given(timetables())
def test_anchor_keys_are_of_the_first_blocks_last_forward_in_an_earlier_tick(timetable: Timetable):
    for tick, forward in all_forwards(timetable):
        if (read := forward.anchor_kv) is not None:
            assert (read.block, read.step) == (0, timetable.num_steps - 1)
            assert tick > timetable.last_tick(0)
        elif timetable.anchor_frames:
            assert forward.block < 2 or tick <= timetable.last_tick(0)


@given(timetables())
def test_every_key_read_is_lent_and_every_key_lent_is_read(timetable: Timetable):
    lent, read = set(), set()
    for _, forward in all_forwards(timetable):
        for lend in forward.lends:
            lent.add((lend.to, forward.block, forward.step, lend.start, lend.stop))
        for lender, kv in key_value_reads(forward).items():
            read.add((lender, kv.block, kv.step, kv.start, kv.stop))
    assert read == lent


@given(timetables())
def test_context_is_there_whenever_a_neighbour_is_and_in_its_mode_only(timetable: Timetable):
    context = timetable.context_frames
    for tick, forward in all_forwards(timetable):
        reads = {ContextMode.RECOMPUTE: forward.before_latents, ContextMode.CACHE: forward.before_kv}
        before = reads.pop(timetable.mode)
        assert list(reads.values()) == [None]
        if forward.block > 0 and context:
            assert before is not None
            assert (before.start, before.stop) == (timetable.block_frames - context, timetable.block_frames)
        else:
            assert before is None
        assert (forward.after_kv is not None) == (forward.block + 1 in timetable.live(tick) and context > 0)


@given(timetables())
def test_reads_and_lends_lie_inside_their_block(timetable: Timetable):
    for _, forward in all_forwards(timetable):
        before_latents = [forward.before_latents] if forward.before_latents else []
        for read in (*before_latents, *key_value_reads(forward).values()):
            assert 0 <= read.start < read.stop <= timetable.block(read.block).num_frames
            assert read.num_frames == read.stop - read.start
        for lend in forward.lends:
            assert 0 <= lend.start < lend.stop <= timetable.block(forward.block).num_frames


@given(timetables())
def test_kept_blocks_are_exactly_those_that_later_ticks_need(timetable: Timetable):
    """Without context one finished block more may be kept: the one before the oldest unfinished block."""
    for tick in range(timetable.num_ticks):
        done = steps_done_before(timetable, tick + 1)
        needed: set[int] = set()
        for _, forward in ((at, f) for at, f in all_forwards(timetable) if at > tick):
            reads = (forward.before_latents, forward.before_kv)
            needed |= {read.block for read in reads if read is not None} | {forward.block}
        needed &= set(done)
        kept = set(timetable.kept_after(tick))
        if timetable.context_frames:
            assert kept == needed
        else:
            assert needed <= kept <= needed | {min(needed, default=len(done)) - 1}
        assert len(kept) <= len(timetable.live(tick)) + 1
    assert not timetable.kept_after(timetable.num_ticks - 1)


def without_lends(timetable: Timetable, block: int) -> list[Forward]:
    return [replace(forward, lends=()) for _, forward in all_forwards(timetable) if forward.block == block]


@given(timetables(), st.integers(1, 30))
def test_a_blocks_reads_do_not_depend_on_how_many_blocks_follow_the_next(
    timetable: Timetable, num_frames: int
):
    other = replace(timetable, num_frames=num_frames)
    whole_blocks = min(timetable.num_frames, num_frames) // timetable.block_frames
    for block in range(whole_blocks - 1):
        assert without_lends(timetable, block) == without_lends(other, block)


def unchanged_blocks(long: Timetable, short: Timetable) -> list[int]:
    """Blocks of the shorter job whose every forward, and all it is made from, is the same in the longer one.

    Follows every read back to the forward that made what is read.
    """
    in_short = {(f.block, f.step): f for _, f in all_forwards(short)}
    changed: set[tuple[int, int]] = set()
    for _, forward in all_forwards(long):
        key = forward.block, forward.step
        twin = in_short.get(key)
        made_from = {(read.block, read.step) for read in key_value_reads(forward).values()}
        made_from.add((forward.block, forward.step - 1))
        if forward.before_latents:
            made_from.add((forward.before_latents.block, forward.before_latents.step - 1))
        same = (
            twin is not None
            and long.block(forward.block) == short.block(forward.block)
            and replace(twin, lends=()) == replace(forward, lends=())
            and not made_from & changed
        )
        if not same:
            changed.add(key)
    return [block for block in range(short.num_blocks) if (block, short.num_steps - 1) not in changed]


@given(timetables(), st.integers(1, 15))
def test_a_longer_job_changes_no_block_that_was_finished_when_the_first_new_block_enters(
    short: Timetable, more_frames: int
):
    """What follows a block flows back into it while both are live, and into nothing that is finished.

    Every other block reads what has changed; with few layers some may still come out the same.
    The first block that differs is the shorter job's last one if it is not full, else the one after it.
    """
    long = replace(short, num_frames=short.num_frames + more_frames)
    first_new = short.num_frames // short.block_frames
    enters = long.admission_tick(first_new)
    finished = [block for block in range(first_new) if short.last_tick(block) < enters]
    expected = finished if short.context_frames else list(range(first_new))
    assert unchanged_blocks(long, short) == expected


def test_full_is_a_queue_of_one_block():
    timetable = full(7, 3)
    assert timetable == dualparal(7, 3, block_frames=7, context_frames=0)
    assert list(timetable.ticks()) == [(Forward(0, step),) for step in range(3)]


GOOD = Timetable(num_frames=9, num_steps=4, block_frames=3, context_frames=2, stride=2, anchor_frames=1)


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("num_frames", 0, "at least 1"),
        ("num_steps", 0, "at least 1"),
        ("block_frames", 0, "at least 1"),
        ("context_frames", -1, "0 to 3"),
        ("context_frames", 4, "0 to 3"),
        ("stride", 0, "1 to 4"),
        ("stride", 5, "1 to 4"),
        ("anchor_frames", -2, "0 to 3"),
        ("anchor_frames", 4, "0 to 3"),
    ],
)
def test_a_bad_size_is_an_error_that_names_field_value_and_what_is_allowed(
    field: str, value: int, allowed: str
):
    assert field in {f.name for f in fields(Timetable)}
    said_as = {"num_steps": "num_inference_steps"}.get(field, field)  # the name people type
    with pytest.raises(ValueError, match=f"^{said_as}={value}: .*{allowed}$"):
        replace(GOOD, **{field: value})


def test_a_mode_read_from_a_file_as_a_plain_string_means_the_same_or_is_an_error():
    try:
        typed = replace(GOOD, mode="recompute")  # type: ignore[arg-type]
    except ValueError:
        return
    assert list(typed.ticks()) == list(replace(GOOD, mode=ContextMode.RECOMPUTE).ticks())
