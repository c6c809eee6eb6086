"""How a video changes from frame to frame and over its length, without knowing what it shows.

Videos are [3, F, Y, X] in [-1, 1]. Each figure sees one kind of fault and is blind to others; its docstring
says to which. Speeds are in pixels: shrink large frames first, so that things move a few pixels a frame at
most.
"""

import torch
from torch import Tensor
from torch.nn import functional

from vidgen.measure.fidelity import DATA_RANGE

# F frames, N frames that have two neighbours, Y X pixels

REACH = 3  # pixels a frame
PATCH = 5  # pixels a side that move together
CHUNK = 64  # frames at once
GREY_LEVEL = 2 / 255
FAINT = 1e-4  # squared differences of neighbouring pixels that count as none: half a percent of the range


def motion_smoothness(video: Tensor) -> float:
    """How well frames are foretold by their neighbours moving steadily, at most 1; 1 is smooth.

    1 - the mean absolute error, in parts of the range, of the mean of the frame before and the one after,
    each patch displaced opposite ways by the best of up to 3 pixels. The idea and the scale are those of
    VBench (Huang et al., arXiv 2311.17982), which asks a frame interpolation network instead. It tells
    flicker, shuffled frames and jumps. It cannot tell a frozen video, which is perfectly smooth, hardly a
    stutter of less than a pixel, nor blur, which helps; turning, growing, what comes out from behind and
    motion of more than 3 pixels a frame count against it.
    """
    _check(video, 3)
    frames = video.detach().float().transpose(0, 1)
    num_middle = len(frames) - 2
    total = 0.0
    for start in range(0, num_middle, CHUNK):
        part = frames[start : min(start + CHUNK, num_middle) + 2]
        total += _foretold_error(part[:-2], part[1:-1], part[2:]).sum().item()
    return 1 - total / num_middle / DATA_RANGE


def _foretold_error(before: Tensor, middle: Tensor, after: Tensor) -> Tensor:
    """[N] mean absolute error of frames [N, 3, Y, X] against the best steady motion of their patches."""
    rows, columns = middle.shape[-2:]
    padded = [functional.pad(frames, (REACH,) * 4, mode="replicate") for frames in (before, after)]
    best_NYX = torch.full_like(middle[:, :1], torch.inf)
    for dy in range(2 * REACH + 1):
        for dx in range(2 * REACH + 1):
            there = padded[0][..., dy : dy + rows, dx : dx + columns]
            back_y, back_x = 2 * REACH - dy, 2 * REACH - dx
            back = padded[1][..., back_y : back_y + rows, back_x : back_x + columns]
            error = (middle - (there + back) / 2).abs().mean(1, keepdim=True)
            patch = functional.avg_pool2d(error, PATCH, 1, PATCH // 2, count_include_pad=False)
            best_NYX = torch.minimum(best_NYX, patch)
    return best_NYX.mean((1, 2, 3))


def frozen_share(video: Tensor) -> float:
    """Share of frames that repeat the frame before: no pixel changes by more than a grey level; 0 to 1.

    It tells a stuck video or a stutter. It cannot tell whether the scene should have moved: a still scene
    without noise is rightly frozen; and noise, or a lossy file, hides a repeat.
    """
    _check(video, 2)
    largest_F = video.detach().float().diff(dim=1).abs().amax((0, 2, 3))
    return (largest_F <= 1.01 * GREY_LEVEL).float().mean().item()


def largest_step(video: Tensor) -> float:
    """The largest mean change from a frame to the next, over the median one: about 1 when change is steady.

    It tells cuts and jumps without knowing where they may be. It cannot tell a wanted cut from a fault, a
    jump from a burst of quick motion, or many jumps from one; inf when most frames stand still and some do
    not.
    """
    _check(video, 2)
    steps_F = video.detach().float().diff(dim=1).abs().mean((0, 2, 3))
    largest, median = steps_F.max().item(), steps_F.median().item()
    if median == 0:
        return 1.0 if largest == 0 else float("inf")
    return largest / median


def sharpness(video: Tensor) -> float:
    """Energy of differences between neighbouring pixels over that between pixels two apart, of (0, 1).

    About 0.25 where brightness changes smoothly, 0.5 at clean edges, 1 for noise. It tells blur of the same
    scene at the same size. It cannot tell detail from noise, and other scenes have other edges.
    """
    _check(video, 1)
    frames = video.detach().float()
    fine, coarse = (_difference_energy(frames, apart) for apart in (1, 2))
    return ((fine + FAINT / 2) / (coarse + FAINT)).mean().item()


def _difference_energy(frames: Tensor, apart: int) -> Tensor:
    """[F] mean squared difference of pixels so far apart, along rows and columns."""
    if min(frames.shape[-2:]) <= apart:
        raise ValueError(f"frames of {tuple(frames.shape[-2:])} pixels: need {apart + 1} a side")
    along_x = (frames[..., apart:] - frames[..., :-apart]).square().mean((0, 2, 3))
    along_y = (frames[..., apart:, :] - frames[..., :-apart, :]).square().mean((0, 2, 3))
    return (along_x + along_y) / 2


def look_drift(video: Tensor) -> float:
    """How far the look of the last quarter is from that of the first, in units of [-1, 1]; 0 is no drift.

    The look is the mean and the deviation of each colour over a quarter's pixels. It tells fading, changes of
    colour and exposure, and what grows or vanishes. It cannot tell a change of shape or place, nor a wanted
    change of scene from drift; a quarter should be long against the motion.
    """
    _check(video, 4)
    frames = video.detach().float()
    quarter = frames.shape[1] // 4
    first, last = (torch.cat(_look(part)) for part in (frames[:, :quarter], frames[:, -quarter:]))
    return (last - first).abs().mean().item()


def _look(frames: Tensor) -> tuple[Tensor, Tensor]:
    deviation, mean = torch.std_mean(frames.flatten(1), dim=1)
    return mean, deviation


def _check(video: Tensor, num_frames: int) -> None:
    if video.ndim != 4 or video.shape[0] != 3 or video.shape[1] < num_frames:
        raise ValueError(f"video of shape {tuple(video.shape)}: need [3, F >= {num_frames}, Y, X]")
