"""Tile sizes of the Triton attention kernel, and which of them is fastest here."""

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import triton


@dataclass(frozen=True, kw_only=True, slots=True)
class Tile:
    """Queries and keys that a program multiplies at a time: powers of two from 16 that divide the blocks."""

    queries: int
    keys: int
    num_warps: int = 4
    num_stages: int = 2

    def __post_init__(self) -> None:
        for name in ("queries", "keys"):
            size = getattr(self, name)
            if size < 16 or size & (size - 1):
                raise ValueError(f"a tile of {size} {name}: need a power of two from 16")

    def divides(self, blocks: tuple[int, int]) -> bool:
        """Whether blocks of so many (queries, keys) are a number of these tiles."""
        return not (blocks[0] % self.queries or blocks[1] % self.keys)

    def meta(self) -> dict[str, Any]:
        """The kernel's arguments that say so."""
        return {
            "QUERY_TILE": self.queries,
            "KEY_TILE": self.keys,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }


# Given _MOST_PER_THREAD, ptxas spills almost no register of these at head dimensions up to 128 (triton 3.7.1;
# sm_80 and sm_90). Those that need too much shared memory are left out by Triton when it tries them.
_HALF = (
    Tile(queries=128, keys=128, num_warps=8, num_stages=2),
    Tile(queries=128, keys=64, num_warps=8, num_stages=2),
    Tile(queries=128, keys=64, num_warps=8, num_stages=3),
    Tile(queries=128, keys=64, num_warps=4, num_stages=3),
    Tile(queries=128, keys=32, num_warps=4, num_stages=4),
    Tile(queries=64, keys=128, num_warps=4, num_stages=2),
    Tile(queries=64, keys=64, num_warps=4, num_stages=2),
    Tile(queries=64, keys=64, num_warps=4, num_stages=3),
    Tile(queries=64, keys=32, num_warps=4, num_stages=4),
)
_SINGLE = (
    Tile(queries=64, keys=32, num_warps=8),
    Tile(queries=32, keys=32),
    Tile(queries=32, keys=16),
    Tile(queries=16, keys=16),
)
_MOST_PER_THREAD = 160  # of its 255 registers, for accumulators and logits in fp32


def candidates(blocks: tuple[int, int] | None, padded_dim: int, bytes_each: int) -> list[Tile]:
    """Tiles worth trying for a layout's (query, key) blocks, or for dense attention (None)."""
    pool = [
        tile
        for tile in (_HALF if bytes_each == 2 else _SINGLE)
        if tile.queries * (tile.keys + padded_dim) <= _MOST_PER_THREAD * 32 * tile.num_warps
    ]
    if blocks is None:
        return pool
    largest = fixed_tile(blocks)  # for blocks that no common tile divides, such as 48
    pool = [tile for tile in pool if tile.divides(blocks)] or [largest, replace(largest, num_stages=3)]
    # a block's number is loaded before its keys, and each load takes its own share of the stages
    return [replace(tile, num_stages=2 * tile.num_stages - 1) for tile in pool]


def fixed_tile(blocks: tuple[int, int] | None) -> Tile:
    """The largest tile up to 64 x 64 that divides the blocks."""
    queries, keys = blocks or (64, 64)
    return Tile(queries=min(queries & -queries, 64), keys=min(keys & -keys, 64))


def tuned(
    kernel: Any,
    blocks: tuple[int, int] | None,
    padded_dim: int,
    bytes_each: int,
    num_queries: int,
    num_keys: int,
) -> Any:
    """The kernel with the fastest tile, tried once per kind of layout and power of two of tokens."""
    sizes = triton.next_power_of_2(num_queries), triton.next_power_of_2(num_keys)
    return _tuned(kernel, tuple(candidates(blocks, padded_dim, bytes_each)), *sizes)


@cache
def _tuned(kernel: Any, tiles: tuple[Tile, ...], queries: int, keys: int) -> Any:
    configs = []
    for tile in tiles:
        meta = tile.meta()
        stages, warps = meta.pop("num_stages"), meta.pop("num_warps")
        configs.append(triton.Config(meta, num_warps=warps, num_stages=stages))
    return triton.autotune(configs, key=["QUERY_BLOCK", "KEY_BLOCK", "DIM"])(kernel)
