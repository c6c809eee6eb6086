"""Laws of deblocking: small steps at borders shrink, edges and motion stay, nothing is held back."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from vidgen.builtin import load_small
from vidgen.codec.dct import DctCodec, DctConfig
from vidgen.codec.deblock import smooth_edges, smooth_join
from vidgen.codec.live_bytes import LiveBytes
from vidgen.limits import PIXEL_COPIES

PATCHES = [(4, 8, 8), (2, 4, 8), (8, 4, 4), (3, 8, 4)]
CUTS = [(6,), (1,) * 6, (2, 3, 1), (1, 5), (4, 2)]


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def codec_of(patch: tuple[int, int, int] = (4, 8, 8), **settings: float) -> DctCodec:
    codec = DctCodec(DctConfig(patch=patch, num_channels=24, **settings))  # type: ignore[arg-type]
    codec.fit(torch.rand(4, 3, *(2 * size for size in patch), generator=torch.Generator().manual_seed(1)))
    return codec


def cut(latents: Tensor, cuts: Sequence[int], codec: DctCodec) -> Tensor:
    stream = codec.stream()
    return torch.cat([stream.decode(part) for part in latents.split(list(cuts), dim=2)], dim=2)


def still(value: float, num_frames: int = 4) -> Tensor:
    return torch.full((1, 3, num_frames, 8, 8), value)


def test_the_shipped_codec_and_every_older_file_deblock():
    config = load_small(with_dit=False).codec.config
    assert (config.smooth_edges, config.smooth_joins) == (0.15, 0.5)


@pytest.mark.parametrize("patch", PATCHES, ids=str)
@pytest.mark.parametrize("cuts", CUTS, ids=str)
def test_decoding_in_any_cuts_is_whole_decoding_bit_for_bit(patch: tuple[int, int, int], cuts: Sequence[int]):
    codec = codec_of(patch)
    latents = noise(2, 24, 6, 3, 2)
    whole = codec.decode(latents)
    assert torch.equal(cut(latents, cuts, codec), whole)
    assert not torch.equal(whole, codec_of(patch, smooth_edges=0.0, smooth_joins=0.0).decode(latents))


@pytest.mark.parametrize("patch", [*PATCHES, (1, 8, 8)], ids=str)
@pytest.mark.parametrize("start", [1, 2, 5])
def test_after_its_warm_up_a_stream_goes_on_exactly_and_without_it_does_not(
    patch: tuple[int, int, int], start: int
):
    codec = codec_of(patch)
    assert codec.warm_up_frames == (patch[0] > 1)
    latents = noise(1, 24, 6, 2, 2)
    expected = codec.decode(latents)[:, :, start * patch[0] :]
    stream, cold = codec.stream(), codec.stream()
    stream.warm_up(latents[:, :, start - codec.warm_up_frames : start])
    assert torch.equal(stream.decode(latents[:, :, start:]), expected)
    assert torch.equal(cold.decode(latents[:, :, start:]), expected) == (patch[0] == 1)


def test_more_warm_up_than_needed_changes_nothing_and_none_is_a_beginning():
    codec, latents = codec_of(), noise(1, 24, 4, 2, 2)
    stream = codec.stream()
    stream.warm_up(latents[:, :, :0])
    assert torch.equal(stream.decode(latents[:, :, :1]), codec.decode(latents[:, :, :1]))
    stream = codec.stream()
    stream.warm_up(latents[:, :, :3])
    assert torch.equal(stream.decode(latents[:, :, 3:]), codec.decode(latents)[:, :, 12:])


def test_frames_depend_on_no_later_latent_and_on_one_before():
    codec, latents = codec_of(), noise(1, 24, 5, 2, 2)
    other = latents.clone()
    other[:, :, 2] = noise(1, 24, 2, 2, seed=9)
    moved = (codec.decode(other) != codec.decode(latents)).any(dim=1).any(dim=-1).any(dim=-1)[0]
    assert moved.nonzero().flatten().tolist() == list(range(8, 15))  # the last frame of the next never moves


def test_videos_of_a_batch_and_streams_of_a_codec_do_not_disturb_each_other():
    codec, latents = codec_of(), noise(3, 24, 4, 2, 2)
    whole = codec.decode(latents)
    streams = [codec.stream() for _ in latents]
    for frame in range(4):
        for index, stream in enumerate(streams):
            found = stream.decode(latents[index : index + 1, :, frame : frame + 1])
            expected = whole[index : index + 1, :, 4 * frame : 4 * frame + 4]
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)  # other batches, other last bits


@pytest.mark.parametrize("limit", [0.15, 0.5])
def test_a_small_step_between_still_chunks_is_shared_out_and_ends_where_it_should(limit: float):
    step = 0.8 * limit
    smooth = smooth_join(still(0.1), still(0.1 + step), limit)
    shown = torch.cat([still(0.1), smooth], dim=2)[0, 0, :, 4, 4]
    torch.testing.assert_close(shown[4:], 0.1 + step * torch.tensor([0.2, 0.4, 0.7, 1.0]))
    assert float(shown.diff().max()) <= 0.31 * step


@pytest.mark.parametrize("size", [1.0, 1.01, 1.5])
def test_a_step_of_twice_the_limit_is_a_cut_and_stays(size: float):
    chunk = still(-0.5 + size)
    torch.testing.assert_close(smooth_join(still(-0.5), chunk, 0.5), chunk, rtol=0, atol=1e-6)


@pytest.mark.parametrize("limit", [0.15, 0.5])
def test_how_much_a_step_is_smoothed_changes_without_a_jump(limit: float):
    sizes = torch.linspace(0, 3 * limit, 301)
    given = torch.stack([smooth_join(still(0), still(float(size)), limit)[0, 0, 0, 0, 0] for size in sizes])
    assert float(given.diff().abs().max()) < 2 * 3 * limit / 300  # never twice as steep as what comes in


def test_steady_change_is_left_alone():
    ramp = torch.linspace(-0.8, 0.8, 8).view(1, 1, 8, 1, 1).expand(1, 3, 8, 8, 8)
    torch.testing.assert_close(smooth_join(ramp[:, :, :4], ramp[:, :, 4:], 0.5), ramp[:, :, 4:])
    across = torch.linspace(-0.8, 0.8, 24).view(1, 1, 1, 1, 24).expand(1, 3, 2, 8, 24)
    torch.testing.assert_close(smooth_edges(across, 4, 8, 0.5), across)


def test_where_something_moves_only_the_first_frame_gives_way():
    before, chunk = still(0.0), still(0.3)
    for frames in (before, chunk):
        frames[:, 0, 1::2, 4, 4] += 0.2  # flickers by the change that counts as motion
    smooth = smooth_join(before, chunk, 0.5)
    changed = (smooth - chunk).abs()[0, 0] > 1e-6
    near, far = changed[:, 3:6, 3:6].flatten(1), changed[:, :2, :2].flatten(1)
    assert near.any(1).tolist() == [True, False, False, False]
    assert far.all(1).tolist() == [True, True, True, False]


@pytest.mark.parametrize("dim", [3, 4], ids=["rows", "columns"])
@pytest.mark.parametrize("period", [2, 4, 8])
def test_a_small_edge_between_patches_is_a_third_and_an_edge_within_one_stays(dim: int, period: int):
    pixels = torch.zeros(1, 3, 2, 24, 24)
    pixels.movedim(dim, 0)[2 * period :] = 0.12
    line = smooth_edges(pixels, dim, period, 0.15).movedim(dim, 0)
    height = line[2 * period] - line[2 * period - 1]
    torch.testing.assert_close(height, torch.full_like(height, 0.04))
    for one_patch, limit in ((24, 0.15), (period, 0.0)):
        assert torch.equal(smooth_edges(pixels, dim, one_patch, limit), pixels)


def test_all_pixels_stay_in_range_and_latents_of_half_precision_are_taken():
    codec = codec_of()
    latents = 20 * noise(1, 24, 3, 2, 2)
    assert float(codec.decode(latents).abs().max()) <= 1
    half = latents.half()
    assert torch.equal(codec.decode(half), codec.decode(half.float()))


@pytest.mark.parametrize("num_frames", [1, 4, 16])
def test_decoding_holds_no_more_than_planned_and_a_stream_one_chunk(num_frames: int):
    codec = DctCodec(DctConfig())
    stream, latents = codec.stream(), noise(1, 128, num_frames, 8, 8)
    stream.decode(latents)
    with LiveBytes() as live:
        pixels = stream.decode(latents)
    assert live.peak <= PIXEL_COPIES * pixels.nbytes
    one_chunk = pixels.nbytes // num_frames
    del pixels
    assert live.now <= 2 * one_chunk


@pytest.mark.parametrize("name", ["smooth_edges", "smooth_joins"])
def test_a_limit_below_zero_is_an_error(name: str):
    with pytest.raises(ValueError, match=f"{name}=-1"):
        DctConfig(**{name: -1})  # type: ignore[arg-type]


def test_latents_of_another_video_in_a_stream_are_an_error():
    stream = codec_of().stream()
    stream.decode(noise(1, 24, 1, 2, 2))
    with pytest.raises(ValueError, match="one stream is one video"):
        stream.decode(noise(1, 24, 1, 2, 3))


@pytest.mark.gpu
def test_on_a_gpu_any_cuts_are_whole_decoding():
    codec, latents = codec_of().cuda(), noise(2, 24, 6, 3, 2)
    whole = codec.decode(latents)
    assert whole.device.type == "cuda" and torch.equal(cut(latents, (2, 1, 3), codec), whole)
    torch.testing.assert_close(whole.cpu(), codec_of().decode(latents), rtol=0, atol=1e-4)
