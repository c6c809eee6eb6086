"""How near a video is to another one, and how steady it is, without knowing what it shows.

Videos are [3, F, Y, X] or batches [B, 3, F, Y, X] in [-1, 1]; a batch gives one figure over all its clips.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional

# B batch, C colours, F frames, Y X pixels

DATA_RANGE = 2.0  # of values in [-1, 1]
SSIM_WINDOW = 11  # pixels
SSIM_SIGMA = 1.5  # pixels


def psnr(video: Tensor, reference: Tensor) -> float:
    """Peak signal-to-noise ratio in dB, of the mean squared error over everything; inf when equal."""
    _check_pair(video, reference)
    error = (video.float() - reference.float()).square().double().mean().item()
    return math.inf if error == 0 else 10 * math.log10(DATA_RANGE**2 / error)


def ssim(video: Tensor, reference: Tensor) -> float:
    """Structural similarity, at most 1: mean over frames and colours, whole windows only.

    Wang, Bovik, Sheikh and Simoncelli, "Image quality assessment", IEEE TIP 13(4), 2004: gaussian window of
    11x11 pixels with sigma 1.5, K1 = 0.01, K2 = 0.03.
    """
    _check_pair(video, reference)
    if min(video.shape[-2:]) < SSIM_WINDOW:
        raise ValueError(
            f"frames of {tuple(video.shape[-2:])} pixels: need {SSIM_WINDOW} a side for the window of SSIM"
        )
    # double: the variances are small differences of large numbers
    x, y = (clips.double().movedim(-4, -3).reshape(-1, 1, *clips.shape[-2:]) for clips in (video, reference))
    mean_x, mean_y = _window_mean(x), _window_mean(y)
    variance_x = _window_mean(x * x) - mean_x * mean_x
    variance_y = _window_mean(y * y) - mean_y * mean_y
    covariance = _window_mean(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * DATA_RANGE) ** 2, (0.03 * DATA_RANGE) ** 2
    light = (2 * mean_x * mean_y + c1) / (mean_x * mean_x + mean_y * mean_y + c1)
    structure = (2 * covariance + c2) / (variance_x + variance_y + c2)
    return (light * structure).mean().item()


def flicker(video: Tensor, still: Tensor | None = None, *, max_deviation: float = 0.25) -> float:
    """Mean absolute difference of consecutive frames where nothing moves, in units of [-1, 1]; 0 is steady.

    The measure that VBench calls temporal flickering (Huang et al., arXiv:2311.17982), who take it over whole
    frames of static scenes; here over the pixels `still` ([Y, X] or [B, Y, X], bool). Without it, those whose
    every colour stays within `max_deviation` of its median over time: stronger flicker then passes for
    motion, and faint edges of what moves for flicker. nan without a still pixel.
    """
    clips = _batch(video)
    if clips.shape[2] < 2:
        raise ValueError(f"video of {clips.shape[2]} frame(s): need 2 or more to compare")
    if still is None:
        away = (clips - clips.median(2, keepdim=True).values).abs().amax((1, 2))
        still_BYX = away <= max_deviation
    else:
        if still.shape[-2:] != clips.shape[-2:] or still.dtype != torch.bool:
            raise ValueError(
                f"still is {still.dtype} {tuple(still.shape)}: need bool of {tuple(clips.shape[-2:])}"
            )
        still_BYX = still.expand(len(clips), *still.shape[-2:])
    steps_BYX = clips.diff(dim=2).abs().mean((1, 2))
    return steps_BYX[still_BYX].mean().item()


def boundary_jump(video: Tensor, boundaries: list[int]) -> float:
    """Mean absolute frame difference where blocks meet, over that inside blocks: 1 when no border is seen.

    `boundaries` are the first frames of blocks: b is the step from frame b - 1 to b, so 1 to F - 1. inf when
    the video stands still but for its borders, 1 when it stands still.
    """
    clips = _batch(video)
    num_frames = clips.shape[2]
    at_border = set(boundaries)
    if not at_border or not at_border < set(range(1, num_frames)):
        raise ValueError(f"boundaries={boundaries}: need some, but not all, of 1 to {num_frames - 1}")
    steps = clips.diff(dim=2).abs().mean((0, 1, 3, 4)).tolist()
    border = [step for frame, step in enumerate(steps, 1) if frame in at_border]
    inside = [step for frame, step in enumerate(steps, 1) if frame not in at_border]
    mean_border, mean_inside = sum(border) / len(border), sum(inside) / len(inside)
    if mean_inside == 0:
        return 1.0 if mean_border == 0 else math.inf
    return mean_border / mean_inside


def steps_by_place(video: Tensor, block_frames: int, chunk_frames: int) -> dict[str, float]:
    """Mean absolute change from frame to frame where blocks meet, where chunks within them do, and elsewhere.

    Sizes are pixel frames; a chunk is what the codec decodes at once. The three tell apart what
    `boundary_jump` mixes: a codec's own steps are as large at "chunk" as at "block", a model's are not. A
    kind of place that there is not is left out.
    """
    changes = _batch(video).diff(dim=2).abs().mean((0, 1, 3, 4))
    frame = torch.arange(1, len(changes) + 1, device=changes.device)
    at_block, at_chunk = frame % block_frames == 0, frame % chunk_frames == 0
    places = {"block": at_block, "chunk": at_chunk & ~at_block, "inside": ~at_chunk & ~at_block}
    return {name: changes[where].mean().item() for name, where in places.items() if where.any()}


def _batch(video: Tensor) -> Tensor:
    if video.ndim not in (4, 5) or video.shape[-4] != 3 or not video.numel():
        raise ValueError(f"video of shape {tuple(video.shape)}: need [3, F, Y, X] or [B, 3, F, Y, X]")
    return video.detach().float().reshape(-1, *video.shape[-4:])


def _check_pair(video: Tensor, reference: Tensor) -> None:
    _batch(video)
    if video.shape != reference.shape:
        raise ValueError(
            f"video of {tuple(video.shape)}, reference of {tuple(reference.shape)}: need the same shape"
        )


def _window_mean(images: Tensor) -> Tensor:
    """Gaussian mean of images [N, 1, Y, X] around each pixel whose window fits."""
    offset = torch.arange(SSIM_WINDOW, dtype=images.dtype, device=images.device) - SSIM_WINDOW // 2
    row = torch.exp(-offset.square() / (2 * SSIM_SIGMA**2))
    row = row / row.sum()
    return functional.conv2d(functional.conv2d(images, row.view(1, 1, 1, -1)), row.view(1, 1, -1, 1))
