"""Noise levels of training windows: what a block queue will show the model.

In a render, blocks of frames stand a step apart; a window holds cleaner frames, its own and noisier ones.
"""

import torch
from torch import Tensor

INDEPENDENT_SHARE = 0.1  # of the clips: a level of its own for every frame
QUEUE_STEP_RANGE = (0.02, 0.15)
BLOCK_FRAMES = (1, 2, 4)


def draw_levels(
    num_clips: int, num_frames: int, shift: float, generator: torch.Generator, queue_share: float = 0.4
) -> Tensor:
    """Noise levels [B, F] in [0, 1].

    Of the clips, `queue_share` rise block by block as a queue does, some are independent per frame, and the
    others share one level over all frames.
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

    shared_share = 1 - queue_share - INDEPENDENT_SHARE
    level = torch.where(
        kind < shared_share, shared, torch.where(kind < shared_share + queue_share, queue, uniform)
    )
    return shift * level / (1 + (shift - 1) * level)
