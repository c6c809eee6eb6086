"""Steps that a codec of independent patches leaves where they meet, made small: a deblocking filter.

What counts as a step at a border is the jump across it beyond what the values go on changing by on both
sides. A small one is the codec's fault and is shared out around the border; a large one is an edge of what is
shown, and stays. The idea is that of video codecs' loop filters (List et al., "Adaptive deblocking filter",
IEEE TCSVT 13(7), 2003); the weights here were measured on the built-in model's videos and on real clips.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

# B batch, T frames of one chunk, Y X pixels: pixels_B3TYX in [-1, 1]

MOVING = (0.5, 0.0, 0.0)  # parts of a step that the first frames of a chunk give up where something moves
STILL = (0.8, 0.6, 0.3)  # and where nothing does, so that the step is no motion
STILL_CHANGE = 0.2  # a pixel whose colour changes by so much from frame to frame moves


def smooth_edges(pixels_B3TYX: Tensor, dim: int, period: int, limit: float) -> Tensor:
    """Pixels whose steps at every multiple of `period` along `dim`, rows or columns, are a third as high.

    Steps beyond `limit` are changed less, from twice the limit on not at all.
    """
    size = pixels_B3TYX.shape[dim]
    if limit == 0 or period < 2 or size <= period:
        return pixels_B3TYX
    border = torch.arange(period, size, period, device=pixels_B3TYX.device)
    line = [pixels_B3TYX.index_select(dim, border + offset) for offset in (-2, -1, 0, 1)]
    third = _step(line, limit) / 3
    return pixels_B3TYX.index_add(dim, border - 1, third).index_add(dim, border, -third)


def smooth_join(before_B3TYX: Tensor, chunk_B3TYX: Tensor, limit: float) -> Tensor:
    """The frames of a chunk, led over from those of the chunk before, which are shown already and stay.

    Only the chunk itself and the last two frames before it count, both as they came from the codec, and the
    last frame is never changed: whoever knows one chunk can go on exactly. Limit: see `smooth_edges`.
    """
    num_frames = chunk_B3TYX.shape[2]
    if limit == 0 or num_frames < 2:
        return chunk_B3TYX
    near = torch.cat([before_B3TYX[:, :, -2:], chunk_B3TYX[:, :, :4]], dim=2)
    step_B3YX = _step(near[:, :, :4].unbind(2), limit)
    still_B1YX = _stillness(near)
    smooth = chunk_B3TYX.clone()
    for frame, moving, still in zip(range(num_frames - 1), MOVING, STILL, strict=False):
        smooth[:, :, frame] -= step_B3YX * (moving + (still - moving) * still_B1YX)
    return smooth


def _step(line: Sequence[Tensor], limit: float) -> Tensor:
    """How far the third of four is from where they lead; less beyond the limit, 0 from twice the limit on."""
    before, left, right, after = line
    step = (right - left) - ((left - before) + (after - right)) / 2
    size = step.abs()
    return step.sign() * torch.minimum(size, (2 * limit - size).clamp_min(0))


def _stillness(near_B3TYX: Tensor) -> Tensor:
    """[B, 1, Y, X]: 1 where neither side of the border after the second frame changes, 0 where it moves.

    The border itself does not count. A pixel moves as much as those beside it do.
    """
    change_B3TYX = near_B3TYX.diff(dim=2).abs()
    change_B3TYX[:, :, 1] = 0
    change_B1YX = change_B3TYX.amax(dim=(1, 2)).unsqueeze(1)
    change_B1YX = functional.max_pool2d(change_B1YX, 3, stride=1, padding=1)
    return (1 - change_B1YX / STILL_CHANGE).clamp_min(0)
