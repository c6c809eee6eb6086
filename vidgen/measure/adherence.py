"""Whether a clip of the procedural world shows what its caption asked for: colour, shape, motion, background.

Every threshold is a property of the world (palette, sizes, speeds), read off rendered clips, clean and
through noise, blur and the codec; none was chosen by looking at what a model makes. A factor that cannot be
told is "none", which is right for no scene.
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vidgen.measure.motion import FRAMES_NEEDED, NONE, PATH_TOLERANCE, fit_motion
from vidgen.world import BACKGROUNDS, COLOURS, PATTERNS, SHAPES, Scene, background_pixels, coverage

# F frames, K backgrounds, Y X pixels; positions are (x, y) in frame sides, colours in [-1, 1]

FACTORS = ("colour", "shape", "motion", "background")
MIN_FRAMES = 8
CLIP_FRAMES = 16  # of a window, and of the clips a model is measured on
MAX_PIXEL_ERROR = 0.4  # colour distance to which a pixel is background; the palette is 0.85 off at least
FOREGROUND_SHARE = (0.02, 0.4)  # of the frame; objects of the world cover 0.11 to 0.20
MAX_BLEND_ERROR = 0.55  # from any blend of object and background; a second colour is 0.66 off at least
COLOUR_PURITY = 0.9  # object pixels among those that are neither background nor a blend
MIN_IOU = 0.75  # circle and square of equal area: 0.83


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """Which factors of a scene a clip got right."""

    colour: bool
    shape: bool
    motion: bool
    background: bool

    @property
    def all(self) -> bool:
        """Whether every factor is right."""
        return self.colour and self.shape and self.motion and self.background


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """What a clip shows, "none" where that cannot be told, and the evidence for it."""

    colour: str
    shape: str
    motion: str
    background: str
    foreground_share: tuple[float, ...]  # per frame
    path: tuple[tuple[float, float], ...]  # centroid per frame in frame sides; nan without an object
    displacement: tuple[float, float]  # mean per frame, in frame sides
    ious: dict[str, float]  # per shape, mean over the frames
    motion_errors: dict[str, float]  # per motion, distance in frame sides to its nearest path
    background_errors: dict[str, float]  # per background, mean colour distance, cut off at the object

    def verdict(self, scene: Scene) -> Verdict:
        """Which factors of `scene` are right.

        One leg of a bounce is the same clip as a stretch of "up" or "down" between the turning points: both
        captions are then right. Of 16 frames, a third of the bouncing clips are one leg and a quarter of the
        "up" and "down" clips pass for one; of 32 frames none.
        """
        is_leg = self.motion in ("up", "down") and self.motion_errors["bouncing"] <= PATH_TOLERANCE
        return Verdict(
            colour=self.colour == scene.colour,
            shape=self.shape == scene.shape,
            motion=self.motion == scene.motion or (scene.motion == "bouncing" and is_leg),
            background=self.background == scene.background,
        )


def measure_clip(clip: Tensor) -> Measured:
    """What a clip [3, F, Y, X] in [-1, 1] of at least 8 square frames shows, each factor over all frames.

    Up to some 48 frames: over more, a path of one steady speed asks too much; use `windows`.
    """
    if clip.ndim != 4 or clip.shape[0] != 3 or clip.shape[1] < MIN_FRAMES or clip.shape[2] != clip.shape[3]:
        raise ValueError(
            f"clip of shape {tuple(clip.shape)}: need one clip [3, frames >= {MIN_FRAMES}, side, side]"
        )
    # what a viewer sees; nan becomes a value far from every colour, so that it is never right
    frames = clip.detach().to("cpu", torch.float32).clamp(-1, 1).nan_to_num(nan=10.0)
    names = (*BACKGROUNDS, *PATTERNS)
    templates = torch.stack([background_pixels(name, clip.shape[-1]) for name in names]) / 127.5 - 1
    distance_KFYX = torch.stack([(frames - template.unsqueeze(1)).norm(dim=0) for template in templates])
    errors_KF = distance_KFYX.clamp_max(MAX_PIXEL_ERROR).mean((2, 3))
    clear_KF = (distance_KFYX <= MAX_PIXEL_ERROR).float().mean((2, 3)) >= 1 - FOREGROUND_SHARE[1]
    behind = int(errors_KF.mean(1).argmin())
    backgrounds = [names[k] if clear_KF[k, f] else NONE for f, k in enumerate(errors_KF.argmin(0).tolist())]

    weight_FYX, colours = _foreground(frames, templates[behind], distance_KFYX[behind])
    share_F = weight_FYX.mean((1, 2))
    visible_F = (share_F >= FOREGROUND_SHARE[0]) & (share_F <= FOREGROUND_SHARE[1])
    path_F2 = _centroids(weight_FYX)
    path_F2[~visible_F] = math.nan
    ious_FS = _ious(weight_FYX, path_F2)
    shapes = [
        SHAPES[s] if iou >= MIN_IOU else NONE
        for iou, s in zip(ious_FS.amax(1).tolist(), ious_FS.argmax(1).tolist(), strict=True)
    ]
    fit = fit_motion(path_F2)
    return Measured(
        colour=_vote(colour if seen else NONE for colour, seen in zip(colours, visible_F, strict=True)),
        shape=_vote(shapes),
        motion=fit.motion,
        background=_vote(backgrounds),
        foreground_share=tuple(share_F.tolist()),
        path=tuple((x, y) for x, y in path_F2.tolist()),
        displacement=fit.displacement,
        ious=dict(zip(SHAPES, ious_FS.mean(0).tolist(), strict=True)),
        motion_errors=fit.errors,
        background_errors=dict(zip(names, errors_KF.mean(1).tolist(), strict=True)),
    )


def judge(clip: Tensor, scene: Scene) -> Verdict:
    """Which factors of `scene` a clip [3, F, Y, X] got right."""
    return measure_clip(clip).verdict(scene)


def adherence(clips: Iterable[Tensor], scenes: Sequence[Scene]) -> dict[str, float]:
    """Shares of clips [B, 3, F, Y, X] that are right, per factor and in all four ("joint")."""
    return _shares([judge(clip, scene) for clip, scene in zip(clips, scenes, strict=True)])


def windows(video: Tensor, length: int = CLIP_FRAMES) -> list[Measured]:
    """What each stretch of `length` frames of a video [3, F, Y, X] shows, in order.

    Every frame is in a window: the last one ends with the video and may overlap the one before.
    """
    num_frames = video.shape[1]
    if not MIN_FRAMES <= length <= num_frames:
        raise ValueError(f"length={length}: need {MIN_FRAMES} to {num_frames}, the frames of this video")
    starts = [*range(0, num_frames - length, length), num_frames - length]
    return [measure_clip(video[:, start : start + length]) for start in starts]


def drift(video: Tensor, scene: Scene) -> dict[str, dict[str, float]]:
    """Shares of right windows, as `adherence` gives them, in the "first" and "last" quarter of a video."""
    quarter = video.shape[1] // 4
    if quarter < MIN_FRAMES:
        raise ValueError(
            f"video of {video.shape[1]} frames: need {4 * MIN_FRAMES} for quarters that can be judged"
        )
    parts = {"first": video[:, :quarter], "last": video[:, -quarter:]}
    return {
        name: _shares([seen.verdict(scene) for seen in windows(part, min(CLIP_FRAMES, quarter))])
        for name, part in parts.items()
    }


def _shares(verdicts: list[Verdict]) -> dict[str, float]:
    if not verdicts:
        raise ValueError("no clips: need at least one to give a share")
    right = {factor: sum(getattr(verdict, factor) for verdict in verdicts) for factor in FACTORS}
    right["joint"] = sum(verdict.all for verdict in verdicts)
    return {factor: count / len(verdicts) for factor, count in right.items()}


def _vote(labels: Iterable[str]) -> str:
    """The label that nearly every frame has."""
    counts = Counter(labels)
    label, count = counts.most_common(1)[0]
    return label if count >= FRAMES_NEEDED * counts.total() else NONE


def _sharpen(alpha: Tensor) -> Tensor:
    """Coverage with a steeper edge of the same area: noise in the background counts as nothing."""
    return ((alpha - 0.25) * 2).clamp(0, 1)


def _foreground(frames: Tensor, behind: Tensor, distance_FYX: Tensor) -> tuple[Tensor, list[str]]:
    """How much of each pixel is object [F, Y, X] in [0, 1], and the object's colour in each frame."""
    palette = torch.tensor(list(COLOURS.values())) / 127.5 - 1
    reach = torch.pdist(palette).min() / 2  # nearer than this to one colour is nearer to it than to any other
    weights, colours = [], []
    for frame, distance_YX in zip(frames.unbind(1), distance_FYX, strict=True):
        apart = distance_YX[distance_YX > MAX_PIXEL_ERROR]
        if not len(apart):
            weights.append(torch.zeros_like(distance_YX))
            colours.append(NONE)
            continue
        # edges blend into the background: the half that is farther from it is inside
        colour = frame[:, distance_YX >= apart.median()].median(1).values.view(3, 1, 1)
        contrast, error = colour - behind, frame - behind
        power_YX = contrast.square().sum(0).clamp_min(MAX_PIXEL_ERROR**2)
        alpha_YX = ((error * contrast).sum(0) / power_YX).clamp(0, 1)
        weight_YX = _sharpen(alpha_YX)
        num_odd = ((error - alpha_YX * contrast).norm(dim=0) > MAX_BLEND_ERROR).sum()
        purity = weight_YX.sum() / (weight_YX.sum() + num_odd)
        to_colour = (colour.view(1, 3) - palette).norm(dim=1)
        is_one_colour = bool(to_colour.min() <= reach and purity >= COLOUR_PURITY)
        weights.append(weight_YX)
        colours.append(list(COLOURS)[int(to_colour.argmin())] if is_one_colour else NONE)
    return torch.stack(weights), colours


def _offsets(size: int, centre_F: Tensor) -> Tensor:
    """[F, size] signed way around the torus from a centre to each pixel, in frame sides."""
    return ((torch.arange(size) + 0.5) / size - centre_F.unsqueeze(1) + 0.5) % 1 - 0.5


def _centroids(weight_FYX: Tensor) -> Tensor:
    """[F, 2] centroid (x, y) on the torus, in frame sides."""
    size = weight_FYX.shape[-1]
    angle = torch.polar(torch.ones(size), 2 * math.pi * (torch.arange(size) + 0.5) / size)
    centres = []
    for mass in (weight_FYX.sum(1), weight_FYX.sum(2)):
        centre = (mass * angle).sum(1).angle() / (2 * math.pi)
        for _ in range(2):  # the circular mean of a triangle is off its centroid; the mean of offsets is not
            centre = centre + (mass * _offsets(size, centre)).sum(1) / mass.sum(1).clamp_min(1e-6)
        centres.append(centre % 1)
    return torch.stack(centres, 1)


def _ious(weight_FYX: Tensor, path_F2: Tensor) -> Tensor:
    """[F, shapes] overlap over union with the ideal shapes of equal area at the centroid; 0 without one."""
    size = weight_FYX.shape[-1]
    radius = (weight_FYX.sum((1, 2)) / math.pi).sqrt().view(-1, 1, 1)
    dx = _offsets(size, path_F2[:, 0]).unsqueeze(1) * size
    dy = _offsets(size, path_F2[:, 1]).unsqueeze(2) * size
    ious = []
    for shape in range(len(SHAPES)):
        ideal_FYX = _sharpen(coverage(torch.tensor(shape), dx, dy, radius))
        both, either = torch.minimum(weight_FYX, ideal_FYX), torch.maximum(weight_FYX, ideal_FYX)
        ious.append(both.sum((1, 2)) / either.sum((1, 2)))
    return torch.stack(ious, 1).nan_to_num(nan=0.0)
