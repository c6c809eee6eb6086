"""Laws of decoding and encoding in tiles: exact where it can be, near the whole where it cannot."""

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vidgen.bench.random_wan import Kind, make_vae
from vidgen.codec.tiles import Grid, ramps, spans
from vidgen.codec.wan import WanCodec

VERSIONS: dict[str, Kind] = {"2.1": "t2v", "2.2": "ti2v"}


def vae_of(version: str) -> Any:
    torch.manual_seed(0)
    return make_vae(VERSIONS[version])


@pytest.fixture(scope="module", params=VERSIONS)
def codec(request: pytest.FixtureRequest) -> WanCodec:
    return WanCodec(vae_of(request.param))


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def worst(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return float((found - expected).abs().max())


def nearsighted(version: str, side_weight: float) -> Any:
    """A VAE whose convolutions weigh a pixel's neighbours so much less, and that has no attention."""
    vae = vae_of(version)
    with torch.no_grad():
        for part in vae.modules():
            if isinstance(part, nn.Conv2d | nn.Conv3d) and part.kernel_size[-1] == 3:
                sides = torch.tensor([side_weight, 1.5, side_weight])
                part.weight *= sides * sides[:, None]
        for half in (vae.encoder, vae.decoder):
            half.mid_block.attentions[0].proj.weight.zero_()
    return vae


def tiled_errors(version: str, side_weight: float, tile: int) -> tuple[float, float]:
    """Largest difference that tiles of so many latents make to smooth pixels and latents."""
    vae = nearsighted(version, side_weight)
    whole = WanCodec(vae)
    stride = whole.spatial_stride
    tiled = WanCodec(vae, tile=(tile * stride, tile * stride))
    rows, columns = 7, 9
    y, x = torch.meshgrid(
        torch.linspace(0, math.pi, rows), torch.linspace(0, math.pi, columns), indexing="ij"
    )
    channel = torch.arange(whole.num_channels).view(-1, 1, 1)
    latents = (torch.cos(channel + y) * torch.sin(0.7 * channel + x)).view(1, -1, 1, rows, columns)
    latents = latents.expand(-1, -1, 2, -1, -1)
    pixels = nn.functional.interpolate(latents[:, :3, 0], scale_factor=stride, mode="bilinear")
    pixels = pixels.unsqueeze(2).expand(-1, -1, 5, -1, -1)
    return (
        worst(tiled.decode(latents), whole.decode(latents)),
        worst(tiled.encode(pixels), whole.encode(pixels)),
    )


@pytest.mark.parametrize("version", VERSIONS)
def test_tiles_are_exact_where_no_pixel_needs_its_neighbours(version: str):
    assert max(tiled_errors(version, 0.0, 4)) <= 1e-5


@pytest.mark.parametrize("version", VERSIONS)
def test_tiles_of_smooth_content_come_near_the_whole_and_larger_ones_nearer(version: str):
    small, large = tiled_errors(version, 0.05, 4), tiled_errors(version, 0.05, 6)
    assert max(small) < 0.2  # of values that span 2
    assert max(large) < 0.1
    assert large[0] < small[0]


def test_one_tile_over_all_is_the_whole(codec: WanCodec):
    stride = codec.spatial_stride
    tiled = WanCodec(codec.vae, tile=(8 * stride, 4 * stride))
    latents, pixels = noise(1, codec.num_channels, 3, 8, 4), noise(1, 3, 5, 8 * stride, 4 * stride)
    assert worst(tiled.decode(latents), codec.decode(latents)) == 0
    assert worst(tiled.encode(pixels), codec.encode(pixels)) == 0


def test_tiles_stream_as_they_decode_at_once(codec: WanCodec):
    tiled = WanCodec(codec.vae, tile=(4 * codec.spatial_stride, 4 * codec.spatial_stride))
    latents = noise(1, codec.num_channels, 4, 5, 4)
    stream = tiled.stream()
    parts = torch.cat([stream.decode(part) for part in latents.split((1, 2, 1), dim=2)], dim=2)
    assert worst(parts, tiled.decode(latents)) == 0
    assert worst(parts, codec.decode(latents)) > 0  # there were tiles


@pytest.mark.parametrize(
    ("size", "tile"), [(60, 32), (33, 32), (5, 4), (9, 4), (104, 32), (7, 6), (100, 5)], ids=str
)
def test_tiles_cover_all_and_their_weights_sum_to_one(size: int, tile: int):
    found = spans(size, tile)
    assert found[0][0] == 0
    assert found[-1][1] == size
    assert all(stop - start == tile for start, stop in found)
    assert all(before[1] - after[0] >= max(1, tile // 4) for before, after in pairwise(found))
    total = torch.zeros(size * 3)
    for (start, stop), weight in zip(found, ramps(found, 3), strict=True):
        total[start * 3 : stop * 3] += weight
    torch.testing.assert_close(total, torch.ones(size * 3))


def test_cut_tiles_join_again():
    frames = noise(1, 3, 2, 18, 26)
    grid = Grid(9, 13, (4, 5))
    assert len(grid) > 4
    torch.testing.assert_close(grid.join(grid.cut(frames, 2), 2), frames)
