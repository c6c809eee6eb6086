"""Nouns that cross rooms. Standard library only."""

from dataclasses import dataclass
from enum import StrEnum


class ContextMode(StrEnum):
    """How a block sees the frames before its own."""

    RECOMPUTE = "recompute"  # their latents run through every layer with the block's own
    CACHE = "cache"  # their keys and values are kept from the tick before


class GuidanceMode(StrEnum):
    """How the branches of classifier-free guidance are run."""

    SPLIT = "split"  # one after the other: two small items, which fill a pipeline better
    STACKED = "stacked"  # as one batch


class ResidualGuidance(StrEnum):
    """Whether a virtual negative branch stands for the real one; see vidgen/denoise/guidance.py."""

    NONE = "none"  # the negative branch is run at every step
    ONETIME = "onetime"  # at a block's first step only
    SELF = "self"  # never


class NoiseKind(StrEnum):
    """Where a block's noise comes from."""

    POOL = "pool"  # a permutation of block_frames + context_frames frames drawn once per job
    INDEPENDENT = "independent"  # fresh frames for every block


@dataclass(frozen=True, slots=True)
class Block:
    """A run of latent frames, [start, start + num_frames) of the video."""

    index: int
    start: int
    num_frames: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Recommended:
    """What a job uses where its author says nothing: the settings a model is measured at."""

    height: int = 32
    width: int = 32
    fps: int = 16
    num_frames: int = 65
    num_inference_steps: int = 20
    guidance_scale: float = 3.0
    guidance_scale_2: float | None = None  # of the second expert
    negative_prompt: str = ""
    shift: float = 4.0
    whole_frames: int = 0  # up to so many pixel frames are denoised at once, as the model was trained
    dtype: str = "fp32"
    block_frames: int = 4  # latent frames
    context_frames: int = 2  # latent frames per side
    context_mode: ContextMode = ContextMode.RECOMPUTE
    noise: NoiseKind = NoiseKind.POOL
    threads: int = 1  # of a CPU: a small model is fastest on one; 0: all there are


@dataclass(frozen=True, kw_only=True, slots=True)
class Segment:
    """A prompt and for how many pixel frames it holds."""

    prompt: str
    num_frames: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """Where a render stands after a tick. Seconds count this process only."""

    ticks_done: int
    num_ticks: int
    blocks_done: int
    num_blocks: int
    frames_done: int
    num_frames: int
    seconds: float
    ticks_this_run: int
    first_frame_s: float | None  # None until this run has finished a block

    @property
    def eta_s(self) -> float:
        """Seconds left at this run's mean rate; infinite before the first tick."""
        left = self.num_ticks - self.ticks_done
        return self.seconds / self.ticks_this_run * left if self.ticks_this_run else float("inf")
