"""Layouts of sliding tiles (STA, arXiv 2502.04507): windows of whole 3-D tiles, no block seen in part."""

from functools import lru_cache
from itertools import product

import torch
from torch import Tensor

from vidgen.kernels.attention.grid import Grid
from vidgen.kernels.attention.layout import BlockLayout, from_block_mask

# H heads, R = C tiles, P padded tokens (tiles times tokens of a tile), S tokens of the grid


def sliding_tile(*, grid: Grid, tile: Grid, window: Grid | tuple[Grid, ...]) -> BlockLayout:
    """The layout in which a tile sees a window of tiles, for tokens in the order of `tile_order`.

    `window` is an odd number of tiles along each axis, or one such window per head. Its centre keeps off the
    borders, so that every tile sees as many; a window wider than the grid is the whole axis. Tiles that the
    grid cuts are padded: their valid tokens come first, and only these are seen.
    """
    windows = window if isinstance(window[0], tuple) else (window,)
    return _sliding_tile(tuple(grid), tuple(tile), tuple(tuple(each) for each in windows))  # pyright: ignore


def tile_order(grid: Grid, tile: Grid) -> tuple[Tensor, Tensor]:
    """(Of which token each place in tile order is [P], at which place each token is [S]), int64.

    `tokens[:, to_tiles]` are padded to whole tiles, padding being copies of a token of the tile;
    `padded[:, from_tiles]` is back in row-major order without it.
    """
    return _tile_order(tuple(grid), tuple(tile))  # pyright: ignore


@lru_cache(maxsize=64)
def _sliding_tile(grid: Grid, tile: Grid, windows: tuple[Grid, ...]) -> BlockLayout:
    num_tiles = _num_tiles(grid, tile)
    masks = []
    for window in windows:
        if len(window) != 3 or any(size < 1 or size % 2 == 0 for size in window):
            raise ValueError(f"window={window}: need an odd number of tiles along each of 3 axes")
        axes = [_window_mask(count, min(size, count)) for count, size in zip(num_tiles, window, strict=True)]
        masks.append(torch.einsum("ax,by,cz->abcxyz", *axes).flatten(3).flatten(0, 2))
    lengths = _tile_lengths(grid, tile)
    slot = tile[0] * tile[1] * tile[2]
    return from_block_mask(
        torch.stack(masks).unsqueeze(0).bool(),
        num_queries=len(lengths) * slot,
        num_keys=len(lengths) * slot,
        query_block=slot,
        key_block=slot,
        key_lengths_BHC=None if bool((lengths == slot).all()) else lengths.view(1, 1, -1),
    )


def _window_mask(count: int, size: int) -> Tensor:
    """[count, count] 1 where a tile sees another along one axis. `size` is odd, or the whole axis."""
    first = (torch.arange(count) - size // 2).clamp(min=0, max=count - size).unsqueeze(1)
    other = torch.arange(count)
    return ((other >= first) & (other < first + size)).to(torch.uint8)


def _num_tiles(grid: Grid, tile: Grid) -> list[int]:
    if len(grid) != 3 or len(tile) != 3 or min(*grid, *tile) < 1:
        raise ValueError(f"grid={grid}, tile={tile}: need at least 1 along each of 3 axes")
    return [-(-size // step) for size, step in zip(grid, tile, strict=True)]


def _tile_lengths(grid: Grid, tile: Grid) -> Tensor:
    """Valid tokens of each tile, int32 [C]."""
    axes = [
        (size - torch.arange(0, size, step)).clamp(max=step) for size, step in zip(grid, tile, strict=True)
    ]
    return torch.einsum("a,b,c->abc", *axes).flatten().to(torch.int32)


@lru_cache(maxsize=64)
def _tile_order(grid: Grid, tile: Grid) -> tuple[Tensor, Tensor]:
    num_tiles = _num_tiles(grid, tile)
    numbers = torch.arange(grid[0] * grid[1] * grid[2]).view(grid)
    slot = tile[0] * tile[1] * tile[2]
    to_tiles = []
    for place in product(*(range(count) for count in num_tiles)):
        frame, row, column = (index * step for index, step in zip(place, tile, strict=True))
        tokens = numbers[frame : frame + tile[0], row : row + tile[1], column : column + tile[2]].flatten()
        to_tiles.append(torch.cat((tokens, tokens[:1].expand(slot - len(tokens)))))
    order = torch.cat(to_tiles)
    is_valid = (torch.arange(slot) < _tile_lengths(grid, tile).unsqueeze(1)).flatten()
    from_tiles = torch.empty(numbers.numel(), dtype=torch.int64)
    from_tiles[order[is_valid]] = is_valid.nonzero()[:, 0]
    return order, from_tiles
