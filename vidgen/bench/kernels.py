"""Attention kernels against dense attention, and against what their density allows at best.

A sparse row's `of ideal` is its share of 1 / density, over the fastest dense backend of this machine, with
making the layout in the time. All rows of a table are from one run, their readings taking turns.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vidgen.bench.machine import interleaved
from vidgen.kernels.attention.api import attention
from vidgen.kernels.attention.backends import BACKENDS, BY_NAME_ONLY, Request, able
from vidgen.kernels.attention.layout import BlockLayout
from vidgen.kernels.attention.mass import block_mass
from vidgen.kernels.attention.select import top_k
from vidgen.kernels.attention.tiles import sliding_tile

# B batch, S tokens, H heads, D head dimension, R rows, C key blocks

TILE, GRID = (4, 8, 8), (8, 32, 32)  # of the sliding tile case: 32 tiles of 256 tokens
TILE_WINDOW = (1, 3, 3)


@dataclass(frozen=True, kw_only=True)
class KernelCase:
    """Sizes of a table."""

    tokens: int = 8192
    heads: int = 2
    head_dim: int = 64
    block: int = 128
    densities: tuple[float, ...] = (1.0, 0.5, 0.2, 0.1)
    device: str = "cpu"
    dtype: str = "float32"
    repeats: int = 5
    threads: int = 1

    def draw(self, tokens: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [1, S, H, D]."""
        generator = torch.Generator().manual_seed(0)
        shape = (1, tokens or self.tokens, self.heads, self.head_dim)
        dtype = getattr(torch, self.dtype)
        first, second, third = (
            torch.randn(shape, generator=generator).to(self.device, dtype) for _ in range(3)
        )
        return first, second, third


@torch.inference_mode()
def bench_kernels(case: KernelCase) -> list[dict[str, Any]]:
    """A row per kernel and layout: milliseconds, share of dense, speed-up, share of what is ideal."""
    torch.set_num_threads(case.threads)
    query, key, value = case.draw()
    dense = _dense_backends(query)
    rows = _rows(case, _dense_cases(query, key, value, dense), dense)
    for density in case.densities:
        rows += _rows(case, _block_cases(case, query, key, value, density), dense, density)
    rows += _tile_rows(case, dense)
    return rows + _search_rows(case, query, key, dense)


Cases = dict[str, Callable[[], object]]


def _dense_backends(query: Tensor) -> list[str]:
    return [b.name for b in able(Request.of(query, None, False)) if b.name not in BY_NAME_ONLY | {"flex"}]


def _dense_cases(query: Tensor, key: Tensor, value: Tensor, names: list[str]) -> Cases:
    def run(name: str) -> Callable[[], object]:
        return lambda: attention(query, key, value, backend=name)

    return {f"dense, {name}": run(name) for name in names}


def _sparse_backends(query: Tensor, layout: BlockLayout) -> list[str]:
    return [b.name for b in able(Request.of(query, layout, False)) if b.name not in BY_NAME_ONLY]


def _block_cases(case: KernelCase, query: Tensor, key: Tensor, value: Tensor, density: float) -> Cases:
    """Random blocks, equally many in every row, a choice of their own for every head."""
    blocks = -(-case.tokens // case.block)
    mass = torch.rand(1, case.heads, blocks, blocks, generator=torch.Generator().manual_seed(1)).to(
        query.device
    )
    count = max(1, round(density * blocks))

    def build() -> BlockLayout:
        return top_k(
            mass,
            count,
            num_queries=case.tokens,
            num_keys=case.tokens,
            query_block=case.block,
            key_block=case.block,
        )

    def run(name: str) -> Callable[[], object]:
        if name == "flex":  # what it prepares for a layout stays: its share of the time is not ours to add
            ready = build()
            return lambda: attention(query, key, value, layout=ready, backend=name)
        return lambda: attention(query, key, value, layout=build(), backend=name)

    cases: Cases = {f"blocks, {name}": run(name) for name in _sparse_backends(query, build())}
    if density == 1:
        cases["blocks, auto"] = lambda: attention(query, key, value, layout=build(), backend="auto")
    return cases


def _rows(
    case: KernelCase, cases: Cases, dense: list[str], density: float = 1.0, tokens: int | None = None
) -> list[dict[str, Any]]:
    query, key, value = case.draw(tokens)
    yardsticks = _dense_cases(query, key, value, dense)
    every = yardsticks | cases
    for run in every.values():
        run()  # compile, measure, fill caches
    times = interleaved(every, case.repeats, case.device)
    best = min(times[name] for name in yardsticks)
    return [
        {
            "kernel": name,
            "tokens": tokens or case.tokens,
            "density": round(density, 4),
            "ms": round(1000 * times[name], 2),
            "of dense": round(times[name] / best, 3),
            "speed-up": round(best / times[name], 2),
            "of ideal": round(best / times[name] * density, 3),
        }
        for name in cases
    ]


def _tile_rows(case: KernelCase, dense: list[str]) -> list[dict[str, Any]]:
    """Sliding tile windows over a video, whose tokens are in the order of the tiles."""
    tokens = GRID[0] * GRID[1] * GRID[2]
    query, key, value = case.draw(tokens)
    layout = sliding_tile(grid=GRID, tile=TILE, window=TILE_WINDOW).on(query.device)

    def run(name: str) -> Callable[[], object]:
        return lambda: attention(query, key, value, layout=layout, backend=name)

    cases: Cases = {f"sliding tile, {name}": run(name) for name in _sparse_backends(query, layout)}
    return _rows(case, cases, dense, layout.work, tokens)


def _search_rows(case: KernelCase, query: Tensor, key: Tensor, dense: list[str]) -> list[dict[str, Any]]:
    """AdaSpa's search: the exact mass of every block from a cached LSE, against a dense pass."""
    _, lse = attention(query, key, key, return_lse=True)
    cases: Cases = {
        "search (block mass)": lambda: block_mass(
            query, key, lse, query_block=case.block, key_block=case.block
        )
    }
    return _rows(case, cases, dense)


def absent_backends() -> dict[str, str]:
    """The backends that are not on this machine, and why."""
    from vidgen.kernels.attention.backends import absent

    reasons = {name: absent(name) for name in BACKENDS}
    return {name: reason for name, reason in reasons.items() if reason is not None}
