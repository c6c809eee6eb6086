"""Laws of PSNR, SSIM, flicker and boundary jumps, on videos whose figures can be worked out by hand."""

import math
import random

import pytest
import torch
from torch import Tensor

from vidgen.measure.fidelity import boundary_jump, flicker, psnr, ssim, steps_by_place
from vidgen.world import Scene, render_clips

SCENE = Scene(colour="red", shape="square", motion="left", background="striped")


@pytest.fixture
def clip() -> Tensor:
    return render_clips([SCENE], num_frames=12, size=32, rng=random.Random(0))[0]


def noise(like: Tensor, seed: int = 0) -> Tensor:
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(seed))


def test_psnr_of_an_offset_is_known(clip):
    assert psnr(clip + 0.02, clip) == pytest.approx(20 * math.log10(2 / 0.02), abs=1e-3)
    assert psnr(clip, clip) == math.inf


def test_psnr_of_a_batch_is_of_its_mean_error(clip):
    batch = torch.stack([clip, clip])
    assert psnr(batch + torch.tensor([0.1, 0.3]).view(2, 1, 1, 1, 1), batch) == pytest.approx(
        10 * math.log10(4 / 0.05), abs=1e-3
    )


def ssim_of_a_frame_by_hand(x: Tensor, y: Tensor) -> Tensor:
    """Every 11x11 window weighed on its own, with numbers of the paper."""
    row = torch.exp(-(torch.arange(-5.0, 6.0, dtype=torch.float64) ** 2) / 4.5)
    weight = torch.outer(row, row) / row.sum() ** 2
    found = []
    for top in range(x.shape[0] - 10):
        for left in range(x.shape[1] - 10):
            a, b = x[top : top + 11, left : left + 11], y[top : top + 11, left : left + 11]
            mean_a, mean_b = (weight * a).sum(), (weight * b).sum()
            var_a, var_b = (weight * (a - mean_a) ** 2).sum(), (weight * (b - mean_b) ** 2).sum()
            both = (weight * (a - mean_a) * (b - mean_b)).sum()
            light = (2 * mean_a * mean_b + 0.0004) / (mean_a**2 + mean_b**2 + 0.0004)
            found.append(light * (2 * both + 0.0036) / (var_a + var_b + 0.0036))
    return torch.stack(found).mean()


def test_ssim_is_that_of_every_window_by_hand(clip):
    frames = clip[:, :2, :14, :17]
    other = frames + 0.2 * noise(frames)
    by_hand = torch.stack(
        [
            ssim_of_a_frame_by_hand(frames[c, f].double(), other[c, f].double())
            for c in range(3)
            for f in range(2)
        ]
    ).mean()
    assert ssim(other, frames) == pytest.approx(by_hand.item(), abs=1e-9)


def test_ssim_falls_as_noise_grows_and_is_symmetric(clip):
    assert ssim(clip, clip) == pytest.approx(1)
    found = [ssim(clip + std * noise(clip), clip) for std in (0.01, 0.05, 0.2, 1)]
    assert found == sorted(found, reverse=True) and 1 > found[0]
    other = clip + 0.1 * noise(clip)
    assert ssim(clip, other) == pytest.approx(ssim(other, clip))


def test_ssim_of_a_batch_is_the_mean_of_its_clips(clip):
    others = [clip + std * noise(clip) for std in (0.05, 0.3)]
    mean = sum(ssim(other, clip) for other in others) / 2
    assert ssim(torch.stack(others), torch.stack([clip, clip])) == pytest.approx(mean)


def test_ssim_of_frames_smaller_than_its_window_is_an_error():
    with pytest.raises(ValueError, match="need 11 a side"):
        ssim(torch.zeros(3, 4, 10, 32), torch.zeros(3, 4, 10, 32))


@pytest.mark.parametrize("measure", [psnr, ssim])
def test_videos_of_different_shapes_are_an_error(measure, clip):
    with pytest.raises(ValueError, match="need the same shape"):
        measure(clip, clip[:, :8])


def test_a_moving_object_is_next_to_no_flicker(clip):
    assert flicker(clip) < 0.001


def test_flicker_is_the_step_of_the_background(clip):
    light = 0.05 * (torch.arange(12) % 2).view(1, -1, 1, 1)
    assert flicker(clip + light) == pytest.approx(0.05, abs=1e-3)
    assert flicker(torch.stack([clip, clip + light])) == pytest.approx(0.025, abs=1e-3)


def test_flicker_of_given_pixels_counts_whatever_happens_there(clip):
    video = torch.zeros_like(clip)
    video[:, ::2, 3, 4] = 1
    mask = torch.zeros(32, 32, dtype=torch.bool)
    mask[3, 4:6] = True
    assert flicker(video, mask) == pytest.approx(0.5)
    assert flicker(video) == 0
    assert math.isnan(flicker(video, torch.zeros_like(mask)))
    with pytest.raises(ValueError, match="need bool"):
        flicker(video, mask.float())


def test_boundary_jump_is_the_ratio_of_steps():
    levels = torch.tensor([0.0, 0.1, 0.2, 0.5, 0.6, 0.7, 1.0, 1.1])
    video = levels.view(1, -1, 1, 1).expand(3, 8, 4, 4)
    assert boundary_jump(video, [3, 6]) == pytest.approx(3)
    assert boundary_jump(video[:, :3], [1]) == pytest.approx(1)


def test_boundary_jump_of_a_steady_motion_is_one(clip):
    assert boundary_jump(clip, [4, 8]) == pytest.approx(1, abs=0.1)


def test_boundary_jump_of_a_still_video():
    video = torch.zeros(3, 8, 4, 4)
    assert boundary_jump(video, [4]) == 1
    video[:, 4:] = 1
    assert boundary_jump(video, [4]) == math.inf


@pytest.mark.parametrize("boundaries", [[], [0], [12], [4, 99], list(range(1, 12))])
def test_boundaries_that_leave_nothing_to_compare_are_an_error(boundaries, clip):
    with pytest.raises(ValueError, match="some, but not all, of 1 to 11"):
        boundary_jump(clip, boundaries)


def test_what_is_no_video_is_an_error():
    for shape in [(3, 32, 32), (4, 8, 32, 32), (0, 3, 8, 32, 32)]:
        with pytest.raises(ValueError, match=r"need \[3, F, Y, X\]"):
            flicker(torch.zeros(shape))
    with pytest.raises(ValueError, match="need 2 or more"):
        flicker(torch.zeros(3, 1, 8, 8))


def test_steps_are_told_by_place():
    levels = torch.tensor([0.0, 0.1, 0.3, 0.4, 1.4, 1.5, 1.7, 1.8, 2.8, 2.9])
    video = levels.view(1, -1, 1, 1).expand(3, 10, 4, 4)
    steps = steps_by_place(video, block_frames=4, chunk_frames=2)
    assert steps == pytest.approx({"block": 1, "chunk": 0.2, "inside": 0.1}, abs=1e-6)
    whole = steps_by_place(video, block_frames=2, chunk_frames=2)
    assert set(whole) == {"block", "inside"} and whole["inside"] == pytest.approx(0.1, abs=1e-6)


def test_psnr_and_ssim_are_those_of_torchmetrics(clip):
    image = pytest.importorskip("torchmetrics.functional.image", reason="torchmetrics is not installed")
    other = (clip + 0.2 * noise(clip)).clamp(-1, 1)
    frames, others = (video.movedim(1, 0).double() for video in (clip, other))
    known = image.peak_signal_noise_ratio(others, frames, data_range=2.0)
    assert psnr(other, clip) == pytest.approx(known.item(), abs=1e-5)
    # it pads by reflection where we take whole windows only
    around = [torch.nn.functional.pad(video, (5,) * 4, mode="reflect") for video in (frames, others)]
    known = image.structural_similarity_index_measure(others, frames, data_range=2.0)
    assert ssim(around[1].movedim(0, 1), around[0].movedim(0, 1)) == pytest.approx(known.item(), abs=1e-9)
