"""From a job and a model to all that decides the video."""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from vidgen.codec.protocol import CodecSizes
from vidgen.conditioning.prompts import BlockTexts, Timeline
from vidgen.config import JobConfig, resolve
from vidgen.denoise.attending import Sparsity
from vidgen.denoise.given import Inputs
from vidgen.denoise.lockstep import Clips
from vidgen.denoise.loop import Task
from vidgen.denoise.task import make_task
from vidgen.denoise.timetable import (
    Timetable,
    autoregressive,
    dualparal,
    fifo,
    full,
    moving_buffer,
    pipefusion,
)
from vidgen.families.family import Family, Frames
from vidgen.kernels.attention.api import check_name
from vidgen.limits import available_memory_bytes, memory_bytes, readable
from vidgen.pictures import read_pictures
from vidgen.sparsity.making import make_policy
from vidgen.sparsity.settings import SparsitySettings
from vidgen.stepcache.cache import make_cache
from vidgen.stepcache.calibration import with_calibration
from vidgen.stepcache.settings import CacheSettings
from vidgen.types import Block


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A resolved job and what will run for it."""

    job: JobConfig
    timeline: Timeline
    task: Task
    inputs: Inputs
    sizes: CodecSizes

    @property
    def strides(self) -> tuple[int, int]:
        """(pixel frames per latent frame, pixels per latent row)."""
        return self.sizes.temporal_stride, self.sizes.spatial_stride

    @property
    def latents_shape(self) -> tuple[int, ...]:
        """Of the whole video's latents, [1, C, F, Y, X]."""
        assert self.job.height and self.job.width
        stride = self.sizes.spatial_stride
        frames, channels = self.task.timetable.num_frames, self.task.model.config.latent_channels
        return 1, channels, frames, self.job.height // stride, self.job.width // stride

    def first_frame(self, block: Block) -> int:
        """The number of a block's first pixel frame."""
        return self.sizes.num_pixel_frames(block.start)

    def cut(self, frames: Frames, block: Block) -> Frames:
        """A block's frames without those after the end of the video."""
        assert self.job.num_frames
        return frames[: self.job.num_frames - self.first_frame(block)]

    def with_noise(self, noise_BCFYX: Tensor) -> "Plan":
        """The same from this noise. ValueError when its shape is another."""
        if tuple(noise_BCFYX.shape) != self.latents_shape:
            raise ValueError(f"latents of {tuple(noise_BCFYX.shape)}: need {self.latents_shape}")

        def noise(block: Block) -> Tensor:
            return noise_BCFYX[:, :, block.start : block.start + block.num_frames].float()

        return replace(self, task=replace(self.task, noise=noise))


def resolve_job(
    family: Family, job: JobConfig, sparsity: SparsitySettings, cache: CacheSettings | None = None
) -> JobConfig:
    """The job with every value filled in; `sparsity` and `cache` where it says nothing of its own.

    ValueError in one line for a job that this model cannot do.
    """
    job = resolve(job, family.recommended)
    if job.attention.backend is not None:
        check_name(job.attention.backend)
    assert job.height and job.width
    sizes = (("height", job.height), ("width", job.width))
    for (name, size), patch in zip(sizes, family.dits[0].config.patch, strict=True):
        stride = family.sizes.spatial_stride * patch
        if size % stride:
            nearest = max(stride, round(size / stride) * stride)
            raise ValueError(f"{name}={size}: need a multiple of {stride}; try {nearest}")
    if job.guidance_scale_2 is not None and len(family.dits) == 1:
        raise ValueError(f"guidance_scale_2={job.guidance_scale_2}: this model has one expert; leave it out")
    return _with_sparsity(family, _with_cache(job, cache), sparsity)


def make_inputs(
    family: Family,
    job: JobConfig,
    *,
    image: Any = None,
    last_image: Any = None,
    embeds: dict[str, Tensor] | None = None,
) -> Inputs:
    """What a resolved job's texts and pictures become; `embeds` stand for the texts of those names.

    ValueError for those that the model cannot use.
    """
    assert job.num_frames and job.negative_prompt is not None
    embeds = embeds or {}
    prompts = dict.fromkeys([*(segment.prompt for segment in job.timeline()), job.negative_prompt])
    texts = [prompt for prompt in prompts if prompt not in embeds]
    family.warn(texts)
    pictures = read_pictures(job, image, last_image)
    given = family.give(pictures, family.sizes.num_latent_frames(job.num_frames))
    return Inputs(texts={**family.encode_texts(texts), **embeds}, given=given)


def make_plan(family: Family, job: JobConfig, inputs: Inputs | None = None, **given: Any) -> Plan:
    """Everything that decides the video of a resolved job; `inputs`, or made by `make_inputs` with `given`.

    ValueError in one line for a job that this model cannot do.
    """
    sizes = family.sizes
    _check_one_process(job)
    assert job.num_frames and job.height and job.width and job.num_inference_steps and job.shift
    assert job.queue.noise and job.guidance_scale is not None and job.negative_prompt is not None
    solver = family.make_solver(job.solver, job.num_inference_steps, job.shift)
    switch = _switch_step(solver[1], family.boundary)
    timetable = make_timetable(job, sizes.num_latent_frames(job.num_frames), switch)
    timeline = Timeline(
        job.timeline(),
        first_frame=lambda block: sizes.num_pixel_frames(block * timetable.block_frames),
        transition_blocks=job.queue.transition_blocks,
    )
    if job.parallel.ranks == 1:
        _check_memory(family, job, timetable)
    if job.num_frames < timeline.num_frames:
        warnings.warn(
            f"num_frames={job.num_frames} cuts the segments, which hold {timeline.num_frames} frames",
            stacklevel=3,
        )
    inputs = inputs or make_inputs(family, job, **given)
    task = make_task(
        family.dits[0],
        timetable,
        BlockTexts(timeline, job.negative_prompt, inputs.texts),
        latent_rows=job.height // sizes.spatial_stride,
        latent_columns=job.width // sizes.spatial_stride,
        seed=job.seed,
        guidance_scale=job.guidance_scale,
        noise=job.queue.noise,
        solver=solver,
        second_model=family.dits[1] if timetable.switch_step is not None else None,
        second_guidance_scale=job.guidance_scale_2,
        given=inputs.given,
        guidance_mode=job.queue.guidance,
        residual_guidance=job.queue.residual_guidance,
        static_threshold=job.queue.static_threshold,
        sparsity=_sparsity(family, job.attention.sparsity),
        clips=make_clips(job, timetable.num_frames),
        cache=make_cache(job.cache),
        attention_backend=job.attention.backend,
    )
    return Plan(job=job, timeline=timeline, task=task, inputs=inputs, sizes=sizes)


def _check_one_process(job: JobConfig) -> None:
    """ValueError for ranks with a setting that they do not know."""
    if job.parallel.ranks == 1:
        return
    queue, only = job.queue, f"in one process only, and ranks={job.parallel.ranks}; leave one of them out"
    if queue.static_threshold is not None:
        raise ValueError(f"static_threshold={queue.static_threshold:g}: blocks are repeated {only}")


def make_timetable(job: JobConfig, num_latent_frames: int, switch_step: int | None = None) -> Timetable:
    """The timetable that a resolved job asks for. ValueError for a stride that is not its timetable's."""
    queue, num_steps = job.queue, job.num_inference_steps
    assert num_steps
    sizes: dict[str, Any]
    if queue.timetable in ("full", "lockstep"):
        return full(num_latent_frames, num_steps, switch_step=switch_step)
    assert queue.block_frames and queue.context_frames is not None and queue.context_mode
    if queue.timetable == "pipefusion":
        sizes = {"block_frames": queue.block_frames, "warm_up_steps": queue.warm_up_steps}
        return pipefusion(num_latent_frames, num_steps, switch_step=switch_step, **sizes)
    sizes = {
        "block_frames": queue.block_frames,
        "context_frames": queue.context_frames,
        "mode": queue.context_mode,
        "anchor_frames": queue.anchor_frames,
        "switch_step": switch_step,
    }
    if queue.timetable == "autoregressive":
        if queue.stride not in (1, num_steps):
            raise ValueError(
                f"stride={queue.stride}: timetable=autoregressive admits a block every {num_steps} ticks "
                "(num_inference_steps); leave stride out"
            )
        return autoregressive(num_latent_frames, num_steps, **sizes)
    if queue.timetable == "buffer":
        return moving_buffer(num_latent_frames, num_steps, stride=queue.stride, **sizes)
    if queue.timetable == "fifo":
        if sizes.pop("block_frames") != 1:
            raise ValueError(
                f"block_frames={queue.block_frames}: timetable=fifo has blocks of one frame; leave it out"
            )
        return fifo(num_latent_frames, num_steps, stride=queue.stride, **sizes)
    return dualparal(num_latent_frames, num_steps, stride=queue.stride, **sizes)


def make_clips(job: JobConfig, num_latent_frames: int) -> Clips | None:
    """The clips of a resolved job in lock step: its blocks. None for other timetables."""
    queue = job.queue
    if queue.timetable != "lockstep":
        return None
    assert queue.block_frames and queue.context_frames is not None
    return Clips(
        num_frames=num_latent_frames,
        clip_frames=queue.block_frames,
        halo_frames=queue.context_frames,
        global_frames=queue.global_frames,
    )


def _switch_step(levels: Sequence[float], boundary: float | None) -> int | None:
    """The first step below the boundary, where a model has two experts."""
    if boundary is None:
        return None
    return next(step for step, level in enumerate(levels) if level < boundary)


def _with_sparsity(family: Family, job: JobConfig, default: SparsitySettings) -> JobConfig:
    """The job with the default sparsity where it says nothing of its own, and blocks of a size."""
    sparsity = job.attention.sparsity if job.attention.sparsity.policy != "none" else default
    if sparsity.policy == "none":
        return job
    assert job.num_frames and job.height and job.width and job.queue.block_frames is not None
    stride, patches = family.sizes.spatial_stride, family.dits[0].config.patch
    tokens_per_frame = math.prod(
        size // stride // patch for size, patch in zip((job.height, job.width), patches, strict=True)
    )
    frames = job.queue.block_frames + (job.queue.context_frames or 0)
    if job.queue.timetable == "full":
        frames = family.sizes.num_latent_frames(job.num_frames)
    sparsity = sparsity.resolved(frames * tokens_per_frame)
    return job.model_copy(update={"attention": job.attention.model_copy(update={"sparsity": sparsity})})


def _with_cache(job: JobConfig, default: CacheSettings | None) -> JobConfig:
    """The job with the default step cache where it says nothing of its own, and all that it needs to know."""
    cache = job.cache if job.cache.method != "none" or default is None else default
    if cache.method == "none":
        return job
    cache = with_calibration(cache, is_builtin=job.model == "builtin").resolved()
    return job.model_copy(update={"cache": cache})


def _sparsity(family: Family, settings: SparsitySettings) -> Sparsity | None:
    policy = make_policy(settings)
    if policy is None:
        return None
    if family.dits[0].config.window is not None:
        raise ValueError(
            f"sparsity={policy.name}: this model's attention has a window already; leave sparsity out"
        )
    return Sparsity(policy=policy)


def _check_memory(family: Family, job: JobConfig, timetable: Timetable) -> None:
    weight_bytes = sum(
        tensor.numel() * tensor.element_size() for dit in family.dits for tensor in dit.state_dict().values()
    )
    strides = (family.sizes.temporal_stride, family.sizes.spatial_stride)
    assert job.height and job.width
    needed = memory_bytes(job, family.dits[0].config, timetable, strides, weight_bytes)
    needed += family.decode_bytes(job.height, job.width)
    available = available_memory_bytes()
    if needed > available:
        raise ValueError(
            f"{job.num_frames} frames of {job.width}x{job.height} need about {readable(needed)} of "
            f"memory, {readable(available)} are free; choose a smaller height, width or blocks"
        )
