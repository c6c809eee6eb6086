"""From a job and a machine to the plans there are: what the planner needs to know of a model."""

from collections.abc import Sequence
from typing import Any

from vidgen.config import JobConfig
from vidgen.denoise.guidance import num_branches
from vidgen.families.family import Family
from vidgen.parallel.planner.hardware import Hardware
from vidgen.parallel.planner.plan import Planned, best, plans
from vidgen.parallel.planner.schemes import Scheme, schemes
from vidgen.parallel.planner.work import Film
from vidgen.planning import make_clips, make_timetable
from vidgen.sharing import check_scheme_of, closed_axes, known_to
from vidgen.stepcache.cache import make_cache
from vidgen.types import GuidanceMode, ResidualGuidance

WAN_TEXT_TOKENS = 512  # to which its texts are padded; see vidgen/conditioning/umt5.py


def plans_of(
    family: Family,
    job: JobConfig,
    hardware: Hardware,
    num_ranks: int,
    *,
    any_scheme: bool,
    lossy: bool = False,
) -> list[Planned]:
    """All plans of a resolved job on so many ranks: those that fit first, the quickest first.

    With `any_scheme` also those that give another video than the job's timetable, and with `lossy` those that
    approximate one. Attention is taken to be dense. ValueError for a dtype that the hardware does not know.
    """
    found = schemes_of(family, job, lossy=lossy) if any_scheme else [own_scheme(family, job)]
    return plans(film_of(family, job), hardware, num_ranks, found)


def choose(family: Family, job: JobConfig, most_ranks: int, hardware: Hardware) -> Planned:
    """The quickest way to render a resolved job's own video: on its ranks, or on any number up to the most.

    ValueError when none fits.
    """
    counts = range(1, most_ranks + 1) if job.parallel.ranks == "auto" else [most_ranks]
    found = [plan for count in counts for plan in plans_of(family, job, hardware, count, any_scheme=False)]
    return best(found)


def film_of(family: Family, job: JobConfig) -> Film:
    """What a resolved job renders, in numbers. No weights are read and no text encoder is loaded."""
    assert job.num_frames and job.height and job.width and job.num_inference_steps
    sizes = family.sizes
    branches = num_branches(job.guidance_scale or 1.0)
    if job.queue.residual_guidance != ResidualGuidance.NONE:
        branches = 1  # but for a block's first step
    return Film(
        dit=family.dits[0].config,
        num_experts=len(family.dits) if _switch_step(family, job) is not None else 1,
        num_frames=sizes.num_latent_frames(job.num_frames),
        num_steps=job.num_inference_steps,
        latent_rows=job.height // sizes.spatial_stride,
        latent_columns=job.width // sizes.spatial_stride,
        text_tokens=_text_tokens(family),
        branches=branches,
        stacked=job.queue.guidance == GuidanceMode.STACKED,
        pixels_per_frame=sizes.temporal_stride * job.height * job.width,
        decode_bytes=family.decode_bytes(job.height, job.width),
        cache=make_cache(job.cache),
        levels=tuple(_levels(family, job)),
        closed_axes=closed_axes(job.cache, job.attention.sparsity, job.queue.guidance),
    )


def own_scheme(family: Family, job: JobConfig) -> Scheme:
    """The scheme that a resolved job asks for. ValueError for one that its other settings do not know."""
    assert job.num_frames
    return scheme_of(job, family.sizes.num_latent_frames(job.num_frames), _switch_step(family, job))


def scheme_of(job: JobConfig, num_latent_frames: int, switch_step: int | None = None) -> Scheme:
    """The same for so many latent frames."""
    assert job.queue.timetable
    scheme = Scheme(
        name=job.queue.timetable,
        timetable=make_timetable(job, num_latent_frames, switch_step),
        clips=make_clips(job, num_latent_frames),
    )
    check_scheme_of(job, scheme)
    return scheme


def schemes_of(family: Family, job: JobConfig, *, lossy: bool = False) -> Sequence[Scheme]:
    """Schemes to compare for a resolved job: its own, and others of its sizes."""
    own, queue = own_scheme(family, job), job.queue
    assert job.num_inference_steps and queue.block_frames and queue.context_frames is not None
    assert queue.context_mode
    others = schemes(
        own.timetable.num_frames,
        job.num_inference_steps,
        block_frames=queue.block_frames,
        context_frames=queue.context_frames,
        mode=queue.context_mode,
        has_mixed_levels=not _is_wan(family),
        switch_step=own.timetable.switch_step,
        lossy=lossy,
    )
    return [own, *(other for other in known_to(job, others) if other.label != own.label)]


def _switch_step(family: Family, job: JobConfig) -> int | None:
    """The first step of a second expert."""
    if family.boundary is None:
        return None
    return next(step for step, level in enumerate(_levels(family, job)) if level < family.boundary)


def _levels(family: Family, job: JobConfig) -> Sequence[float]:
    """Of noise, at every step and after the last one."""
    assert job.num_inference_steps and job.shift
    return family.make_solver(job.solver, job.num_inference_steps, job.shift)[1]


def _text_tokens(family: Family) -> int:
    """Tokens of an encoded text."""
    return WAN_TEXT_TOKENS if _is_wan(family) else _encoded(family).shape[1]


def _is_wan(family: Family) -> bool:
    return str(family.facts()["family"]).startswith("wan")


def _encoded(family: Family) -> Any:
    return family.encode_texts([""])[""]
