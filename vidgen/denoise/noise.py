"""The noise every block starts from: a function of (seed, block), drawn on the CPU.

Any rank, and a resumed job, draws the same. Source of the pool: DualParal (arXiv 2505.21070): blocks share
one set of noise frames, permuted: neighbours start alike, but no block repeats the frames just before it.
"""

import hashlib

import torch
from torch import Tensor

from vidgen.types import Block, NoiseKind

# C latent channels, F latent frames, Y X latent rows and columns


class NoiseSource:
    """Noise blocks [1, C, F, Y, X] of unit variance, the same for any number of blocks."""

    def __init__(
        self,
        seed: int,
        *,
        frame_shape: tuple[int, int, int],
        block_frames: int,
        context_frames: int = 0,
        kind: NoiseKind = NoiseKind.POOL,
    ) -> None:
        self.seed, self.kind = seed, kind
        self.block_frames, self.context_frames = block_frames, context_frames
        self.frame_shape = frame_shape
        self._orders: dict[int, list[int]] = {}  # by block: which pool frames the window before + own holds

    def __call__(self, block: Block) -> Tensor:
        """[1, C, F, Y, X] of a block."""
        return self.block(block.index, block.num_frames)

    def block(self, index: int, num_frames: int | None = None) -> Tensor:
        """[1, C, F, Y, X]: the first `num_frames` (default all) noise frames of a block."""
        num_frames = self.block_frames if num_frames is None else num_frames
        if self.kind == NoiseKind.POOL:
            frames = self._pool()[self.pool_frames(index)]
        else:
            frames = self._draw("block", index, self.block_frames)
        return frames[:num_frames].transpose(0, 1).unsqueeze(0).contiguous()

    def pool_frames(self, index: int) -> list[int]:
        """Which frames of the pool a block holds, in order."""
        block, context = self.block_frames, self.context_frames
        # each under its own number: a thread that draws at the same time draws the same
        for number in range(len(self._orders), index + 1):
            order = self._orders[number - 1] if number else list(range(block + context))
            shuffled = torch.randperm(block, generator=_generator(self.seed, "order", number)).tolist()
            self._orders[number] = order[block:] + [order[i] for i in shuffled]
        return self._orders[index][context:]

    def _pool(self) -> Tensor:
        return self._draw("pool", 0, self.block_frames + self.context_frames)

    def _draw(self, purpose: str, index: int, num_frames: int) -> Tensor:
        return torch.randn((num_frames, *self.frame_shape), generator=_generator(self.seed, purpose, index))


class SlicedNoise:
    """What a source draws for a video of one block, in blocks of any sizes."""

    def __init__(self, source: NoiseSource) -> None:
        self.source = source
        self._whole_BCFYX: Tensor | None = None

    def __call__(self, block: Block) -> Tensor:
        """[1, C, F, Y, X] of a block."""
        if self._whole_BCFYX is None:
            self._whole_BCFYX = self.source.block(0)
        return self._whole_BCFYX[:, :, block.start : block.start + block.num_frames].contiguous()


def _generator(seed: int, purpose: str, index: int) -> torch.Generator:
    """A random stream of its own for every (seed, purpose, index)."""
    digest = hashlib.sha256(f"{seed}/{purpose}/{index}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=False) >> 1)
