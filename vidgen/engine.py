"""The Python face: a model, and videos from it in memory.

engine = vidgen.Engine.from_pretrained("builtin")
frames = engine("a red circle moving left over a gray background", num_frames=257)
for block in engine.stream(prompt, num_frames=257): ...
"""

import hashlib
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vidgen.builtin import BUILTIN_PATH, SmallModel, load_dit, load_small
from vidgen.codec.dct import DctCodec
from vidgen.conditioning.prompts import BlockTexts, Timeline
from vidgen.config import JobConfig, parse_job, resolve
from vidgen.denoise.attending import Sparsity
from vidgen.denoise.loop import FinishedBlock, Task, denoise
from vidgen.denoise.task import make_task
from vidgen.denoise.timetable import Timetable, dualparal, full
from vidgen.kernels.attention.api import check_name
from vidgen.limits import available_memory_bytes, memory_bytes, readable
from vidgen.sparsity.making import make_policy
from vidgen.sparsity.settings import SparsitySettings
from vidgen.types import Block

Frames = NDArray[np.uint8]  # [F, H, W, 3], RGB


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A resolved job and what will run for it."""

    job: JobConfig
    timeline: Timeline
    task: Task
    strides: tuple[int, int]  # pixel frames per latent frame, pixels per latent row

    def first_frame(self, block: Block) -> int:
        """The number of a block's first pixel frame."""
        return block.start * self.strides[0]

    def cut(self, frames: Frames, block: Block) -> Frames:
        """A block's frames without those after the end of the video."""
        assert self.job.num_frames
        return frames[: self.job.num_frames - self.first_frame(block)]


class Engine:
    """A loaded model. Calls are independent of each other; the same arguments give the same frames."""

    def __init__(self, model: SmallModel, name: str, checkpoint: Path) -> None:
        self.model, self.name, self.checkpoint = model, name, checkpoint
        self.sparsity = SparsitySettings()

    @classmethod
    def from_pretrained(
        cls, path: str | Path = "builtin", *, device: str = "cpu", with_dit: bool = True
    ) -> Self:
        """The model of that name or checkpoint file. ValueError in one line when there is none.

        Without its DiT it can plan, encode and decode, and ranks read the DiT's layers for themselves.
        """
        name = str(path)
        checkpoint = BUILTIN_PATH if name == "builtin" else Path(path)
        if not checkpoint.is_file():
            raise ValueError(f"model={name}: no such model or file; `vidgen models` lists what there is")
        engine = cls(load_small(checkpoint, with_dit=False), name, checkpoint)
        if with_dit:
            engine.load_dit(device)
        return engine

    def load_dit(self, device: str) -> None:
        """Read the DiT's weights onto a device, where it was left out at first."""
        load_dit(self.checkpoint, self.model.dit, device)

    def sha256(self) -> str:
        """Of the checkpoint: what a job remembers of its model."""
        return hashlib.sha256(self.checkpoint.read_bytes()).hexdigest()

    def __call__(self, prompt: str | None = None, **settings: Any) -> Frames:
        """All frames [F, H, W, 3], uint8. Settings are those of a job file (vidgen/config.py)."""
        return np.concatenate(list(self.stream(prompt, **settings)))

    def stream(self, prompt: str | None = None, **settings: Any) -> Iterator[Frames]:
        """Frames [F, H, W, 3] of each block as soon as it is clean; all together `num_frames`."""
        given = {"prompt": prompt} if prompt is not None else {}
        plan = self.plan(parse_job({**given, **settings}))
        return (self.frames(finished, plan) for finished in denoise(plan.task))

    def plan(self, job: JobConfig) -> Plan:
        """Everything that decides the video. ValueError in one line for a job that this model cannot do."""
        job = resolve(job, self.model.recommended)
        if job.attention.backend is not None:
            check_name(job.attention.backend)
        codec = self.model.codec
        assert job.num_frames and job.height and job.width and job.num_inference_steps and job.shift
        stride = codec.spatial_stride * self.model.dit.config.patch[0]
        for name, size in (("height", job.height), ("width", job.width)):
            if size % stride:
                nearest = max(stride, round(size / stride) * stride)
                raise ValueError(f"{name}={size}: need a multiple of {stride}; try {nearest}")
        job = self._with_sparsity(job)
        assert job.num_frames and job.shift
        timetable = make_timetable(job, codec.num_latent_frames(job.num_frames))
        if job.parallel.ranks == 1:
            self._check_memory(job, timetable)
        timeline = Timeline(
            job.timeline(),
            temporal_stride=codec.temporal_stride,
            block_frames=timetable.block_frames,
            transition_blocks=job.queue.transition_blocks,
        )
        self._warn_of_unknown_words(job)
        if job.num_frames < timeline.num_frames:
            warnings.warn(
                f"num_frames={job.num_frames} cuts the segments, which hold {timeline.num_frames} frames",
                stacklevel=2,
            )
        assert job.queue.noise and job.guidance_scale is not None
        task = make_task(
            self.model.dit,
            timetable,
            BlockTexts(timeline, job.negative_prompt, self.encode),
            latent_rows=job.height // codec.spatial_stride,
            latent_columns=job.width // codec.spatial_stride,
            seed=job.seed,
            shift=job.shift,
            guidance_scale=job.guidance_scale,
            noise=job.queue.noise,
            guidance_mode=job.queue.guidance,
            sparsity=self._sparsity(job.attention.sparsity),
            attention_backend=job.attention.backend,
        )
        return Plan(
            job=job, timeline=timeline, task=task, strides=(codec.temporal_stride, codec.spatial_stride)
        )

    @torch.inference_mode()
    def encode(self, prompt: str) -> Tensor:
        """Text [1, N, T] of a prompt."""
        return self.model.text(self.model.text.ids([prompt]))

    def decode(self, latents_BCFYX: Tensor) -> Frames:
        """Frames [F, H, W, 3] of one video's clean latents."""
        return decode(self.model.codec, latents_BCFYX)

    def frames(self, finished: FinishedBlock, plan: Plan) -> Frames:
        """A finished block's frames, cut where the video ends."""
        return plan.cut(self.decode(finished.latents_BCFYX), finished.block)

    def enable_sparsity(self, **settings: Any) -> None:
        """Sparse attention for all jobs from here on that say nothing of their own. See SparsitySettings.

        ValueError for settings that cannot be, or when it is enabled already.
        """
        if self.sparsity.policy != "none":
            raise ValueError(
                f"sparsity is enabled already ({self.sparsity.policy}): call disable_sparsity() first"
            )
        self.sparsity = parse_job({"attention": {"sparsity": settings}}).attention.sparsity

    def disable_sparsity(self) -> None:
        """Dense attention again."""
        self.sparsity = SparsitySettings()

    def _with_sparsity(self, job: JobConfig) -> JobConfig:
        """The job with this engine's sparsity where it says nothing of its own, and blocks of a size."""
        sparsity = job.attention.sparsity if job.attention.sparsity.policy != "none" else self.sparsity
        if sparsity.policy == "none":
            return job
        assert job.num_frames and job.height and job.width and job.queue.block_frames is not None
        stride = self.model.codec.spatial_stride
        tokens_per_frame = math.prod(
            size // stride // patch
            for size, patch in zip((job.height, job.width), self.model.dit.config.patch, strict=True)
        )
        frames = job.queue.block_frames + (job.queue.context_frames or 0)
        if job.queue.timetable == "full":
            frames = self.model.codec.num_latent_frames(job.num_frames)
        sparsity = sparsity.resolved(frames * tokens_per_frame)
        return job.model_copy(update={"attention": job.attention.model_copy(update={"sparsity": sparsity})})

    def _sparsity(self, settings: SparsitySettings) -> Sparsity | None:
        policy = make_policy(settings)
        if policy is None:
            return None
        if self.model.dit.config.window is not None:
            raise ValueError(
                f"sparsity={policy.name}: this model's attention has a window already; leave sparsity out"
            )
        return Sparsity(policy=policy)

    def _check_memory(self, job: JobConfig, timetable: Timetable) -> None:
        codec = self.model.codec
        parameters = sum(p.numel() for part in self.model.parts().values() for p in part.parameters())
        strides = (codec.temporal_stride, codec.spatial_stride)
        needed = memory_bytes(job, self.model.dit.config, timetable, strides, parameters)
        available = available_memory_bytes()
        if needed > available:
            raise ValueError(
                f"{job.num_frames} frames of {job.width}x{job.height} need about {readable(needed)} of "
                f"memory, {readable(available)} are free; choose a smaller height, width or blocks"
            )

    def _warn_of_unknown_words(self, job: JobConfig) -> None:
        prompts = dict.fromkeys([*(segment.prompt for segment in job.timeline()), job.negative_prompt])
        for prompt in prompts:
            for word, nearest in self.model.text.tokenize(prompt).unknown.items():
                advice = f"nearest known: {', '.join(nearest)}" if nearest else "no known word is near"
                warnings.warn(f"the model does not know {word!r} and ignores it; {advice}", stacklevel=3)


@torch.inference_mode()
def decode(codec: DctCodec, latents_BCFYX: Tensor) -> Frames:
    """Frames [F, H, W, 3] of one video's clean latents."""
    pixels = codec.decode(latents_BCFYX.cpu())[0]
    return ((pixels.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 3, 0).numpy()


def load_decode(checkpoint: Path) -> Callable[[Tensor], Frames]:
    """What turns latents into frames, from a checkpoint; for a process of its own."""
    return partial(decode, load_small(checkpoint, with_dit=False).codec)


def make_timetable(job: JobConfig, num_latent_frames: int) -> Timetable:
    """The timetable that a resolved job asks for."""
    queue = job.queue
    assert job.num_inference_steps
    if queue.timetable == "full":
        return full(num_latent_frames, job.num_inference_steps)
    assert queue.block_frames and queue.context_frames is not None and queue.context_mode
    return dualparal(
        num_latent_frames,
        job.num_inference_steps,
        block_frames=queue.block_frames,
        context_frames=queue.context_frames,
        stride=queue.stride,
        mode=queue.context_mode,
        anchor_frames=queue.anchor_frames,
    )
