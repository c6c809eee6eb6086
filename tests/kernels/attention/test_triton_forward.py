"""Laws of the Triton kernel of attention: what the reference says, for any layout, size and stride."""

import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")

from vidgen.kernels.attention import triton_forward
from vidgen.kernels.attention.layout import (
    BlockLayout,
    BlockLists,
    PartialBlocks,
    from_block_mask,
    from_rule,
)
from vidgen.kernels.attention.reference import attention_reference
from vidgen.kernels.attention.triton_tiles import Tile, candidates

Draw = Callable[..., Tensor]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
BATCH, HEADS, QUERIES, KEYS, BLOCKS = 2, 2, 70, 101, (32, 32)
SIZES: dict[str, Any] = {"num_queries": QUERIES, "num_keys": KEYS, "query_block": 32, "key_block": 32}
ROWS, COLUMNS = 3, 4


def mask(batch: int = 1, heads: int = 1) -> Tensor:
    found = torch.rand(batch, heads, ROWS, COLUMNS, generator=torch.Generator().manual_seed(3)) < 0.7
    found[..., 2] = False
    return found


def lengths(batch: int = 1, heads: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(4)
    found = torch.randint(0, 33, (batch, heads, COLUMNS), generator=generator, dtype=torch.int32)
    found[..., 0], found[..., -1] = 32, 3
    return found


def log_weights(batch: int = 1, heads: int = 1) -> Tensor:
    found = 3 * torch.randn(batch, heads, COLUMNS, generator=torch.Generator().manual_seed(5))
    found[..., 1] = -math.inf
    return found


def band(width: int = 40) -> BlockLayout:
    return from_rule(lambda query, key: (query - key).abs() < width, **SIZES)


def everything() -> BlockLayout:
    """Full lists per head, partial lists per batch entry, lengths and weights; no block is in two."""
    partial = band().partial
    assert partial is not None
    counts = partial.lists.counts_BHR.repeat(BATCH, 1, 1)
    counts[1] = counts[1].clamp(max=1)
    lists = BlockLists(counts_BHR=counts, indices_BHRM=partial.lists.indices_BHRM.repeat(BATCH, 1, 1, 1))
    full = mask(1, HEADS) & ~lists.mask(COLUMNS).any(0, keepdim=True)
    more: dict[str, Any] = {
        "key_lengths_BHC": lengths(BATCH, 1),
        "key_log_weights_BHC": log_weights(1, HEADS),
    }
    ids = partial.tile_ids_BHRM.repeat(BATCH, 1, 1, 1)
    tiles = PartialBlocks(lists=lists, tile_ids_BHRM=ids, tiles_Nqk=partial.tiles_Nqk)
    return from_block_mask(full, **SIZES, partial=tiles, **more)


def with_an_empty_row() -> BlockLayout:
    some = mask(1, HEADS)
    some[0, 1, 1] = False
    return from_block_mask(some, **SIZES)


LAYOUTS: dict[str, Callable[[], BlockLayout | None]] = {
    "dense": lambda: None,
    "full": lambda: from_block_mask(mask(), **SIZES),
    "full-per-head": lambda: from_block_mask(mask(1, HEADS), **SIZES),
    "full-per-batch-and-head": lambda: from_block_mask(mask(BATCH, HEADS), **SIZES),
    "partial": band,
    "partial-with-blind-queries": lambda: from_rule(lambda query, key: (query > 40) & (key < query), **SIZES),
    "lengths": lambda: from_block_mask(mask(), **SIZES, key_lengths_BHC=lengths(1, HEADS)),
    "partial-lengths": lambda: replace(band(), key_lengths_BHC=lengths(BATCH, 1), prepared={}),
    "weights": lambda: from_block_mask(mask(), **SIZES, key_log_weights_BHC=log_weights()),
    "empty-row": with_an_empty_row,
    "nothing": lambda: from_block_mask(torch.zeros_like(mask()), **SIZES),
    "everything": everything,
}


def on(device: torch.device, layout: BlockLayout | None) -> BlockLayout | None:
    return None if layout is None else layout.to(device)


def inputs(
    draw: Draw, dtype: torch.dtype = torch.float32, head_dim: int = 20
) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = (draw(BATCH, n, HEADS, head_dim, dtype=dtype) for n in (QUERIES, KEYS, KEYS))
    return query, key, value


@pytest.fixture
def holds(at_most_twice: Any, memory_of_nans: Any) -> Callable[..., None]:
    """Asserts that the kernel does for these inputs what the reference says."""

    def check(
        qkv: tuple[Tensor, ...],
        layout: BlockLayout | None,
        tile: Tile | None = None,
        scale: float | None = None,
    ) -> None:
        query, key, value = qkv
        factor = query.shape[-1] ** -0.5 if scale is None else scale
        with memory_of_nans():
            out, lse = triton_forward.run(query, key, value, layout, factor, True, tile)
        exact, exact_lse = attention_reference(query, key, value, layout, scale)
        eager, _ = attention_reference(query, key, value, layout, scale, query.dtype)
        assert out.dtype == query.dtype and out.is_contiguous()
        at_most_twice(out, eager, exact)
        assert lse is not None and lse.dtype == torch.float32
        torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-5, atol=1e-5)

    return check


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", LAYOUTS)
def test_error_at_most_twice_that_of_plain_torch(
    kind: str, dtype: torch.dtype, draw: Draw, device: torch.device, holds: Any
):
    tile = Tile(queries=32, keys=32)
    holds(inputs(draw, dtype), on(device, LAYOUTS[kind]()), tile)


@pytest.mark.parametrize("kind", ["dense", "full-per-head", "everything"])
@pytest.mark.parametrize(
    "sizes", [(16, 16), (16, 32), (32, 16)], ids=lambda sizes: f"tile{sizes[0]}x{sizes[1]}"
)
def test_blocks_are_cut_into_any_tiles_that_divide_them(
    kind: str, sizes: tuple[int, int], draw: Draw, device: torch.device, holds: Any
):
    holds(inputs(draw), on(device, LAYOUTS[kind]()), Tile(queries=sizes[0], keys=sizes[1]))


@pytest.mark.parametrize("head_dim", [1, 17, 64, 96, 128, 256])
@pytest.mark.parametrize("kind", ["dense", "partial"])
def test_any_head_dim(kind: str, head_dim: int, draw: Draw, device: torch.device, holds: Any):
    holds(
        inputs(draw, head_dim=head_dim), on(device, LAYOUTS[kind]()), Tile(queries=32, keys=32, num_stages=1)
    )


@pytest.mark.parametrize(
    ("num_queries", "num_keys"), [(1, 1), (1, 33), (33, 1), (16, 48), (47, 64)], ids=lambda n: str(n)
)
@pytest.mark.parametrize("blocks", [None, (16, 32), (48, 16)], ids=["dense", "16x32", "48x16"])
def test_any_number_of_queries_and_keys(
    blocks: tuple[int, int] | None,
    num_queries: int,
    num_keys: int,
    draw: Draw,
    device: torch.device,
    holds: Any,
):
    qkv = tuple(draw(1, n, 3, 8) for n in (num_queries, num_keys, num_keys))
    layout = None
    if blocks is not None:
        rows, columns = -(-num_queries // blocks[0]), -(-num_keys // blocks[1])
        seen = torch.rand(1, 3, rows, columns, generator=torch.Generator().manual_seed(0)) < 0.7
        layout = from_block_mask(
            seen, num_queries=num_queries, num_keys=num_keys, query_block=blocks[0], key_block=blocks[1]
        )
    holds(qkv, on(device, layout))


def test_no_queries_or_no_keys_give_nothing(device: torch.device):
    for num_queries, num_keys in ((0, 5), (5, 0)):
        query, key = (torch.ones(2, n, 3, 8, device=device) for n in (num_queries, num_keys))
        out, lse = triton_forward.run(query, key, key, None, 1.0, True)
        assert lse is not None
        assert torch.equal(out, torch.zeros_like(query))
        assert torch.equal(lse, torch.full((2, 3, num_queries), -math.inf, device=device))


STRIDES: dict[str, Callable[[Draw], tuple[Tensor, ...]]] = {
    "heads-first": lambda draw: tuple(
        draw(BATCH, HEADS, n, 20).transpose(1, 2) for n in (QUERIES, KEYS, KEYS)
    ),
    "joint-key-value": lambda draw: (
        draw(BATCH, QUERIES, HEADS, 20),
        *draw(BATCH, KEYS, 2, HEADS, 20).unbind(2),
    ),
    "shared-heads": lambda draw: (
        draw(BATCH, QUERIES, HEADS, 20),
        *(draw(1, KEYS, 1, 20).expand(BATCH, KEYS, HEADS, 20) for _ in range(2)),
    ),
    "channels-apart": lambda draw: tuple(draw(BATCH, n, HEADS, 40)[..., ::2] for n in (QUERIES, KEYS, KEYS)),
    "tokens-apart": lambda draw: tuple(draw(BATCH, 2 * n, HEADS, 20)[:, ::2] for n in (QUERIES, KEYS, KEYS)),
}


@pytest.mark.parametrize("strides", STRIDES)
def test_any_strides(strides: str, draw: Draw, device: torch.device, holds: Any):
    holds(STRIDES[strides](draw), on(device, band()))


@pytest.mark.parametrize("scale", [0.0, 0.7, -0.3])
@pytest.mark.parametrize("kind", ["dense", "partial"])
def test_any_scale(kind: str, scale: float, draw: Draw, device: torch.device, holds: Any):
    holds(inputs(draw), on(device, LAYOUTS[kind]()), scale=scale)


def test_large_logits_do_not_overflow(draw: Draw, device: torch.device, holds: Any):
    query, key, value = inputs(draw)
    holds((100 * query, 100 * key, value), None)


@pytest.mark.parametrize("kind", ["full", "lengths", "everything"])
def test_what_no_query_of_a_row_sees_does_not_matter_at_all(kind: str, draw: Draw, device: torch.device):
    """Not even where it is NaN: unlisted blocks, and keys past a block's length."""
    layout = on(device, LAYOUTS[kind]())
    assert layout is not None
    query, key, value = inputs(draw)
    listed = layout.block_mask().any(0).any(0).any(0).repeat_interleave(32)[:KEYS]
    place = torch.arange(COLUMNS * 32, device=device) % 32
    there = (place < layout.lengths_BHC.repeat_interleave(32, -1)).any(0).any(0)[:KEYS] & listed
    assert not there.all()
    poison = ~there.view(1, -1, 1, 1)
    clean = triton_forward.run(query, key, value, layout, 0.3, True)
    key, value = (tensor.masked_fill(poison, math.nan) for tensor in (key, value))
    for found, expected in zip(triton_forward.run(query, key, value, layout, 0.3, True), clean, strict=True):
        assert found is not None and expected is not None
        assert torch.equal(found, expected)


def test_a_layout_of_all_blocks_is_dense_attention(draw: Draw, device: torch.device):
    layout = from_block_mask(torch.ones_like(mask()), **SIZES).to(device)
    tile, qkv = Tile(queries=32, keys=32), inputs(draw)
    found, dense = (triton_forward.run(*qkv, kind, 0.3, True, tile) for kind in (layout, None))
    torch.testing.assert_close(found, dense, rtol=1e-6, atol=1e-6)


def test_without_lse_there_is_none_and_the_same_attention(draw: Draw):
    query, key, value = inputs(draw)
    out, lse = triton_forward.run(query, key, value, None, 0.3, False)
    assert lse is None
    assert torch.equal(out, triton_forward.run(query, key, value, None, 0.3, True)[0])


def test_long_rows_start_first_and_a_layout_is_prepared_once(draw: Draw, device: torch.device):
    layout = on(device, everything())
    assert layout is not None
    qkv = inputs(draw)
    triton_forward.run(*qkv, layout, 0.3, False)
    (prepared,) = layout.prepared.values()
    order = prepared["order"].long()
    assert sorted(order.tolist()) == list(range(BATCH * HEADS * ROWS))
    work = layout.block_mask().sum(-1).expand(BATCH, HEADS, ROWS).flatten()[order]
    assert (work.diff() <= 0).all() and work[0] > work[-1]
    triton_forward.run(*qkv, layout, 0.3, False)
    assert next(iter(layout.prepared.values())) is prepared


def test_what_cannot_be_done_is_an_error(draw: Draw, device: torch.device):
    query, key, value = inputs(draw)
    layout = band().to(device)
    with pytest.raises(ValueError, match="one that divides them"):
        triton_forward.run(query, key, value, layout, 0.3, False, Tile(queries=64, keys=32))
    with pytest.raises(ValueError, match="power of two"):
        Tile(queries=48, keys=32)
    with pytest.raises(ValueError, match="gradients"):
        triton_forward.run(query.clone().requires_grad_(), key, value, layout, 0.3, False)
    narrow = from_block_mask(
        torch.ones(1, 1, 9, 13, dtype=torch.bool), num_queries=70, num_keys=101, query_block=8, key_block=8
    )
    with pytest.raises(ValueError, match="multiples of 16"):
        triton_forward.run(query, key, value, narrow.to(device), 0.3, False)
    with pytest.raises(ValueError, match="this layout needs"):
        triton_forward.run(query[:, 1:], key, value, layout, 0.3, False)


@pytest.mark.parametrize("blocks", [None, (16, 16), (48, 80), (64, 64), (128, 64), (384, 384)], ids=str)
@pytest.mark.parametrize("padded_dim", [16, 64, 128, 256])
@pytest.mark.parametrize("bytes_each", [2, 4])
def test_there_are_tiles_to_try_for_every_layout(
    blocks: tuple[int, int] | None, padded_dim: int, bytes_each: int
):
    tiles = candidates(blocks, padded_dim, bytes_each)
    assert tiles and all(blocks is None or tile.divides(blocks) for tile in tiles)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device, on which the kernel runs")
def test_without_a_device_or_the_interpreter_loading_says_so(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    code = "from vidgen.kernels.attention.triton_forward import load; load()"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stderr.splitlines()[-1].startswith("ImportError: Triton needs a CUDA device")


GPU_BLOCKS = {"64x64": (64, 64), "128x128": (128, 128), "384x384": (384, 384), "48x80": (48, 80)}


def larger(blocks: str, draw: Draw, dtype: torch.dtype, head_dim: int) -> tuple[Any, BlockLayout | None]:
    """Inputs on the device, and blocks at random per head with a band of partial ones."""
    num_queries, num_keys = 1111, 2221
    qkv = tuple(draw(1, n, 3, head_dim, dtype=dtype) for n in (num_queries, num_keys, num_keys))
    if blocks == "dense":
        return qkv, None
    query_block, key_block = GPU_BLOCKS[blocks]
    rows, columns = -(-num_queries // query_block), -(-num_keys // key_block)
    seen = torch.rand(1, 3, rows, columns, generator=torch.Generator().manual_seed(0)) < 0.4
    sizes: dict[str, Any] = {"num_queries": num_queries, "num_keys": num_keys, "query_block": query_block}
    partial = from_rule(lambda query, key: (query - key).abs() < 150, **sizes, key_block=key_block).partial
    assert partial is not None
    seen &= ~partial.lists.mask(columns)
    return qkv, from_block_mask(seen, **sizes, key_block=key_block, partial=partial).to(qkv[0].device)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("head_dim", "dtype"),
    [(64, "bfloat16"), (96, "bfloat16"), (128, "bfloat16"), (128, "float16"), (256, "bfloat16")],
)
@pytest.mark.parametrize("blocks", ["dense", *GPU_BLOCKS])
def test_larger_sizes(blocks: str, head_dim: int, dtype: str, draw: Draw, holds: Any):
    tile = Tile(queries=16, keys=16) if blocks == "48x80" else Tile(queries=64, keys=64, num_stages=3)
    holds(*larger(blocks, draw, getattr(torch, dtype), head_dim), tile)


@pytest.mark.gpu
@pytest.mark.parametrize("blocks", ["dense", "128x128", "48x80"])
def test_the_tile_found_fastest_is_right(blocks: str, draw: Draw, holds: Any):
    holds(*larger(blocks, draw, torch.bfloat16, 128))


@pytest.mark.gpu
def test_the_tile_found_fastest_in_fp32_is_right(draw: Draw, holds: Any):
    holds(*larger("64x64", draw, torch.float32, 64))


@pytest.mark.gpu
def test_offsets_past_two_to_the_31(device: torch.device):
    tokens = 2**31 // 4096 + 70_001
    key = torch.zeros(1, tokens, 32, 128, dtype=torch.bfloat16, device=device)
    value = torch.zeros_like(key)
    value[:, -1] = 2.0
    query = torch.zeros(1, 16, 32, 128, dtype=torch.bfloat16, device=device)
    tile = Tile(queries=16, keys=64, num_stages=3)
    out, lse = triton_forward.run(query, key, value, None, 1.0, True, tile)
    assert lse is not None
    torch.testing.assert_close(lse, torch.full_like(lse, math.log(tokens)))
    torch.testing.assert_close(out.float(), torch.full_like(out, 2 / tokens).float(), rtol=1e-2, atol=0)
