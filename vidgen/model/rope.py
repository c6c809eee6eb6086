"""3D rotary position embedding: frame, row and column each turn a share of a head's channels.

Source: RoFormer (arXiv 2104.09864), split over three axes as in Wan 2.1 (github.com/Wan-Video/Wan2.1).
Scores depend on relative positions only, which is what lets a block number its frames from its own start.
"""

from functools import lru_cache

import torch
from torch import Tensor

# S tokens


def axis_widths(head_width: int) -> tuple[int, int, int]:
    """Channels of a head turned by frame, row and column; each even."""
    spatial = 2 * (head_width // 6)
    return head_width - 2 * spatial, spatial, spatial


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # kept for later calls, which may train
def rotations(
    grid: tuple[int, int, int], head_width: int, theta: float, device: torch.device
) -> tuple[Tensor, Tensor]:
    """(cosines, signed sines) [S, 1, D] of all tokens of a (frames, rows, columns) grid, for kernels/rope."""
    angles = []
    for axis, (length, width) in enumerate(zip(grid, axis_widths(head_width), strict=True)):
        frequencies = theta ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
        along = torch.arange(length, dtype=torch.float64).view(-1, 1) * frequencies
        shape = [1, 1, 1, width // 2]
        shape[axis] = length
        angles.append(along.view(shape).expand(*grid, -1))
    angle_SD = torch.cat(angles, dim=-1).flatten(0, 2).unsqueeze(1)
    cosines, sines = angle_SD.cos().float(), angle_SD.sin().float()
    signed = torch.stack((-sines, sines), dim=-1).flatten(-2)
    return cosines.repeat_interleave(2, dim=-1).to(device), signed.to(device)
