"""Laws of the built-in codec: orthonormal, exact with all coefficients, causal, unit variance.

How its decoder smooths borders: test_deblock.py.
"""

import random

import pytest
import torch
from torch import Tensor

from vidgen.codec.dct import DctCodec, DctConfig, dct_matrix
from vidgen.codec.protocol import Codec
from vidgen.measure.fidelity import boundary_jump, psnr, ssim
from vidgen.world import WORLDS, render_clips


def world_clips(
    num_clips: int, *, seed: int, world: str = "small", held_out: bool = False, size: int = 32
) -> Tensor:
    rng = random.Random(seed)
    scenes = WORLDS[world].split()[held_out]
    return render_clips(rng.choices(scenes, k=num_clips), num_frames=16, size=size, rng=rng)


def fitted(num_channels: int, clips: Tensor, **settings: float) -> DctCodec:
    codec = DctCodec(DctConfig(num_channels=num_channels, **settings))  # type: ignore[arg-type]
    codec.fit(clips)
    return codec


@pytest.fixture(scope="module")
def clips() -> Tensor:
    return world_clips(96, seed=0)


@pytest.fixture(scope="module")
def codec(clips: Tensor) -> DctCodec:
    return fitted(128, clips)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 8, 16])
def test_basis_is_orthonormal(size: int):
    matrix = dct_matrix(size).double()
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-6)
    torch.testing.assert_close(
        matrix[0], torch.full((size,), size**-0.5, dtype=torch.float64), rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("whitening", [0.0, 0.5, 1.0])
def test_with_all_coefficients_the_round_trip_is_exact(whitening: float):
    pixels = torch.rand(2, 3, 8, 16, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1
    codec = fitted(768, pixels, whitening=whitening, smooth_edges=0.0, smooth_joins=0.0)
    latents = codec.encode(pixels)
    assert latents.shape == (2, 768, 2, 2, 3)
    torch.testing.assert_close(codec.decode(latents), pixels, rtol=0, atol=1e-5)


def test_without_whitening_lengths_are_kept():
    """An orthonormal transform: only the common scale changes the distance of two clips."""
    pixels = torch.rand(2, 3, 4, 8, 16, generator=torch.Generator().manual_seed(0))
    codec = fitted(768, pixels, whitening=0.0)
    one, other = codec.encode(pixels)
    assert float((one - other).norm() * codec.scale[0]) == pytest.approx(
        float((pixels[0] - pixels[1]).norm()), rel=1e-4
    )


def test_decoding_block_by_block_equals_decoding_at_once(codec: DctCodec):
    latents = codec.encode(world_clips(2, seed=1))
    whole = codec.decode(latents)
    for sizes in ((1, 1, 1, 1), (3, 1), (1, 2, 1)):
        stream = codec.stream()
        parts = [stream.decode(part) for part in latents.split(sizes, dim=2)]
        assert torch.equal(torch.cat(parts, dim=2), whole)


def test_encoding_is_causal_chunk_by_chunk(codec: DctCodec):
    """A latent frame is of its own four frames and its own place only."""
    pixels = world_clips(1, seed=2)
    changed = pixels.clone()
    changed[:, :, 8:12, :8, 16:24] += 0.5
    moved = (codec.encode(changed) - codec.encode(pixels)).abs().amax(dim=(0, 1)) > 1e-4
    assert moved.nonzero().tolist() == [[2, 0, 2]]


@pytest.mark.parametrize("held_out", [False, True], ids=["trained", "held-out"])
def test_world_clips_come_back_at_more_than_30_db(held_out: bool, codec: DctCodec):
    pixels = world_clips(48, seed=3, held_out=held_out)
    back = codec.decode(codec.encode(pixels))
    assert back.shape == pixels.shape
    assert psnr(back, pixels) > 30


def test_more_channels_lose_less(clips: Tensor):
    pixels = world_clips(16, seed=4)
    quality = []
    for num_channels in (16, 64, 128, 384):
        codec = fitted(num_channels, clips)
        quality.append(psnr(codec.decode(codec.encode(pixels)), pixels))
    assert quality == sorted(quality)


@pytest.mark.parametrize("whitening", [0.0, 0.5, 1.0])
def test_latents_have_zero_mean_and_unit_variance_overall(whitening: float, clips: Tensor):
    codec = fitted(64, clips, whitening=whitening)
    by_channel = codec.encode(clips).transpose(0, 1).flatten(1)
    assert float(by_channel.var(dim=1).mean()) == pytest.approx(1, abs=1e-3)
    torch.testing.assert_close(by_channel.var(dim=1), codec.variance, rtol=1e-3, atol=1e-4)
    assert float(by_channel.mean(dim=1).abs().max()) < 1e-3
    if whitening == 1:
        torch.testing.assert_close(codec.variance, torch.ones(64))


def test_clips_not_fitted_on_have_nearly_unit_variance(codec: DctCodec):
    assert float(codec.encode(world_clips(48, seed=5)).var()) == pytest.approx(1, abs=0.2)


@pytest.mark.parametrize(("frames", "latent_frames"), [(1, 1), (3, 1), (4, 1), (5, 2), (8, 2), (65, 17)])
def test_latent_frames_round_up(frames: int, latent_frames: int, codec: DctCodec):
    assert codec.num_latent_frames(frames) == latent_frames
    assert (codec.temporal_stride, codec.spatial_stride, codec.num_channels) == (4, 8, 128)


@pytest.mark.parametrize("frames", [1, 2, 5])
def test_pixel_frames_of_latent_frames_and_back(frames: int, codec: DctCodec):
    assert codec.num_pixel_frames(frames) == 4 * frames
    assert codec.num_latent_frames(4 * frames) == frames
    assert (codec.num_pixel_frames(0), codec.num_latent_frames(0)) == (0, 0)


def test_a_stream_goes_on_from_anywhere_after_one_latent_frame(codec: DctCodec):
    any_codec: Codec = codec
    latents = codec.encode(world_clips(1, seed=6))
    assert any_codec.warm_up_frames == 1
    stream = any_codec.stream()
    stream.warm_up(latents[:, :, 1:2])
    assert torch.equal(stream.decode(latents[:, :, 2:]), codec.decode(latents)[:, :, 8:])


def test_smoothing_borders_makes_real_clips_steadier_and_more_alike(clips: Tensor, codec: DctCodec):
    pixels = world_clips(32, seed=8)
    plain = fitted(128, clips, smooth_edges=0.0, smooth_joins=0.0)
    rough, smooth = plain.decode(plain.encode(pixels)), codec.decode(codec.encode(pixels))
    side_by_side = [torch.cat(found.unbind(), dim=-1) for found in (pixels, rough, smooth)]
    jumps = [boundary_jump(video, [4, 8, 12]) for video in side_by_side]
    assert jumps[2] < 0.6 * jumps[1]
    assert abs(jumps[2] - jumps[0]) < abs(jumps[1] - jumps[0])
    assert psnr(smooth, pixels) > psnr(rough, pixels) - 0.1
    assert ssim(smooth, pixels) > ssim(rough, pixels) + 0.003


@pytest.mark.parametrize(("given", "total"), [(1, 1), (3, 4), (4, 4), (9, 5)])
def test_encoding_first_frames_equals_encoding_them_with_the_gray(given: int, total: int, codec: DctCodec):
    pixels = world_clips(1, seed=7)[:, :, :given]
    gray = torch.zeros(1, 3, 4 * total - given, 32, 32)
    expected = codec.encode(torch.cat([pixels, gray], dim=2))
    torch.testing.assert_close(codec.encode_first_frames(pixels, total), expected, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="num_latent_frames=0"):
        codec.encode_first_frames(pixels, 0)


@pytest.mark.parametrize("size", [(5, 16, 16), (4, 15, 16), (4, 16, 20)], ids=str)
def test_pixels_that_do_not_fit_the_patch_are_an_error_that_says_what_does(
    size: tuple[int, int, int], codec: DctCodec
):
    for take in (codec.encode, codec.fit):
        with pytest.raises(ValueError, match=r"need multiples of \(4, 8, 8\)"):
            take(torch.zeros(1, 3, *size))


def test_more_channels_than_a_patch_has_coefficients_are_an_error():
    with pytest.raises(ValueError, match="num_channels"):
        fitted(769, torch.rand(1, 3, 4, 16, 16))


def test_latents_of_another_number_of_channels_are_an_error(codec: DctCodec):
    with pytest.raises(ValueError, match="channels"):
        codec.decode(torch.zeros(1, 1, 1, 2, 2))
