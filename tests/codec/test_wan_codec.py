"""Laws of the Wan codec: equal to diffusers' VAE in any pieces, constant in memory, exact after a warm-up."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vidgen.bench.random_wan import Kind, Sizes, make_vae, randomise
from vidgen.codec.live_bytes import LiveBytes
from vidgen.codec.wan import WanCodec
from vidgen.codec.wan_stages import frames_to_settle

VERSIONS: dict[str, Kind] = {"2.1": "t2v", "2.2": "ti2v"}


def vae_of(version: str) -> Any:
    torch.manual_seed(0)
    return make_vae(VERSIONS[version], Sizes(vae_width=4))


@pytest.fixture(scope="module", params=VERSIONS)
def codec(request: pytest.FixtureRequest) -> WanCodec:
    return WanCodec(vae_of(request.param))


def noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def latents_for(codec: WanCodec, frames: int, rows: int = 3, columns: int = 2, batch: int = 1) -> Tensor:
    return noise(batch, codec.num_channels, frames, rows, columns)


def moving_clip(codec: WanCodec, frames: int) -> Tensor:
    """A bright disc that crosses a shaded ground, [1, 3, frames, height, width] in [-1, 1]."""
    height, width = 3 * codec.spatial_stride, 4 * codec.spatial_stride
    y, x = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    centres = torch.linspace(-0.8, 0.8, frames).view(-1, 1, 1)
    disc = ((x - centres) ** 2 + (y - centres / 2) ** 2 < 0.2).float()
    ground = (x + y).expand(frames, -1, -1) / 2
    return torch.stack([disc * 2 - 1, ground, ground * (1 - disc)]).unsqueeze(0).clamp(-1, 1)


def whole_decode(codec: WanCodec, latents: Tensor) -> Tensor:
    """By diffusers alone, as its pipelines do it."""
    config = codec.vae.config
    mean = torch.tensor(config.latents_mean).view(1, -1, 1, 1, 1)
    inverse_std = 1.0 / torch.tensor(config.latents_std).view(1, -1, 1, 1, 1)
    return codec.vae.decode(latents / inverse_std + mean).sample


def whole_encode(codec: WanCodec, pixels: Tensor) -> Tensor:
    config = codec.vae.config
    mean = torch.tensor(config.latents_mean).view(1, -1, 1, 1, 1)
    inverse_std = 1.0 / torch.tensor(config.latents_std).view(1, -1, 1, 1, 1)
    return (codec.vae.encode(pixels).latent_dist.mode() - mean) * inverse_std


def worst(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return float((found - expected).abs().max())


@pytest.mark.parametrize("parts", [(7,), (1,) * 7, (1, 1, 3, 2), (3, 4)], ids=str)
def test_decoding_in_any_parts_equals_diffusers_decode_at_once(parts: tuple[int, ...], codec: WanCodec):
    latents = latents_for(codec, 7, batch=2)
    stream = codec.stream()
    pixels = torch.cat([stream.decode(part) for part in latents.split(parts, dim=2)], dim=2)
    expected = whole_decode(codec, latents)
    assert expected.std() > 0.2  # random weights must give pictures with something in them
    assert worst(pixels, expected) == 0


def test_first_latent_frame_gives_one_pixel_frame_and_every_other_four(codec: WanCodec):
    stream, done = codec.stream(), 0
    for index, latent in enumerate(latents_for(codec, 4).split(1, dim=2)):
        pixels = stream.decode(latent)
        height, width = 3 * codec.spatial_stride, 2 * codec.spatial_stride
        assert pixels.shape == (1, 3, 1 if index == 0 else 4, height, width)
        done += pixels.shape[2]
        assert done == codec.num_pixel_frames(index + 1)
        assert codec.num_latent_frames(done) == index + 1


def test_streams_and_diffusers_own_calls_do_not_disturb_each_other(codec: WanCodec):
    one, other = latents_for(codec, 4), latents_for(codec, 4, rows=2).flip(2)
    expected = [codec.decode(one), codec.decode(other)]
    streams, found = (codec.stream(), codec.stream()), ([], [])
    for frame in range(4):
        for stream, latents, pixels in zip(streams, (one, other), found, strict=True):
            pixels.append(stream.decode(latents[:, :, frame : frame + 1]))
        codec.vae.decode(one[:, :, :2])
        codec.encode(torch.zeros(1, 3, 1, codec.spatial_stride, codec.spatial_stride))
    for pixels, whole in zip(found, expected, strict=True):
        assert worst(torch.cat(pixels, dim=2), whole) == 0


def from_the_middle(codec: WanCodec, latents: Tensor, start: int, num_warm: int, calls: int = 1) -> Tensor:
    stream = codec.stream()
    for part in latents[:, :, start - num_warm : start].tensor_split(calls, dim=2):
        stream.warm_up(part)
    return stream.decode(latents[:, :, start:])


@pytest.mark.parametrize("extra", [-12, 0, 1, 4])
@pytest.mark.parametrize("calls", [1, 3])
def test_after_the_warm_up_decoding_from_the_middle_is_exact(extra: int, calls: int, codec: WanCodec):
    start = codec.warm_up_frames + extra
    latents = latents_for(codec, start + 2, rows=1, columns=1)
    expected = codec.decode(latents)[:, :, codec.num_pixel_frames(start) :]
    found = from_the_middle(codec, latents, start, min(start, codec.warm_up_frames), calls)
    assert found.shape[2] == 8
    assert worst(found, expected) == 0


@pytest.mark.parametrize(("num_res_blocks", "reach"), [(1, 30), (2, 38)])
@pytest.mark.parametrize("version", VERSIONS)
def test_one_warm_up_frame_less_would_not_do(version: str, num_res_blocks: int, reach: int):
    """With weights that look back as far as they can."""
    config = {
        **vae_of(version).config,
        "base_dim": 4,
        "decoder_base_dim": 8,
        "num_res_blocks": num_res_blocks,
    }
    torch.manual_seed(0)
    codec = WanCodec(randomise(vae_of(version).__class__.from_config(config)))
    for part in codec.vae.decoder.modules():
        if isinstance(part, nn.Conv3d) and part.kernel_size[0] == 3:
            part.weight[:, :, 0] *= 3
            part.weight[:, :, 1:] *= 0.1
    assert codec.warm_up_frames == reach
    latents = latents_for(codec, reach + 3, rows=1, columns=1)
    expected = codec.decode(latents)[:, :, codec.num_pixel_frames(reach + 2) :]
    assert worst(from_the_middle(codec, latents, reach + 2, reach), expected) == 0
    assert worst(from_the_middle(codec, latents, reach + 2, reach - 1), expected) > 1e-6


def test_warming_up_costs_less_than_decoding(codec: WanCodec):
    """The large frames are only computed where what comes after depends on them."""
    calls: list[int] = []
    handle = codec.vae.decoder.up_blocks[-1].register_forward_hook(lambda *_: calls.append(1))
    codec.stream().warm_up(latents_for(codec, codec.warm_up_frames, rows=1, columns=1))
    handle.remove()
    assert 1 <= len(calls) <= codec.warm_up_frames / 5


def peak_of_decoding(codec: WanCodec, num_frames: int, rows: int = 3, columns: int = 4) -> int:
    stream, latents = codec.stream(), latents_for(codec, num_frames, rows, columns)
    with LiveBytes() as live:
        for latent in latents.split(1, dim=2):
            stream.decode(latent)
    return live.peak


def test_memory_of_decoding_does_not_grow_with_the_video(codec: WanCodec):
    peaks = [peak_of_decoding(codec, num_frames, 1, 2) for num_frames in (2, 9, 33)]
    assert peaks[0] < peaks[1] == peaks[2]


def test_memory_of_encoding_grows_by_the_latents_only(codec: WanCodec):
    peaks, sizes = [], []
    for frames in (17, 65):
        pixels = torch.zeros(1, 3, 1, codec.spatial_stride, codec.spatial_stride)
        with LiveBytes() as live:
            latents = codec.encode(pixels.expand(-1, -1, frames, -1, -1))
        peaks.append(live.peak)
        sizes.append(latents.nbytes)
    assert peaks[1] - peaks[0] <= 2 * (sizes[1] - sizes[0])


def test_planned_bytes_are_those_of_a_real_decode(codec: WanCodec):
    height, width = 3 * codec.spatial_stride, 4 * codec.spatial_stride
    attention_left_out = 1.02
    planned = codec.decode_bytes(height, width)
    assert planned <= peak_of_decoding(codec, 3) <= planned * attention_left_out
    tiled = WanCodec(codec.vae, tile=(4 * codec.spatial_stride, 4 * codec.spatial_stride))
    planned = tiled.decode_bytes(5 * codec.spatial_stride, 6 * codec.spatial_stride)
    assert 0.95 * planned <= peak_of_decoding(tiled, 3, 5, 6) <= planned * attention_left_out


@pytest.mark.parametrize("frames", [1, 5, 17])
def test_encoding_equals_diffusers(frames: int, codec: WanCodec):
    pixels = noise(2, 3, frames, 2 * codec.spatial_stride, 3 * codec.spatial_stride).clamp(-1, 1)
    latents = codec.encode(pixels)
    assert latents.shape == (2, codec.num_channels, codec.num_latent_frames(frames), 2, 3)
    assert latents.std() > 0.05
    assert worst(latents, whole_encode(codec, pixels)) <= 1e-6


def test_a_moving_clip_comes_back_as_from_diffusers(codec: WanCodec):
    clip = moving_clip(codec, 13)
    stream = codec.stream()
    found = torch.cat([stream.decode(part) for part in codec.encode(clip).split(1, dim=2)], dim=2)
    expected = codec.vae(clip).sample  # encode, mode, decode
    assert worst(found, expected) <= 1e-4
    assert (expected[:, :, 1:] - expected[:, :, :-1]).abs().amax() > 0.1


@pytest.mark.parametrize(("frames", "nearest"), [(2, 1), (4, 5), (16, 17), (80, 81)])
def test_other_numbers_of_frames_are_an_error_that_names_the_nearest(
    frames: int, nearest: int, codec: WanCodec
):
    pixels = torch.zeros(1, 3, 1, codec.spatial_stride, codec.spatial_stride).expand(-1, -1, frames, -1, -1)
    with pytest.raises(ValueError, match=rf"frames={frames}: .* multiple of 4; try {nearest}$"):
        codec.encode(pixels)


def test_other_sizes_are_errors_that_name_the_nearest(codec: WanCodec):
    stride = codec.spatial_stride
    with pytest.raises(ValueError, match=rf"width={stride + 1}: need a multiple of {stride}; try {stride}$"):
        codec.encode(torch.zeros(1, 3, 1, stride, stride + 1))
    with pytest.raises(ValueError, match=r"need \[batch, 3, frames, height, width\]"):
        codec.encode(torch.zeros(1, 4, 1, stride, stride))
    with pytest.raises(ValueError, match="tile height=.*: need a multiple of .* try"):
        WanCodec(codec.vae, tile=(stride * 4 + 3, stride * 4))
    with pytest.raises(ValueError, match=f"tile width=.* at least {4 * stride}; try {4 * stride}$"):
        WanCodec(codec.vae, tile=(stride * 4, stride))
    stream = codec.stream()
    stream.decode(latents_for(codec, 1))
    with pytest.raises(ValueError, match="open another"):
        stream.decode(latents_for(codec, 1, rows=4))
    with pytest.raises(ValueError, match=f"need {codec.num_channels} channels"):
        stream.decode(latents_for(codec, 1)[:, 1:])


@pytest.mark.parametrize(
    ("given", "total"), [(1, 1), (1, 6), (1, 40), (4, 3), (5, 30), (9, 3)], ids=lambda value: str(value)
)
def test_encoding_first_frames_equals_encoding_them_with_all_the_gray(
    given: int, total: int, codec: WanCodec
):
    pixels = noise(1, 3, given, codec.spatial_stride, 2 * codec.spatial_stride)
    gray = torch.zeros(1, 3, codec.num_pixel_frames(total) - given, *pixels.shape[3:])
    expected = codec.encode(torch.cat([pixels, gray], dim=2))
    assert worst(codec.encode_first_frames(pixels, total), expected) == 0


def test_no_more_gray_is_encoded_than_until_latents_repeat(codec: WanCodec):
    calls: list[int] = []
    handle = codec.vae.encoder.register_forward_hook(lambda *_: calls.append(1))
    pixels = noise(1, 3, 1, codec.spatial_stride, codec.spatial_stride)
    latents = codec.encode_first_frames(pixels, 1000)
    handle.remove()
    assert latents.shape[2] == 1000
    assert len(calls) == 1 + frames_to_settle(codec.vae.encoder) + 1
    moving = [not torch.equal(*pair) for pair in pairwise(latents.unbind(2))]
    assert frames_to_settle(codec.vae.encoder) * 0.5 < sum(moving) <= frames_to_settle(codec.vae.encoder) + 1
    with pytest.raises(ValueError, match=r"num_latent_frames=1: 5 frames are 2"):
        codec.encode_first_frames(pixels.repeat(1, 1, 5, 1, 1), 1)


@pytest.mark.parametrize("version", VERSIONS)
def test_half_precision_comes_near_and_gives_fp32(version: str):
    codec = WanCodec(vae_of(version))
    latents, pixels = latents_for(codec, 3), moving_clip(codec, 5)
    expected = codec.decode(latents), codec.encode(pixels)
    nn.Module.to(codec.vae, torch.bfloat16)
    found = codec.decode(latents), codec.encode(pixels)
    for half, full in zip(found, expected, strict=True):
        assert half.dtype == torch.float32
        assert 0 < (half - full).square().mean().sqrt() < 0.1 * full.std()


def test_streams_follow_the_codec_to_another_device():
    codec = WanCodec(vae_of("2.1"))
    stream = codec.stream()
    latents = latents_for(codec, 3)
    assert stream.decode(latents[:, :, :2]).device.type == "cpu"
    codec.to("meta")
    assert codec.device.type == "meta"
    assert stream.decode(latents[:, :, 2:]).shape == (1, 3, 4, 24, 16)
    assert codec.encode(torch.zeros(1, 3, 5, 8, 8)).device.type == "meta"
