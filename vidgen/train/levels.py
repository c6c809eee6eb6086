"""Noise levels of training windows: what a block queue will show the model.

In a render, blocks of frames stand a step apart; a window holds cleaner frames, its own and noisier ones.
"""

import torch
from torch import Tensor

SHARED_SHARE = 0.5
QUEUE_SHARE = 0.4  # the rest is independent per frame
QUEUE_STEP_RANGE = (0.02, 0.15)
BLOCK_FRAMES = (1, 2, 4)


def draw_levels(num_clips: int, num_frames: int, shift: float, generator: torch.Generator) -> Tensor:
    """Noise levels [B, F] in [0, 1].

    Of the clips, half share one level over all frames, most others rise block by block as a queue does, and
    some are independent per frame.
    """
    uniform = torch.rand(num_clips, num_frames, generator=generator)
    kind = torch.rand(num_clips, 1, generator=generator)
    shared = uniform[:, :1].expand_as(uniform)

    low, high = QUEUE_STEP_RANGE
    step = low + (high - low) * torch.rand(num_clips, 1, generator=generator)
    choice = torch.randint(len(BLOCK_FRAMES), (num_clips, 1), generator=generator)
    block_frames = torch.tensor(BLOCK_FRAMES)[choice]
    offset = (torch.rand(num_clips, 1, generator=generator) * block_frames).long()
    block = (torch.arange(num_frames) + offset) // block_frames
    centred = block - block.float().mean(dim=1, keepdim=True).round()
    queue = (shared + step * centred).clamp(0, 1)

    level = torch.where(
        kind < SHARED_SHARE, shared, torch.where(kind < SHARED_SHARE + QUEUE_SHARE, queue, uniform)
    )
    return shift * level / (1 + (shift - 1) * level)
