"""Clips and long videos from a small model, for measuring it: no job, no files, torch only."""

import torch
from torch import Tensor

from vidgen.builtin import SmallModel
from vidgen.denoise.attending import Sparsity
from vidgen.denoise.loop import denoise
from vidgen.denoise.task import make_task
from vidgen.denoise.timetable import dualparal, full
from vidgen.types import Block, Recommended


@torch.inference_mode()
def generate(
    model: SmallModel,
    prompt: str,
    *,
    num_frames: int,
    seed: int,
    settings: Recommended,
    long: bool = False,
    sparsity: Sparsity | None = None,
) -> Tensor:
    """Pixels [3, num_frames, height, width] in [-1, 1]: all frames at once, or as a `long` block queue."""
    codec = model.codec
    num_latent_frames = codec.num_latent_frames(num_frames)
    timetable = full(num_latent_frames, settings.num_inference_steps)
    if long:
        timetable = dualparal(
            num_latent_frames,
            settings.num_inference_steps,
            block_frames=settings.block_frames,
            context_frames=settings.context_frames,
            mode=settings.context_mode,
        )
    device = next(model.dit.parameters()).device
    text, negative = (model.text(model.text.ids([words]).to(device)) for words in (prompt, ""))

    def texts(block: Block) -> tuple[Tensor, Tensor]:
        return text, negative

    task = make_task(
        model.dit,
        timetable,
        texts,
        latent_rows=settings.height // codec.spatial_stride,
        latent_columns=settings.width // codec.spatial_stride,
        seed=seed,
        shift=settings.shift,
        guidance_scale=settings.guidance_scale,
        noise=settings.noise,
        sparsity=sparsity,
    )
    latents = [finished.latents_BCFYX for finished in denoise(task)]
    return codec.decode(torch.cat(latents, dim=2))[0, :, :num_frames].clamp(-1, 1).cpu()
