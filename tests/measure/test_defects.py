"""Each measure ranks clips with the fault it is for below clean ones, by more than scenes differ, and is
blind to those that its docstring says it cannot tell.
"""

import functools
import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from vidgen.measure.apart import spatial_scores, temporal_score
from vidgen.measure.fidelity import boundary_jump, flicker, psnr, ssim
from vidgen.measure.steadiness import frozen_share, largest_step, look_drift, motion_smoothness, sharpness
from vidgen.world import WORLDS, render_clips

NUM_FRAMES = 32
BLOCK = 8


def clips(count: int, seed: int, num_frames: int, *, is_moving: bool) -> Tensor:
    """[B, 3, F, 32, 32] of different scenes of the full world."""
    scenes = [scene for scene in WORLDS["full"].scenes() if not is_moving or scene.motion != "still"]
    rng = random.Random(seed)
    return render_clips(rng.sample(scenes, count), num_frames=num_frames, size=32, rng=rng)


def keep(video: Tensor) -> Tensor:
    return video


def freeze(video: Tensor) -> Tensor:
    return video[:, :, :1].expand_as(video)


def stutter(video: Tensor) -> Tensor:
    """Every frame twice, at half the speed."""
    return video[:, :, : video.shape[2] // 2].repeat_interleave(2, dim=2)


def flash(video: Tensor) -> Tensor:
    """A little lighter and darker by turns."""
    return video + 0.05 * ((torch.arange(video.shape[2]) % 2) * 2 - 1).view(1, 1, -1, 1, 1)


def shuffle(video: Tensor) -> Tensor:
    return video[:, :, torch.randperm(video.shape[2], generator=torch.Generator().manual_seed(1))]


def blur(video: Tensor) -> Tensor:
    frames = functional.pad(video.transpose(1, 2).flatten(0, 1), (1,) * 4, mode="replicate")
    return functional.avg_pool2d(frames, 3, 1).unflatten(0, (len(video), -1)).transpose(1, 2)


def jump(video: Tensor) -> Tensor:
    """Everything a third of the frame to the right in every other block."""
    out = video.clone()
    for start in range(BLOCK, video.shape[2], 2 * BLOCK):
        out[:, :, start : start + BLOCK] = out[:, :, start : start + BLOCK].roll(10, -1)
    return out


def fade(video: Tensor) -> Tensor:
    """Contrast falls to half."""
    return video * torch.linspace(1, 0.5, video.shape[2]).view(1, 1, -1, 1, 1)


def border_jump(video: Tensor) -> float:
    return boundary_jump(video, list(range(BLOCK, NUM_FRAMES, BLOCK)))


Defect = Callable[[Tensor], Tensor]
Measure = Callable[[Tensor], float]
WORSE: list[tuple[Measure, Defect, int]] = [  # sign: whether the fault makes the figure larger
    (flicker, flash, 1),
    (motion_smoothness, flash, -1),
    (motion_smoothness, shuffle, -1),
    (motion_smoothness, jump, -1),
    (frozen_share, freeze, 1),
    (frozen_share, stutter, 1),
    (largest_step, jump, 1),
    (border_jump, jump, 1),
    (sharpness, blur, -1),
    (look_drift, fade, 1),
]
BLIND: list[tuple[Measure, Defect]] = [
    (flicker, freeze),
    (motion_smoothness, freeze),
    (motion_smoothness, blur),
    (frozen_share, blur),
    (frozen_share, shuffle),
    (largest_step, blur),
    (border_jump, flash),
    (sharpness, shuffle),
    (sharpness, flash),
    (look_drift, flash),
    (look_drift, jump),
]


@functools.cache
def figures(measure: Measure, defect: Defect) -> Tensor:
    """Of six moving scenes."""
    found = defect(clips(6, 0, NUM_FRAMES, is_moving=True))
    return torch.tensor([measure(video) for video in found])


@pytest.mark.parametrize(("measure", "defect", "sign"), WORSE)
def test_a_fault_is_worse_in_every_scene_and_by_more_than_scenes_differ(measure, defect, sign):
    clean, faulty = figures(measure, keep), figures(measure, defect)
    assert (sign * (faulty - clean) > 0).all()
    assert sign * (faulty.mean() - clean.mean()) > 2 * clean.std()


@pytest.mark.parametrize(("measure", "defect"), BLIND)
def test_a_measure_is_blind_to_what_it_cannot_tell(measure, defect):
    clean, other = figures(measure, keep), figures(measure, defect)
    assert (other.mean() - clean.mean()).abs() <= 2 * clean.std() + 0.002


@pytest.mark.parametrize("defect", [flash, shuffle, blur, jump, fade, freeze, stutter])
def test_every_fault_is_far_from_the_clean_clip(defect):
    video = clips(6, 0, NUM_FRAMES, is_moving=True)
    nearly = video + 0.01 * torch.randn(video.shape, generator=torch.Generator().manual_seed(0))
    assert psnr(defect(video), video) < psnr(nearly, video) - 6
    if defect is not flash:  # structure is left as it was
        assert ssim(defect(video), video) < ssim(nearly, video) - 0.01


@functools.cache
def sets() -> tuple[Tensor, Tensor]:
    """Two sets of 64 clips of 16 frames, drawn apart from one world; of the first 32 of each."""
    return clips(64, 1, 16, is_moving=False), clips(64, 2, 16, is_moving=False)


TEMPORAL = [freeze, shuffle, flash, stutter]


@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize("defect", [*TEMPORAL, jump])
def test_faults_in_time_take_the_temporal_score(defect, size):
    references, others = (part[:size] for part in sets())
    clean, chance = temporal_score(others, references), temporal_score(references, others)
    assert clean == pytest.approx(chance) and clean > 0.75
    assert temporal_score(defect(others), references) < clean - 0.2


@pytest.mark.parametrize("defect", [shuffle, flash])
def test_faults_in_time_leave_the_spatial_scores(defect):
    references, others = sets()
    assert spatial_scores(defect(others), references) == pytest.approx(
        spatial_scores(others, references), abs=0.02
    )


def test_blur_takes_the_spatial_scores_and_leaves_the_temporal_one():
    references, others = sets()
    clean, blurred = spatial_scores(others, references), spatial_scores(blur(others), references)
    assert blurred[0] < clean[0] - 0.15 and blurred[1] < clean[1] - 0.3
    assert temporal_score(blur(others), references) > temporal_score(others, references) - 0.1


def test_few_things_take_diversity_and_not_fidelity():
    references, others = sets()
    few = others[:4].repeat(16, 1, 1, 1, 1)
    clean, poor = spatial_scores(others, references), spatial_scores(few, references)
    assert poor[0] > clean[0] - 0.1 and poor[1] < clean[1] - 0.5


def test_a_set_against_itself_is_full_marks():
    references, _ = sets()
    assert temporal_score(references, references) == 1
    fidelity, diversity = spatial_scores(references, references)
    assert diversity == 1 and fidelity > 0.6


def test_sets_that_cannot_be_compared_are_an_error():
    references, others = sets()
    with pytest.raises(ValueError, match="need 6 of each"):
        spatial_scores(others[:5], references)
    with pytest.raises(ValueError, match="16 frames, references of 8: need the same"):
        temporal_score(others, references[:, :, :8])
    with pytest.raises(ValueError, match=r"need \[B, 3, F >= 4, Y, X\]"):
        temporal_score(others[0], references)


@pytest.mark.parametrize(
    ("measure", "num_frames"),
    [(motion_smoothness, 2), (frozen_share, 1), (largest_step, 1), (sharpness, 0), (look_drift, 3)],
)
def test_too_short_a_video_is_an_error(measure, num_frames):
    with pytest.raises(ValueError, match=f"F >= {num_frames + 1}"):
        measure(torch.zeros(3, num_frames, 16, 16))


def test_a_step_from_stillness_is_infinitely_larger():
    video = torch.zeros(3, 8, 16, 16)
    assert largest_step(video) == 1
    video[:, 4:] = 1
    assert largest_step(video) == float("inf")
