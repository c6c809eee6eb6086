"""Everything that can be said of one video, alone and against another one."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from vidgen.measure.adherence import CLIP_FRAMES, FACTORS, MIN_FRAMES, windows
from vidgen.measure.apart import NEIGHBOURS, spatial_scores, temporal_score
from vidgen.measure.fidelity import DATA_RANGE, SSIM_WINDOW, boundary_jump, flicker, psnr, ssim
from vidgen.measure.perceptual import lpips
from vidgen.measure.steadiness import frozen_share, largest_step, look_drift, motion_smoothness, sharpness
from vidgen.world import Scene

# F frames, Y X pixels

SIDE = 64  # pixels of the shorter side at which a video alone is measured


def measure_video(
    parts: Iterable[Tensor],
    against: Iterable[Tensor] | None = None,
    *,
    block_frames: int | None = None,
    scene: Scene | None = None,
    with_lpips: bool = False,
) -> dict[str, Any]:
    """All figures of a video that comes in parts [3, F, Y, X] in [-1, 1], one in memory at a time.

    Alone it is measured at 64 pixels a side at most; nearness to `against`, in parts of the same shapes, is
    measured at full size. `block_frames` says where blocks meet, `scene` what should be seen. Figures that
    the video is too short or too small for are left out. See vidgen/measure for what each can and cannot
    tell.
    """
    pairs = Nearness(with_lpips=with_lpips)
    small, other = [], []
    if against is None:
        small = [shrink(part) for part in parts]
    else:
        for part, reference in zip(parts, against, strict=True):
            pairs.add(part, reference)
            small.append(shrink(part))
            other.append(shrink(reference))
    if not small:
        raise ValueError("video of 0 frames: need some")
    video = torch.cat(small, dim=1)
    found = {"frames": video.shape[1], **_alone(video, block_frames)}
    if scene is not None:
        found["adherence"] = _adherence(video, scene)
    if other:
        found |= {**pairs.means(), **_sets(video, torch.cat(other, dim=1))}
    return found


class Nearness:
    """PSNR, SSIM and LPIPS of a video that comes in parts, over all its frames."""

    def __init__(self, *, with_lpips: bool) -> None:
        self.with_lpips = with_lpips
        self.num_frames, self.sums = 0, dict[str, float]()

    def add(self, part: Tensor, reference: Tensor) -> None:
        """Count one more part."""
        count = part.shape[1]
        means = {"error": DATA_RANGE**2 / 10 ** (psnr(part, reference) / 10)}
        if min(part.shape[-2:]) >= SSIM_WINDOW:
            means["ssim"] = ssim(part, reference)
        if self.with_lpips:
            means["lpips"] = lpips(part, reference)
        self.num_frames += count
        for name, mean in means.items():
            self.sums[name] = self.sums.get(name, 0.0) + count * mean

    def means(self) -> dict[str, float]:
        """The figures so far."""
        means = {name: total / self.num_frames for name, total in self.sums.items()}
        error = means.pop("error")
        return {"psnr": 10 * math.log10(DATA_RANGE**2 / error) if error else math.inf, **means}


def plain(found: dict[str, Any]) -> dict[str, Any]:
    """Figures as JSON knows them: rounded, and words for those that are no numbers."""
    return {
        name: (round(value, 5) if math.isfinite(value) else str(value)) if isinstance(value, float) else value
        for name, value in found.items()
    }


def shrink(video: Tensor, side: int = SIDE) -> Tensor:
    """The video at a shorter side of `side` pixels or a little more: the mean of whole squares of pixels."""
    factor = max(1, min(video.shape[-2:]) // side)
    return functional.avg_pool2d(video, factor) if factor > 1 else video


def _alone(video: Tensor, block_frames: int | None) -> dict[str, float]:
    num_frames = video.shape[1]
    found = {"sharpness": sharpness(video)}
    if num_frames >= 2:
        found |= {name: m(video) for name, m in (("flicker", flicker), ("frozen_share", frozen_share))}
        found["largest_step"] = largest_step(video)
    if num_frames >= 3:
        found["motion_smoothness"] = motion_smoothness(video)
    if num_frames >= 4:
        found["look_drift"] = look_drift(video)
    if block_frames is not None and 1 <= block_frames < num_frames and num_frames > 2:
        found["boundary_jump"] = boundary_jump(video, list(range(block_frames, num_frames, block_frames)))
    return found


def _adherence(video: Tensor, scene: Scene) -> dict[str, str]:
    """How many windows of 16 frames show each factor of the scene, and all of them."""
    if video.shape[1] < MIN_FRAMES:
        raise ValueError(f"video of {video.shape[1]} frames: need {MIN_FRAMES} to judge what it shows")
    verdicts = [seen.verdict(scene) for seen in windows(video, min(CLIP_FRAMES, video.shape[1]))]
    return {
        name: f"{sum(getattr(verdict, name) for verdict in verdicts)}/{len(verdicts)}"
        for name in (*FACTORS, "all")
    }


def _sets(video: Tensor, reference: Tensor) -> dict[str, float]:
    """How alike the two videos' stretches of 16 frames are, in time and in space; needs six of them."""
    num_clips = video.shape[1] // CLIP_FRAMES
    if num_clips <= NEIGHBOURS:
        return {}
    clips, others = (
        torch.stack(v[:, : num_clips * CLIP_FRAMES].split(CLIP_FRAMES, dim=1)) for v in (video, reference)
    )
    fidelity, diversity = spatial_scores(clips, others)
    return {
        "temporal_score": temporal_score(clips, others),
        "spatial_fidelity": fidelity,
        "spatial_diversity": diversity,
    }
