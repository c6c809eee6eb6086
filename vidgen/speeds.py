"""Levels of speed: settings that save work at a known cost in quality, chosen from `vidgen ablate`.

`exact` leaves nothing out. Each other level fills in approximations that a job says nothing of itself; what
they cost was measured on the built-in model, and is another thing on another model.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vidgen.sparsity.settings import SparsitySettings
from vidgen.stepcache.settings import CacheSettings
from vidgen.types import GuidanceMode, Recommended, ResidualGuidance

if TYPE_CHECKING:
    from vidgen.config import JobConfig

EXACT = "exact"


@dataclass(frozen=True, kw_only=True, slots=True)
class Level:
    """What a level sets, and what it costs by configs/ablate_speed.yaml (tools/results/ablate_speed.json)."""

    measured: str  # against exact, on the same ranks
    cache: CacheSettings
    residual_guidance: ResidualGuidance = ResidualGuidance.NONE
    longer_blocks: int = 1  # times the model's recommended ones
    blocks_at_once: int | None = None  # in the queue; None: as many as there are steps

    @property
    def words(self) -> str:
        """What it does, for people."""
        parts = [f"step cache {self.cache.method}"]
        if self.longer_blocks > 1:
            parts.append(f"blocks {self.longer_blocks} times as long")
        if self.blocks_at_once is not None:
            parts.append(f"{self.blocks_at_once} of them at once")
        if self.residual_guidance != ResidualGuidance.NONE:
            parts.append(f"residual guidance {self.residual_guidance.value}")
        return ", ".join(parts)


# `mag` is a little quicker than `taylor` at the same quality, but must be calibrated for each model
LEVELS = {
    "balanced": Level(
        measured="2.0 times as quick, 68/72 windows right (exact 66/72), 29 dB from the exact video",
        cache=CacheSettings(method="taylor"),
    ),
    "fast": Level(
        measured="4.5 times as quick, 70/72 windows right (exact 66/72); another video than the exact one",
        cache=CacheSettings(method="taylor"),
        residual_guidance=ResidualGuidance.ONETIME,
        longer_blocks=2,
        blocks_at_once=4,
    ),
}


def with_level(job: "JobConfig", recommended: Recommended) -> "JobConfig":
    """The job with what its level sets, and without the level: that of a later version may be another.

    ValueError in one line for `exact` with an approximation.
    """
    if job.speed is None:
        return job
    if job.speed == EXACT:
        _check_exact(job)
        return job.model_copy(update={"speed": None})
    level, queue = LEVELS[job.speed], job.queue
    changes: dict[str, Any] = {}
    one_by_one = job.parallel.guidance == 1 and queue.guidance == GuidanceMode.SPLIT
    if queue.residual_guidance == ResidualGuidance.NONE and one_by_one:  # else both branches run at once
        changes["residual_guidance"] = level.residual_guidance
    if queue.block_frames is None and level.longer_blocks > 1 and queue.timetable != "fifo":
        changes["block_frames"] = level.longer_blocks * recommended.block_frames
    if queue.timetable in (None, "dualparal") and queue.stride == 1 and level.blocks_at_once:
        num_steps = job.num_inference_steps or recommended.num_inference_steps
        changes["stride"] = max(1, num_steps // level.blocks_at_once)
    cache = job.cache if job.cache.method != "none" else level.cache
    return job.model_copy(update={"speed": None, "cache": cache, "queue": queue.model_copy(update=changes)})


def describe(speed: str) -> str:
    """One line for people: what a level does, and what that cost where it was measured."""
    level = LEVELS[speed]
    return f"speed={speed}: {level.words}; on the built-in model {level.measured}"


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
