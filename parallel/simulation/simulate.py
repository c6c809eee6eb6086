"""How long a render takes on ranks that need not be here: discrete events from the engine's own timetables.

From two ranks to thousands, and hours of video, in seconds. What is exact: the order of everything that each
rank does, and what each item waits for, are those of first.py and pipeline.py; with unit times and nothing
slow, the makespan is that of slots.py. What is simplified: a sender never waits for room in its link, since
`max_in_flight` bounds what is on its way; lanes keep step item by item, at the pace of the slowest; and a
slow rank is slow for whole ticks.
"""

from collections.abc import Iterator

import numpy as np

from vidgen.denoise.timetable import Timetable
from vidgen.parallel.simulation.attempt import Attempt, Course, course_of
from vidgen.parallel.simulation.row import FAILURES, NS, Row, nanoseconds
from vidgen.parallel.simulation.workload import NONE, Faults, Item, Link, Run, Work

__all__ = ["NONE", "Faults", "Item", "Link", "Run", "Work", "simulate"]

MAX_FUTILE = 1000  # failures in a row between two saved states


def simulate(timetable: Timetable, work: Work, faults: Faults = NONE, seed: int = 0) -> Run:
    """What a render of the timetable takes. The same seed gives the same run; more faults are never faster.

    ValueError when failures come faster than states can be saved.
    """
    steps = range(timetable.num_steps)
    course = course_of(timetable, tuple(map(work.runs_at, steps)), tuple(map(work.part_at, steps)))
    row = Row(work, faults, seed, list(course.kinds))
    num_ranks = row.num_stages * work.num_lanes + work.decodes_apart
    failures = _failures(faults.failures_per_rank_hour * num_ranks, seed)
    failure = next(failures, None)
    done = _Books(course, row)
    attempt, futile = Attempt(course, row, 0, 0), 0
    while not attempt.run(failure):
        assert failure is not None
        done.add(attempt, failure)
        tick, saved_at = _saved(attempt, failure, faults.state_every)
        futile = 0 if tick > attempt.first_tick else futile + 1
        begin = failure
        while failure is not None and failure <= begin:  # ranks that start can fail too
            begin = failure + nanoseconds(faults.restart_s)
            done.restarts += 1
            failure = next(failures, None)
        if futile == MAX_FUTILE:
            raise ValueError(
                f"failures_per_rank_hour={faults.failures_per_rank_hour:g}: {num_ranks} ranks fail before "
                f"state_every={faults.state_every} ticks are done; save more often or take fewer ranks"
            )
        done.lost += begin - saved_at
        attempt = Attempt(course, row, tick, begin)
    return done.run(attempt)


class _Books:
    """What all attempts so far have come to."""

    def __init__(self, course: Course, row: Row) -> None:
        self.course, self.row = course, row
        self.block_done = np.zeros(course.timetable.num_blocks, np.int64)
        self.busy_w = np.zeros(row.num_stages, np.int64)
        self.num_done = self.items = self.restarts = self.lost = 0

    def add(self, attempt: Attempt, until: int) -> None:
        """Keep what an attempt has done by then; a block that is decoded stays so."""
        done = attempt.block_done[self.num_done : attempt.blocks_done]
        done = done[done <= until]
        self.block_done[self.num_done : self.num_done + len(done)] = done
        self.num_done += len(done)
        self.busy_w += attempt.busy_w
        self.items += attempt.items

    def run(self, last: Attempt) -> Run:
        """The whole, with the attempt that came to the end."""
        self.add(last, last.ended)
        num_stages, work, span = self.row.num_stages, self.row.work, max(last.ended, 1) * self.row.num_stages
        least_w = self.course.counts() @ self.row.stage_kw
        sizes = [work.hop_bytes] * (num_stages - 1) + [work.back_bytes if num_stages > 1 else 0]
        return Run(
            makespan_s=last.ended / NS,
            first_frame_s=int(self.block_done[0]) / NS,
            block_done_s=tuple((self.block_done / NS).tolist()),
            busy_s=tuple((self.busy_w / NS).tolist()),
            utilisation=int(least_w.sum()) / span,
            bubble_share=1 - int(self.busy_w.sum()) / span,
            bytes_per_link=tuple(self.items * size for size in sizes),
            items=self.items,
            restarts=self.restarts,
            lost_s=self.lost / NS,
        )


def _saved(attempt: Attempt, failure: int, state_every: int) -> tuple[int, int]:
    """The newest saved state before a failure: its tick, and when all it stands for was done."""
    tick = attempt.ticks_done // state_every * state_every
    while tick > attempt.first_tick:
        saved_at = int(attempt.tick_done[tick - 1])
        blocks = attempt.course.blocks_before(tick)
        if blocks > attempt.first_block:  # a state is saved after the blocks that were clean before it
            saved_at = max(saved_at, int(attempt.block_done[blocks - 1]))
        if saved_at <= failure:
            return tick, saved_at
        tick -= state_every
    return attempt.first_tick, attempt.begin


def _failures(per_hour: float, seed: int) -> Iterator[int]:
    """When ranks fail: at a higher rate these same failures, and more."""
    hour = 0
    while per_hour:
        draws = np.random.default_rng([seed, FAILURES, hour])
        times, mark = [], draws.exponential()
        while mark < per_hour:
            times.append(nanoseconds(3600 * (hour + draws.random())))
            mark += draws.exponential()
        yield from sorted(times)
        hour += 1
