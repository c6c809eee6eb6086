"""How often the model runs at each step, and how much of it: less where a step cache leaves something out."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType

from vidgen.denoise.foreseen import foresee
from vidgen.denoise.timetable import Timetable
from vidgen.parallel.planner.work import Film
from vidgen.parallel.simulation.attempt import course_of
from vidgen.parallel.simulation.workload import WHOLE, Item, Part


@dataclass(frozen=True, slots=True)
class Steps:
    """Of each step of a block."""

    runs: tuple[int, ...]  # 0: is skipped
    parts: tuple[Part, ...]
    is_known: bool = True  # False: a cache skips more, but at which steps is not known beforehand

    @property
    def num_skipped(self) -> int:
        return self.runs.count(0)

    @property
    def num_in_part(self) -> int:
        return sum(part != WHOLE for part in self.parts)


def all_steps(timetable: Timetable, runs: int) -> Steps:
    """Every step runs all of the model so often."""
    return Steps((runs,) * timetable.num_steps, (WHOLE,) * timetable.num_steps)


def steps_of(film: Film, timetable: Timetable, runs: int) -> Steps:
    """What runs of a film, so often where it runs at all."""
    if film.cache is None:
        return all_steps(timetable, runs)
    found = foresee(
        film.cache,
        timetable,
        levels=film.levels,
        num_layers=film.dit.num_layers,
        branches=film.branches,
        tokens_per_frame=film.tokens_per_frame,
    )
    parts = zip(found.left_out, found.tokens, strict=True)
    return Steps(
        tuple(0 if skipped else runs for skipped in found.skipped),
        tuple(Part(left_out, tokens) for left_out, tokens in parts),
        found.is_known,
    )


@lru_cache(maxsize=64)
def item_counts(timetable: Timetable, steps: Steps) -> Mapping[Item, int]:
    """How often the model runs on windows of each size."""
    course = course_of(timetable, steps.runs, steps.parts)
    counts = zip(course.kinds, course.counts(), strict=True)
    return MappingProxyType({item: int(count) for item, count in counts})
