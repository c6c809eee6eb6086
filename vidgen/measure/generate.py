"""Clips and long videos from a small model, for measuring it: no job, no files, torch only."""

from dataclasses import dataclass

import torch
from torch import Tensor

from vidgen.builtin import SmallModel
from vidgen.conditioning.prompts import BlockTexts, Timeline
from vidgen.denoise.attending import Sparsity
from vidgen.denoise.loop import denoise
from vidgen.denoise.task import make_task
from vidgen.denoise.timetable import Timetable, autoregressive, dualparal, full, moving_buffer
from vidgen.stepcache.cache import StepCache
from vidgen.types import Recommended, Segment

TIMETABLES = ("dualparal", "autoregressive", "buffer", "full")


@dataclass(frozen=True, kw_only=True, slots=True)
class Queue:
    """How a video's blocks follow each other; sizes are those of the settings beside it."""

    timetable: str = "dualparal"
    stride: int = 1  # ticks from block to block, of `dualparal` and `buffer`
    transition_blocks: int = 0


LONG, WHOLE = Queue(), Queue(timetable="full")


def generate(
    model: SmallModel,
    prompt: str,
    *,
    num_frames: int,
    seed: int,
    settings: Recommended,
    long: bool = False,
    sparsity: Sparsity | None = None,
    cache: StepCache | None = None,
) -> Tensor:
    """Pixels [3, num_frames, height, width] in [-1, 1]: all frames at once, or as a `long` block queue."""
    segments = (Segment(prompt=prompt, num_frames=num_frames),)
    queue = LONG if long else WHOLE
    return generate_segments(
        model, segments, seed=seed, settings=settings, queue=queue, sparsity=sparsity, cache=cache
    )


@torch.inference_mode()
def generate_segments(
    model: SmallModel,
    segments: tuple[Segment, ...],
    *,
    seed: int,
    settings: Recommended,
    queue: Queue = LONG,
    sparsity: Sparsity | None = None,
    cache: StepCache | None = None,
) -> Tensor:
    """Pixels [3, F, height, width] in [-1, 1] of prompts that follow each other, F frames in all.

    ValueError for a queue that cannot be, and for a segment in which no block begins.
    """
    codec = model.codec
    num_frames = sum(segment.num_frames for segment in segments)
    timetable = make_timetable(codec.num_latent_frames(num_frames), settings, queue)
    timeline = Timeline(
        segments,
        first_frame=lambda block: codec.num_pixel_frames(block * timetable.block_frames),
        transition_blocks=queue.transition_blocks,
    )
    device = next(model.dit.parameters()).device
    prompts = dict.fromkeys([*(segment.prompt for segment in segments), ""])
    encoded = {words: model.text(model.text.ids([words]).to(device)) for words in prompts}
    task = make_task(
        model.dit,
        timetable,
        BlockTexts(timeline, "", encoded),
        latent_rows=settings.height // codec.spatial_stride,
        latent_columns=settings.width // codec.spatial_stride,
        seed=seed,
        shift=settings.shift,
        guidance_scale=settings.guidance_scale,
        noise=settings.noise,
        sparsity=sparsity,
        cache=cache,
    )
    latents = [finished.latents_BCFYX for finished in denoise(task)]
    return codec.decode(torch.cat(latents, dim=2))[0, :, :num_frames].clamp(-1, 1).cpu()


def make_timetable(num_latent_frames: int, settings: Recommended, queue: Queue) -> Timetable:
    """The timetable of a video of so many latent frames. ValueError for a queue that cannot be."""
    num_steps = settings.num_inference_steps
    if queue.timetable == "full":
        return full(num_latent_frames, num_steps)
    sizes = {
        "block_frames": settings.block_frames,
        "context_frames": settings.context_frames,
        "mode": settings.context_mode,
    }
    if queue.timetable == "autoregressive":
        return autoregressive(num_latent_frames, num_steps, **sizes)
    if queue.timetable == "buffer":
        return moving_buffer(num_latent_frames, num_steps, stride=queue.stride, **sizes)
    if queue.timetable == "dualparal":
        return dualparal(num_latent_frames, num_steps, stride=queue.stride, **sizes)
    raise ValueError(f"timetable={queue.timetable}: there are {', '.join(TIMETABLES)}")
