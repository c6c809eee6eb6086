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

    skipped: tuple[bool, ...]
    parts: tuple[Part, ...]
    is_known: bool = True  # False: a cache skips more, but at which steps is not known beforehand

    def runs(self, each: int) -> tuple[int, ...]:
        """Of the model at each step, where a step that is not skipped has so many."""
        return tuple(0 if skipped else each for skipped in self.skipped)

    @property
    def num_skipped(self) -> int:
        return sum(self.skipped)

    @property
    def num_in_part(self) -> int:
        return sum(part != WHOLE for part in self.parts)


def all_steps(timetable: Timetable) -> Steps:
    """Every step runs all of the model."""
    return Steps((False,) * timetable.num_steps, (WHOLE,) * timetable.num_steps)


def steps_of(film: Film, timetable: Timetable) -> Steps:
    """What runs of a film."""
    if film.cache is None:
        return all_steps(timetable)
    found = foresee(
        film.cache,
        timetable,
        levels=film.levels,
        num_layers=film.dit.num_layers,
        branches=film.branches,
        tokens_per_frame=film.tokens_per_frame,
    )
    parts = zip(found.left_out, found.tokens, strict=True)
    return Steps(found.skipped, tuple(Part(left_out, tokens) for left_out, tokens in parts), found.is_known)


@lru_cache(maxsize=64)
def item_counts(timetable: Timetable, steps: Steps, runs: int) -> Mapping[Item, int]:
    """How often the model runs on windows of each size, with so many runs a step."""
    course = course_of(timetable, steps.runs(runs), steps.parts)
    counts = zip(course.kinds, course.counts(), strict=True)
    return MappingProxyType({item: int(count) for item, count in counts})
