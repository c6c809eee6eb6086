"""When each item of a render runs on a row of stages, from a tick on and without a failure.

The rules are those of first.py: items enter in the timetable's order, and the first stage takes results, in
order, when an item needs them. So what each rank does is a queue of known order, and its times follow from
when things are at hand and how long they take. Times are whole nanoseconds, so that ticks that repeat a
pattern are seen to repeat it exactly, and the rest of the pattern needs no working out.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from vidgen.denoise.timetable import Forward, Timetable
from vidgen.parallel.simulation.row import Load, Row, Times, nanoseconds, served
from vidgen.parallel.simulation.workload import WHOLE, Item, Part

ALWAYS = -(2**61)  # at hand before anything
NEVER_SENT = -(2**40)
SKIPPED = -1  # in place of a kind: the model is not run

# n items of a tick, in order


@dataclass(frozen=True, slots=True)
class TickItems:
    """The items of a tick: what each is, and what it waits for."""

    kinds_n: Times  # which of Course.kinds, or SKIPPED
    needs_n: Times  # how many items must have come back, counted from the tick's first one: 0 or below
    ends_forward_n: NDArray[np.bool_]
    finishes_n: Times  # how many blocks are clean with its result


def item_of(timetable: Timetable, forward: Forward, part: Part = WHOLE) -> Item:
    """The size of a forward's runs."""
    before = forward.before_latents
    others = (forward.before_kv, forward.after_kv, forward.anchor_kv, *forward.patches_kv)
    return Item(
        own=sum(timetable.block(block).num_frames for block, _ in forward.parts),
        before=before.num_frames if before is not None else 0,
        context=sum(read.num_frames for read in others if read is not None),
        part=part,
    )


class Course:
    """The ticks of a timetable as items. In steady ones a tick is as the one a stride earlier was."""

    def __init__(self, timetable: Timetable, runs: Sequence[int], parts: Sequence[Part]) -> None:
        self.timetable, self.runs, self.parts = timetable, runs, parts  # of the model, of each step
        self.kinds: dict[Item, int] = {}
        steps, stride = timetable.num_steps, timetable.stride
        # from the tick after the third block has become the oldest, until the last one enters
        start = steps + stride + 1
        stop = max(start, stride * (timetable.num_blocks - 1))
        self.steady = range(start, start if timetable.is_patched else stop)
        ticks = [*range(min(start + stride, timetable.num_ticks)), *range(stop, timetable.num_ticks)]
        self._ticks = {tick: self._items(tick) for tick in ticks}

    def named(self, tick: int) -> int:
        """The first tick with the same items."""
        if tick not in self.steady:
            return tick
        return self.steady.start + (tick - self.steady.start) % self.timetable.stride

    def items(self, tick: int) -> TickItems:
        return self._ticks[self.named(tick)]

    def counts(self) -> Times:
        """How many items of each kind there are in all ticks."""
        stride, steady = self.timetable.stride, self.steady
        counts_k = np.zeros(len(self.kinds), np.int64)
        for tick, found in self._ticks.items():
            times = len(range(tick, steady.stop, stride)) if tick in steady else 1
            ran_n = found.kinds_n[found.kinds_n != SKIPPED]
            counts_k += times * np.bincount(ran_n, minlength=len(self.kinds))
        return counts_k

    def blocks_before(self, tick: int) -> int:
        """Blocks that are clean when a tick begins."""
        is_over = tick >= self.timetable.num_ticks
        return self.timetable.num_blocks if is_over else self.timetable.live(tick).start

    def _items(self, tick: int) -> TickItems:
        timetable, runs = self.timetable, self.runs
        came: dict[tuple[int, int], int] = {}  # (block, steps done) -> items of the last tick until then
        count = 0
        for forward in timetable.forwards(tick - 1) if tick else ():
            count += runs[forward.step] or 1
            came |= {(block, step + 1): count for block, step in forward.parts}
        rows = []
        for forward in timetable.forwards(tick):
            reads = list(forward.parts)
            if forward.before_latents is not None:
                reads.append((forward.before_latents.block, forward.before_latents.step))
            # what an earlier tick made has been taken: something of the last tick needed it, or newer things
            need = max(came.get(read, NEVER_SENT) for read in reads) - count
            number, num_runs = SKIPPED, runs[forward.step]
            if num_runs:
                kind = item_of(timetable, forward, self.parts[forward.step])
                number = self.kinds.setdefault(kind, len(self.kinds))
            finishes = sum(step + 1 == timetable.num_steps for _, step in forward.parts)
            for left in reversed(range(num_runs or 1)):
                rows.append((number, need, not left, 0 if left else finishes))
        kinds_n, needs_n, ends_n, finishes_n = np.array(rows, np.int64).T
        return TickItems(kinds_n, needs_n, ends_n.astype(bool), finishes_n)


@lru_cache(maxsize=32)
def course_of(timetable: Timetable, runs: tuple[int, ...], parts: tuple[Part, ...]) -> Course:
    """The course of a timetable; the same one for each of many simulations."""
    return Course(timetable, runs, parts)


class Attempt:
    """One attempt, simulated as far as asked for. Block and tick times are those so far."""

    def __init__(self, course: Course, row: Row, first_tick: int, begin: int) -> None:
        self.course, self.row, self.work, self.timetable = course, row, row.work, course.timetable
        self.tick = self.first_tick = first_tick
        self.begin = begin
        self.free, self._free_m = begin, row.idle_servers(begin)  # the first stage, the others
        self._decoder_free = begin
        self.ticks_done, self.blocks_done = first_tick, course.blocks_before(first_tick)
        self.first_block = self.blocks_done
        self.tick_done = np.zeros(self.timetable.num_ticks, np.int64)  # when all of it is taken
        self.block_done = np.zeros(self.timetable.num_blocks, np.int64)  # when it is decoded
        self.busy_w = np.zeros(row.num_stages, np.int64)
        self.items = 0
        # rows: back at, nanoseconds to take it, finished blocks, whether it ends a tick
        self._away = np.empty((4, 0), np.int64)
        self._loads: dict[tuple[int, int], Load] = {}
        last = self.timetable.block(self.timetable.num_blocks - 1).num_frames / self.timetable.block_frames
        self._decode_b = np.full(self.timetable.num_blocks, nanoseconds(self.work.decode_s))
        self._decode_b[-1] = nanoseconds(self.work.decode_s * last)
        self._solve = nanoseconds(self.work.solver_s)
        self._seen: tuple[bytes, tuple[int, ...], Times] | None = None
        self._looks, self._looks_at_most = 0, 1

    @property
    def ended(self) -> int:
        """When all is done: the last result is taken and the last block decoded."""
        return max(self.free, int(self.block_done[-1]))

    def run(self, until: int | None = None) -> bool:
        """Go on to the end, or until a time; whether it has ended by then."""
        while self.tick < self.timetable.num_ticks and (until is None or self.free <= until):
            if self.row.is_noiseless and self.tick in self.course.steady:
                self._skip_what_repeats(until)
            self._wait_for_room()
            self._run_tick()
        if self.tick < self.timetable.num_ticks:
            return False
        self._take(self._away.shape[1])
        return until is None or self.ended <= until

    def _run_tick(self) -> None:
        """All items of the next tick, in parts that no result of their own holds up."""
        tick_items = self.course.items(self.tick)
        num_items = len(tick_items.kinds_n)
        step = self.work.max_in_flight or num_items
        away_before = self._away.shape[1]
        for start in range(0, num_items, step):
            part = slice(start, min(start + step, num_items))
            load = self._load(tick_items, part)
            # results to take before each item, counted from the oldest that is away at the tick's beginning
            upto_n = tick_items.needs_n[part] + away_before
            if self.work.max_in_flight is not None:
                in_order_n = np.arange(part.start, part.stop)
                upto_n = np.maximum(upto_n, in_order_n + 1 + away_before - self.work.max_in_flight)
            taken = away_before + start - self._away.shape[1]
            ran_n = tick_items.kinds_n[part] != SKIPPED
            first_n = np.zeros(len(ran_n), np.int64)
            first_n[ran_n] = load.first_n
            back_n = self._computed(np.maximum.accumulate(np.maximum(upto_n - taken, 0)), first_n)
            back_n[ran_n] = self.row.passed(load, back_n[ran_n], self._free_m)  # others are known at once
            self._send(tick_items, part, back_n)
            self.busy_w += load.busy_w
            self.items += int(ran_n.sum())
        self.tick += 1

    def _load(self, tick_items: TickItems, part: slice) -> Load:
        if not self.row.is_noiseless:
            return self.row.load(tick_items.kinds_n, self.tick, part)
        name = self.course.named(self.tick), part.start
        if name not in self._loads:
            self._loads[name] = self.row.load(tick_items.kinds_n, self.tick, part)
        return self._loads[name]

    def _computed(self, takes_n: Times, duration_n: Times) -> Times:
        """When the first stage has computed items, each after it has taken so many results in all."""
        num_takes, num_items = int(takes_n[-1]), len(takes_n)
        at_hand, duration = np.full(num_takes + num_items, ALWAYS), np.empty(num_takes + num_items, np.int64)
        is_take = np.ones(num_takes + num_items, bool)
        is_take[np.arange(num_items) + takes_n] = False
        at_hand[is_take], duration[is_take] = self._away[:2, :num_takes]
        duration[~is_take] = duration_n
        done = served(self.free, at_hand, duration)
        self.free = int(done[-1])
        self._note(done[is_take])
        return done[~is_take]

    def _send(self, tick_items: TickItems, part: slice, back_n: Times) -> None:
        finishes_n = tick_items.finishes_n[part]
        take_n = self._solve * tick_items.ends_forward_n[part]
        if not self.work.decodes_apart:
            blocks_n = self.blocks_done + np.cumsum([*self._away[2], *finishes_n])[-len(finishes_n) :]
            until_b = np.concatenate([[0], np.cumsum(self._decode_b)])
            take_n = take_n + until_b[blocks_n] - until_b[blocks_n - finishes_n]
        ends_tick_n = np.arange(part.start, part.stop) == len(tick_items.kinds_n) - 1
        self._away = np.concatenate([self._away, [back_n, take_n, finishes_n, ends_tick_n]], axis=1)

    def _take(self, count: int) -> None:
        """Take the oldest results, with nothing else to do."""
        if count:
            done_n = served(self.free, *self._away[:2, :count])
            self.free = int(done_n[-1])
            self._note(done_n)

    def _note(self, taken_n: Times) -> None:
        """Keep books of the oldest results, which have been taken at these times."""
        count = len(taken_n)
        _, _, finishes_n, ends_tick_n = self._away[:, :count]
        self._away = self._away[:, count:]
        ticks = taken_n[ends_tick_n > 0]
        self.tick_done[self.ticks_done : self.ticks_done + len(ticks)] = ticks
        self.ticks_done += len(ticks)
        clean = np.repeat(taken_n, finishes_n)
        if len(clean):
            blocks = slice(self.blocks_done, self.blocks_done + len(clean))
            self.block_done[blocks] = self._decoded(clean) if self.work.decodes_apart else clean
            self.blocks_done = blocks.stop

    def _decoded(self, clean_b: Times) -> Times:
        decode_b = self._decode_b[self.blocks_done : self.blocks_done + len(clean_b)]
        done_b = served(self._decoder_free, clean_b, decode_b)
        self._decoder_free = int(done_b[-1])
        return done_b

    def _wait_for_room(self) -> None:
        """Let the first stage wait until few enough finished blocks wait for the decoder."""
        if not self.work.decodes_apart or self.work.queue_blocks is None:
            return
        if self._room_at() > self.free:
            self._take(self._away.shape[1])
            self.free = max(self.free, self._room_at())

    def _room_at(self) -> int:
        block = self.blocks_done - (self.work.queue_blocks or 0)
        return int(self.block_done[block]) if block >= self.first_block else self.begin

    def _skip_what_repeats(self, until: int | None) -> None:
        """Where this tick finds everything as an earlier one did, add whole periods of what lies between.

        An earlier state is kept until twice as many ticks have gone by (Brent's cycle search).
        """
        if (self.tick - self.course.steady.start) % self.timetable.stride:
            return
        state, counts = self._state()
        if self._seen is not None and state == self._seen[0]:
            self._add_periods(counts, until)
        elif self._looks == self._looks_at_most or self._seen is None:
            self._seen = state, counts, self.busy_w.copy()
            self._looks, self._looks_at_most = 0, 2 * self._looks_at_most
        self._looks += 1

    def _state(self) -> tuple[bytes, tuple[int, ...]]:
        """What decides how it goes on, with times counted from now; and what has been counted so far."""
        recent = self.block_done[max(self.blocks_done - (self.work.queue_blocks or 0), 0) : self.blocks_done]
        times = [self._free_m, self._away[0], recent, [self._decoder_free]]
        lag = self.tick // self.timetable.stride - self.blocks_done, self.tick - self.ticks_done
        state = np.concatenate([np.concatenate(times) - self.free, self._away[1:].ravel(), lag])
        return state.tobytes(), (self.tick, self.free, self.ticks_done, self.blocks_done, self.items)

    def _add_periods(self, counts: tuple[int, ...], until: int | None) -> None:
        assert self._seen is not None
        ticks, period, ticks_done, blocks, items = np.subtract(counts, self._seen[1]).tolist()
        times = (self.course.steady.stop - self.tick) // ticks
        if until is not None:
            times = min(times, (until - self.free) // max(period, 1))
        if times < 1:
            return
        shift = period * np.arange(1, times + 1)[:, None]
        for done, count, per_period in (
            (self.tick_done, self.ticks_done, ticks_done),
            (self.block_done, self.blocks_done, blocks),
        ):
            more = done[count - per_period : count] + shift
            done[count : count + more.size] = more.ravel()
        self.tick += times * ticks
        self.ticks_done += times * ticks_done
        self.blocks_done += times * blocks
        self.items += times * items
        self.busy_w += times * (self.busy_w - self._seen[2])
        self.free += times * period
        self._free_m += times * period
        self._decoder_free += times * period
        self._away[0] += times * period
