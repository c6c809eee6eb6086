"""Levels of speed: settings that save work at a known cost in quality, chosen from `vidgen ablate`.

`exact` leaves nothing out. Each other level fills in approximations that a job says nothing of itself; what
they cost was measured on the built-in model, and is another thing on another model.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vidgen.sparsity.settings import SparsitySettings
from vidgen.stepcache.settings import CacheSettings
from vidgen.types import ContextMode, ResidualGuidance

if TYPE_CHECKING:
    from vidgen.config import JobConfig

EXACT = "exact"


@dataclass(frozen=True, kw_only=True, slots=True)
class Level:
    """What a level sets, and the cell of tools/results/ablate_speed.json that says what it costs."""

    cache: CacheSettings
    context_mode: ContextMode
    measured: str  # against exact, at the same number of ranks

    @property
    def words(self) -> str:
        """Such as `step cache taylor, context kept`."""
        context = {ContextMode.CACHE: "kept", ContextMode.RECOMPUTE: "recomputed"}[self.context_mode]
        return f"step cache {self.cache.method}, context {context}"


LEVELS = {
    "balanced": Level(
        cache=CacheSettings(method="taylor"),
        context_mode=ContextMode.RECOMPUTE,
        measured="",
    ),
    "fast": Level(
        cache=CacheSettings(method="taylor", max_skips=3),
        context_mode=ContextMode.CACHE,
        measured="",
    ),
}


def with_level(job: "JobConfig") -> "JobConfig":
    """The job with what its level sets, and without the level: that of a later version may be another.

    ValueError in one line for `exact` with an approximation.
    """
    if job.speed is None:
        return job
    if job.speed == EXACT:
        _check_exact(job)
        return job.model_copy(update={"speed": None})
    level = LEVELS[job.speed]
    changes: dict[str, Any] = {"speed": None}
    if job.cache.method == "none":
        changes["cache"] = level.cache
    if job.queue.context_mode is None:
        changes["queue"] = job.queue.model_copy(update={"context_mode": level.context_mode})
    return job.model_copy(update=changes)


def describe(speed: str) -> str:
    """One line for people: what a level does, and what that cost where it was measured."""
    level = LEVELS[speed]
    return f"speed={speed}: {level.words}; measured on the built-in model: {level.measured}"


def _check_exact(job: "JobConfig") -> None:
    given = {
        "cache": job.cache.method if job.cache != CacheSettings() else None,
        "sparsity": job.attention.sparsity.policy if job.attention.sparsity != SparsitySettings() else None,
        "residual_guidance": (
            job.queue.residual_guidance if job.queue.residual_guidance != ResidualGuidance.NONE else None
        ),
        "static_threshold": job.queue.static_threshold,
        "timetable": "pipefusion" if job.queue.timetable == "pipefusion" else None,
    }
    for name, value in given.items():
        if value is not None:
            raise ValueError(f"speed=exact with {name}={value}, an approximation: leave one of them out")
