"""Sizes of published models by name, for planning without a checkpoint at hand."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from vidgen.config import JobConfig
from vidgen.denoise.guidance import num_branches
from vidgen.denoise.schedule import noise_levels
from vidgen.model.dit import DiTConfig
from vidgen.parallel.planner.schemes import Scheme, schemes
from vidgen.parallel.planner.work import Film
from vidgen.sharing import closed_axes, known_to
from vidgen.stepcache.cache import make_cache
from vidgen.types import ContextMode, GuidanceMode


@dataclass(frozen=True, kw_only=True, slots=True)
class Known:
    """A model and what its videos are by default: pixel sizes, and latent frames of a block."""

    dit: DiTConfig
    height: int = 480
    width: int = 832
    num_frames: int = 81
    num_steps: int = 50
    guidance_scale: float = 5.0
    block_frames: int = 8  # as DualParal recommends for Wan (arXiv 2505.21070)
    context_frames: int = 8
    strides: tuple[int, int] = (4, 8)  # pixel frames per latent frame, pixels per latent row
    text_tokens: int = 512
    shift: float = 5.0  # of noise levels


KNOWN = {
    "wan-1.3b": Known(dit=DiTConfig(dtype="bf16")),
    "wan-14b": Known(
        dit=DiTConfig(width=5120, num_layers=40, num_heads=40, ffn_width=13824, dtype="bf16"),
        height=720,
        width=1280,
    ),
}


def film_like(name: str, job: JobConfig) -> Film:
    """What a job renders with a model of these sizes, in numbers. ValueError for sizes it cannot have."""
    known = KNOWN[name]
    height, width = job.height or known.height, job.width or known.width
    per_frame, per_row = known.strides
    least = per_row * known.dit.patch[0]
    if height % least or width % least:
        raise ValueError(f"size={width}x{height}: need multiples of {least}")
    scale = known.guidance_scale if job.guidance_scale is None else job.guidance_scale
    num_steps = job.num_inference_steps or known.num_steps
    return Film(
        dit=known.dit if job.dtype is None else replace(known.dit, dtype=job.dtype),
        num_experts=1,
        num_frames=-(-(job.num_frames or known.num_frames) // per_frame),
        num_steps=num_steps,
        latent_rows=height // per_row,
        latent_columns=width // per_row,
        text_tokens=known.text_tokens,
        branches=num_branches(scale),
        stacked=job.queue.guidance == GuidanceMode.STACKED,
        pixels_per_frame=per_frame * height * width,
        cache=make_cache(job.cache),
        levels=tuple(noise_levels(num_steps, job.shift or known.shift)),
        closed_axes=closed_axes(job.cache, job.attention.sparsity, job.queue.guidance),
    )


def schemes_like(name: str, job: JobConfig, film: Film, *, lossy: bool = False) -> Sequence[Scheme]:
    """Schemes to compare for it: those of the job's timetable, if it names one."""
    known, queue = KNOWN[name], job.queue
    context = known.context_frames if queue.context_frames is None else queue.context_frames
    found = schemes(
        film.num_frames,
        film.num_steps,
        block_frames=queue.block_frames or known.block_frames,
        context_frames=context,
        mode=queue.context_mode or ContextMode.RECOMPUTE,
        has_mixed_levels=False,
        lossy=lossy,
    )
    return known_to(job, [scheme for scheme in found if queue.timetable in (None, scheme.name)])
