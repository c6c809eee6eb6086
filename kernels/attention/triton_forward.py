"""Attention over a block layout in Triton: the forward pass, with no step that depends on the layout's shape.

The kernel itself is in triton_kernel.py; here is what it is called with.
"""

import math
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from vidgen.kernels.attention.backends import Run
from vidgen.kernels.attention.layout import BlockLayout
from vidgen.kernels.attention.triton_kernel import forward_kernel
from vidgen.kernels.attention.triton_tiles import Tile, fixed_tile, tuned
from vidgen.kernels.triton_device import (
    INTERPRETED,
    packed,
    padded,
    require_here,
    require_somewhere,
    untraced,
)

# B batch, Q queries, K keys, H heads, D head dimension, R rows, C key blocks, M longest list of a row

LOG2_E = math.log2(math.e)


def load() -> Run:
    """`run`; ImportError where no Triton kernel can run."""
    require_somewhere()
    return run


@untraced
def run(
    query_BQHD: Tensor,
    key_BKHD: Tensor,
    value_BKHD: Tensor,
    layout: BlockLayout | None,
    scale: float,
    return_lse: bool,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor | None]:
    """(O [B, Q, H, D], log-sum-exp of the logits [B, H, Q] in fp32 or None). A `tile` spares tuning.

    A query that sees no key has zeros and -inf.
    """
    batch, num_queries, num_heads, head_dim = query_BQHD.shape
    num_keys = key_BKHD.shape[1]
    query, key, value = packed(query_BQHD), packed(key_BKHD), packed(value_BKHD)
    if scale < 0:  # the kernel takes the largest logit before it scales
        query, scale = -query, -scale
    out = torch.empty_like(query_BQHD, memory_format=torch.contiguous_format)
    lse = query.new_empty(batch, num_heads, num_queries, dtype=torch.float32) if return_lse else None
    if layout is None:
        lists: dict[str, Any] = _NO_LISTS
        blocks = None
    else:
        layout.check(batch, num_heads, num_queries, num_keys)
        lists, blocks = _lists(layout, batch, num_heads), (layout.query_block, layout.key_block)
        if any(block % 16 for block in blocks):
            raise ValueError(f"a layout of blocks of {blocks}: this kernel needs multiples of 16")
    device = require_here(query, key, value, *(() if layout is None else (layout.full.counts_BHR,)))
    if not out.numel():
        return out, lse
    exact = torch.get_float32_matmul_precision() == "highest"
    padded_dim = padded(head_dim)
    if tile is None and INTERPRETED:
        tile = fixed_tile(blocks)
    if tile is not None and blocks is not None and not tile.divides(blocks):
        raise ValueError(f"{tile}: the layout's blocks of {blocks} need one that divides them")
    if tile is None:
        kernel, meta = (
            tuned(forward_kernel, blocks, padded_dim, query.element_size(), num_queries, num_keys),
            {},
        )
    else:
        kernel, meta = forward_kernel, tile.meta()

    def grid(meta: dict[str, Any]) -> tuple[int]:
        rows = -(-num_queries // meta["QUERY_TILE"])
        if layout is not None:
            rows = layout.num_rows * layout.query_block // meta["QUERY_TILE"]
        return (batch * num_heads * rows,)  # of one dim: the others end at 65535

    with device:
        cast(Any, kernel)[grid](
            query,
            key,
            value,
            out,
            lse,
            query.stride()[:3],
            key.stride()[:3],
            value.stride()[:3],
            out.stride()[:3],
            num_heads,
            num_queries,
            num_keys,
            max(scale * LOG2_E, 1e-30),  # not 0: a masked logit is -inf before it is scaled
            **lists,
            DIM=head_dim,
            PADDED_DIM=padded_dim,
            PRECISION="ieee" if exact else "tf32",
            UPCAST=INTERPRETED and query.dtype == torch.bfloat16,
            **meta,
        )
    return out, lse


@dataclass(frozen=True, slots=True)
class _Steps:
    """A tensor [B, H, ...] of a layout, contiguous, and how far a batch entry and a head are apart."""

    tensor: Tensor
    steps: tuple[int, int]

    @classmethod
    def of(cls, tensor: Tensor) -> "_Steps":
        tensor = tensor.contiguous()
        batch, heads = (0 if tensor.shape[dim] == 1 else tensor.stride(dim) for dim in (0, 1))
        return cls(tensor, (batch, heads))


_NO_LISTS: dict[str, Any] = {
    "order": None,
    "full_counts": None,
    "full_indices": None,
    "partial_counts": None,
    "partial_indices": None,
    "tile_ids": None,
    "tiles": None,
    "lengths": None,
    "weights": None,
    "full_steps": (0, 0),
    "partial_steps": (0, 0),
    "length_steps": (0, 0),
    "weight_steps": (0, 0),
    "num_rows": 0,
    "longest_full": 0,
    "longest_partial": 0,
    "QUERY_BLOCK": 0,
    "KEY_BLOCK": 0,
    "RAGGED": False,
}


def _lists(layout: BlockLayout, batch: int, num_heads: int) -> dict[str, Any]:
    """The kernel's arguments that say what a layout says, prepared once per layout."""
    name = "triton_forward", batch, num_heads
    if name not in layout.prepared:
        layout.prepared[name] = _prepare(layout, batch, num_heads)
    return layout.prepared[name]


def _prepare(layout: BlockLayout, batch: int, num_heads: int) -> dict[str, Any]:
    full = _Steps.of(layout.full.counts_BHR)
    counts_BHR = full.tensor
    found = _NO_LISTS | {
        "full_counts": full.tensor,
        "full_indices": layout.full.indices_BHRM.contiguous(),
        "full_steps": full.steps,
        "num_rows": layout.num_rows,
        "longest_full": layout.full.indices_BHRM.shape[-1],
        "QUERY_BLOCK": layout.query_block,
        "KEY_BLOCK": layout.key_block,
        "RAGGED": layout.num_keys % layout.key_block != 0,
    }
    if layout.partial is not None:
        partial = _Steps.of(layout.partial.lists.counts_BHR)
        counts_BHR = counts_BHR + partial.tensor
        found |= {
            "partial_counts": partial.tensor,
            "partial_indices": layout.partial.lists.indices_BHRM.contiguous(),
            "tile_ids": layout.partial.tile_ids_BHRM.contiguous(),
            "tiles": layout.partial.tiles_Nqk.contiguous().view(torch.uint8),
            "partial_steps": partial.steps,
            "longest_partial": layout.partial.lists.indices_BHRM.shape[-1],
        }
    for names, tensor in (
        (("lengths", "length_steps"), layout.key_lengths_BHC),
        (("weights", "weight_steps"), layout.key_log_weights_BHC),
    ):
        if tensor is not None:
            steps = _Steps.of(tensor)
            found |= dict(zip(names, (steps.tensor, steps.steps), strict=True))
    # long rows first, so that none of them starts when the rest is done; stable: neighbours share keys
    everywhere = counts_BHR.expand(batch, num_heads, layout.num_rows).flatten()
    found["order"] = everywhere.argsort(descending=True, stable=True).to(torch.int32)
    return found
