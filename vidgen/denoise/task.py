"""A denoising task from plain numbers."""

from collections.abc import Callable, Sequence

from torch import Tensor

from vidgen.denoise.attending import Sparsity
from vidgen.denoise.given import NOTHING, Given
from vidgen.denoise.lockstep import Clips
from vidgen.denoise.loop import Task
from vidgen.denoise.noise import NoiseSource, SlicedNoise
from vidgen.denoise.schedule import noise_levels
from vidgen.denoise.solver import Euler, Solver
from vidgen.denoise.still import StillFilter
from vidgen.denoise.timetable import Timetable
from vidgen.model.dit import DiT
from vidgen.stepcache.cache import StepCache
from vidgen.types import Block, GuidanceMode, NoiseKind, ResidualGuidance


def make_task(
    model: DiT,
    timetable: Timetable,
    texts: Callable[[Block], tuple[Tensor, ...]],
    *,
    latent_rows: int,
    latent_columns: int,
    seed: int,
    guidance_scale: float,
    noise: NoiseKind,
    shift: float = 1.0,
    solver: tuple[Solver, Sequence[float]] | None = None,
    second_model: DiT | None = None,
    second_guidance_scale: float | None = None,
    given: Given = NOTHING,
    guidance_mode: GuidanceMode = GuidanceMode.SPLIT,
    residual_guidance: ResidualGuidance = ResidualGuidance.NONE,
    static_threshold: float | None = None,
    sparsity: Sparsity | None = None,
    clips: Clips | None = None,
    cache: StepCache | None = None,
    attention_backend: str | None = None,
) -> Task:
    """The task of denoising one video. `solver` comes with the levels that the model sees; by default Euler.

    ValueError for a shift that is not positive.
    """
    if solver is None:
        own_levels = noise_levels(timetable.num_steps, shift)
        solver = Euler(own_levels), own_levels
    source = NoiseSource(
        seed,
        frame_shape=(model.config.latent_channels, latent_rows, latent_columns),
        block_frames=timetable.num_frames if timetable.is_patched else timetable.block_frames,
        context_frames=timetable.context_frames,
        kind=noise,
    )
    return Task(
        model=model,
        timetable=timetable,
        noise_levels=solver[1],
        solver=solver[0],
        guidance_scale=guidance_scale,
        second_model=second_model,
        second_guidance_scale=second_guidance_scale,
        given=given,
        noise=SlicedNoise(source) if timetable.is_patched else source,
        guidance_mode=guidance_mode,
        residual_guidance=residual_guidance,
        still=None if static_threshold is None else StillFilter(threshold=static_threshold, seed=seed),
        sparsity=sparsity,
        clips=clips,
        cache=cache,
        attention_backend=attention_backend,
        texts=texts,
    )
