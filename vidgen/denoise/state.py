"""What there is of blocks between two ticks, and what a forward runs on."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from vidgen.denoise.lending import Lent
from vidgen.denoise.solver import History
from vidgen.stepcache.kept import NOTHING_KEPT, Kept
from vidgen.types import Block

# B batch, C latent channels, F latent frames, Y X latent rows and columns


@dataclass
class BlockState:
    """A block between two ticks."""

    latents_BCFYX: Tensor
    steps_done: int
    history: History = ()
    negative_BCFYX: Tensor | None = None  # of residual guidance: clean latents of the negative prompt
    kept: Kept = NOTHING_KEPT  # by a step cache

    def to(self, device: torch.device) -> "BlockState":
        """The same on a device."""
        negative = self.negative_BCFYX
        return BlockState(
            self.latents_BCFYX.to(device),
            self.steps_done,
            tuple(tensor.to(device) for tensor in self.history),
            None if negative is None else negative.to(device),
            self.kept.each(lambda tensor: tensor.to(device)),
        )


@dataclass
class Stillness:
    """What is known of the last blocks when the next one is admitted, see still.py."""

    similarity: float | None = None  # of the last two blocks that were denoised, in [-1, 1]
    in_a_row: int = 0  # blocks repeated since
    total: int = 0  # of all so far


@dataclass
class LoopState:
    """All that the next tick needs; what a checkpoint holds."""

    next_tick: int = 0
    blocks: dict[int, BlockState] = field(default_factory=dict)
    lent: Lent = field(default_factory=Lent)
    still: Stillness = field(default_factory=Stillness)


@dataclass(frozen=True)
class FinishedBlock:
    """A block's clean latents [1, C, F, Y, X]."""

    block: Block
    latents_BCFYX: Tensor


@dataclass(frozen=True, slots=True)
class Window:
    """What a forward runs on: the recomputed context, then the block's own frames."""

    latents_BCFYX: Tensor  # B is 1; with the channels that the job gives, where the model takes such
    noise_level_BF: Tensor
    levels: tuple[float, ...]  # the same, as numbers
    frames_before: int

    def own_frames(self) -> "Window":
        """The block's own frames, without what is before them."""
        first = self.frames_before
        latents = self.latents_BCFYX[:, :, first:]
        return Window(latents, self.noise_level_BF[:, first:], self.levels[first:], 0)

    def repeated(self, batch: int) -> tuple[Tensor, Tensor]:
        """Latents and noise levels, once per branch in the batch."""
        if batch == 1:
            return self.latents_BCFYX, self.noise_level_BF
        return self.latents_BCFYX.repeat(batch, 1, 1, 1, 1), self.noise_level_BF.repeat(batch, 1)
