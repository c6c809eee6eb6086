"""Laws of sliding tiles: as many tiles for all, none in part, and an order of tokens that can be undone."""

from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from vidgen.kernels.attention.reference import attention_reference
from vidgen.kernels.attention.tiles import sliding_tile, tile_order

Triple = tuple[int, int, int]
grids = st.tuples(st.integers(1, 7), st.integers(1, 7), st.integers(1, 7))
tiles = st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 8))
windows = st.tuples(*[st.sampled_from([1, 3, 5])] * 3)


def explicit(grid: Triple, tile: Triple, window: Triple) -> Tensor:
    """[S, S] in row-major order: along each axis, tiles at most half a window from the clamped centre."""
    near = []
    for size, step, width in zip(grid, tile, window, strict=True):
        count = -(-size // step)
        own = torch.arange(size) // step
        half = width // 2
        centre = own.clamp(half, max(count - 1 - half, half)) if width <= count else torch.zeros_like(own)
        reach = half if width <= count else count
        near.append((centre.unsqueeze(1) - own).abs() <= reach)
    mask = torch.einsum("ax,by,cz->abcxyz", *(axis.byte() for axis in near)).bool()
    return mask.flatten(3).flatten(0, 2)


@given(grids, tiles, windows)
def test_every_tile_sees_as_many_tiles_at_borders_and_corners_too(grid: Triple, tile: Triple, window: Triple):
    layout = sliding_tile(grid=grid, tile=tile, window=window)
    counts = layout.full.counts_BHR
    assert (counts == counts[0, 0, 0]).all() and layout.partial is None
    expected = 1
    for size, step, width in zip(grid, tile, window, strict=True):
        expected *= min(width, -(-size // step))
    assert counts[0, 0, 0] == expected


@given(grids, tiles, windows)
def test_among_valid_tokens_the_layout_is_the_window_of_tiles(grid: Triple, tile: Triple, window: Triple):
    layout = sliding_tile(grid=grid, tile=tile, window=window)
    _, from_tiles = tile_order(grid, tile)
    mask = layout.dense_mask()[0, 0]
    assert torch.equal(mask[from_tiles][:, from_tiles], explicit(grid, tile, window))
    is_padding = torch.ones(layout.num_keys, dtype=torch.bool)
    is_padding[from_tiles] = False
    assert not mask[:, is_padding].any()


@given(grids, tiles)
def test_the_order_of_tiles_can_be_undone_and_pads_with_tokens_of_the_tile(grid: Triple, tile: Triple):
    to_tiles, from_tiles = tile_order(grid, tile)
    tokens = torch.arange(grid[0] * grid[1] * grid[2])
    assert torch.equal(tokens[to_tiles][from_tiles], tokens)
    frame, row, column = torch.unravel_index(to_tiles, grid)
    step = torch.tensor(tile)
    tile_of = torch.stack((frame, row, column), 1) // step
    slots = tile_of.view(-1, tile[0] * tile[1] * tile[2], 3)
    assert (slots == slots[:, :1]).all()
    assert len(slots[:, 0].unique(dim=0)) == len(slots)


@pytest.mark.parametrize(
    ("grid", "tile", "window"),
    [((4, 4, 4), (2, 2, 2), (1, 1, 1)), ((3, 5, 7), (2, 2, 4), (1, 3, 3)), ((2, 3, 3), (4, 4, 4), (3, 3, 3))],
    ids=["even", "ragged", "tile over grid"],
)
def test_attention_in_tile_order_is_that_of_the_row_major_mask(grid: Triple, tile: Triple, window: Triple):
    generator = torch.Generator().manual_seed(0)
    num_tokens = grid[0] * grid[1] * grid[2]
    query, key, value = (torch.randn(2, num_tokens, 2, 4, generator=generator) for _ in range(3))
    to_tiles, from_tiles = tile_order(grid, tile)
    layout = sliding_tile(grid=grid, tile=tile, window=window)
    padded, _ = attention_reference(query[:, to_tiles], key[:, to_tiles], value[:, to_tiles], layout)
    logits = torch.einsum("bqhd,bkhd->bhqk", query.double(), key.double()) / 2
    weights = logits.masked_fill(~explicit(grid, tile, window), -torch.inf).softmax(-1)
    torch.testing.assert_close(
        padded[:, from_tiles], torch.einsum("bhqk,bkhd->bqhd", weights, value.double())
    )


@given(grids, tiles)
def test_a_window_as_wide_as_the_grid_sees_all_tokens(grid: Triple, tile: Triple):
    layout = sliding_tile(grid=grid, tile=tile, window=(9, 9, 9))
    assert layout.work == 1
    assert layout.density_BH.item() == pytest.approx(1)


def test_each_head_may_have_its_window():
    windows = ((1, 3, 3), (3, 1, 1), (1, 1, 1))
    grid, tile = (6, 6, 8), (2, 2, 2)
    together = sliding_tile(grid=grid, tile=tile, window=windows).dense_mask()
    for head, window in enumerate(windows):
        assert torch.equal(
            together[0, head], sliding_tile(grid=grid, tile=tile, window=window).dense_mask()[0, 0]
        )


def test_lengths_are_given_only_where_the_grid_cuts_tiles():
    assert sliding_tile(grid=(4, 4, 4), tile=(2, 2, 2), window=(1, 1, 1)).key_lengths_BHC is None
    lengths = sliding_tile(grid=(3, 2, 2), tile=(2, 2, 2), window=(1, 1, 1)).key_lengths_BHC
    assert lengths is not None and lengths.flatten().tolist() == [8, 4]


@pytest.mark.parametrize(
    ("grid", "tile", "window"),
    [
        ((4, 4, 4), (2, 2, 2), (2, 1, 1)),
        ((4, 4, 4), (2, 2, 2), (1, 1, -1)),
        ((4, 4, 4), (2, 0, 2), (1, 1, 1)),
    ],
    ids=["even", "negative", "no tile"],
)
def test_what_cannot_be_is_an_error(grid: Triple, tile: Triple, window: Triple):
    with pytest.raises(ValueError, match="need"):
        sliding_tile(grid=grid, tile=tile, window=window)


def test_a_tile_away_from_borders_sees_what_its_neighbour_sees_shifted():
    counts, window = (7, 6, 8), (3, 3, 5)
    mask = sliding_tile(grid=counts, tile=(1, 1, 1), window=window).block_mask()[0, 0].view(*counts, *counts)
    inner = [range(width // 2, count - width // 2) for width, count in zip(window, counts, strict=True)]
    for frame, row, column in product(*inner):
        shifted = mask[3, 3, 3].roll((frame - 3, row - 3, column - 3), (0, 1, 2))
        assert torch.equal(mask[frame, row, column], shifted)
