"""A denoising task from plain numbers."""

from collections.abc import Callable

from torch import Tensor

from vidgen.denoise.attending import Sparsity
from vidgen.denoise.loop import Task
from vidgen.denoise.noise import NoiseSource
from vidgen.denoise.schedule import noise_levels
from vidgen.denoise.solver import Euler
from vidgen.denoise.timetable import Timetable
from vidgen.model.dit import DiT
from vidgen.types import Block, GuidanceMode, NoiseKind


def make_task(
    model: DiT,
    timetable: Timetable,
    texts: Callable[[Block], tuple[Tensor, ...]],
    *,
    latent_rows: int,
    latent_columns: int,
    seed: int,
    shift: float,
    guidance_scale: float,
    noise: NoiseKind,
    guidance_mode: GuidanceMode = GuidanceMode.SPLIT,
    sparsity: Sparsity | None = None,
    attention_backend: str | None = None,
) -> Task:
    """The task of denoising one video with Euler steps. ValueError for a shift that is not positive."""
    levels = noise_levels(timetable.num_steps, shift)
    source = NoiseSource(
        seed,
        frame_shape=(model.config.latent_channels, latent_rows, latent_columns),
        block_frames=timetable.block_frames,
        context_frames=timetable.context_frames,
        kind=noise,
    )
    return Task(
        model=model,
        timetable=timetable,
        noise_levels=levels,
        solver=Euler(levels),
        guidance_scale=guidance_scale,
        noise=source,
        guidance_mode=guidance_mode,
        sparsity=sparsity,
        attention_backend=attention_backend,
        texts=texts,
    )
