"""How much attention each block of (query, key) pairs holds, in Triton: half the work of attention.

Given the log-sum-exp of every query, no running maximum is needed and no values are read. Source: AdaSpa
(arXiv 2502.21079), whose pseudo-code prints a logarithm where this sum has the exponential.
"""

import math
from typing import Any, cast

import torch
import triton
import triton.language as tl
from torch import Tensor

from vidgen.kernels.attention.triton_kernel import load_tile
from vidgen.kernels.triton_device import INTERPRETED, packed, padded, require_here, untraced

# B batch, Q queries, K keys, H heads, D head dimension, R rows, C key blocks

LOG2_E = math.log2(math.e)
_LONGEST_TILE = 128


@untraced
def block_mass(
    query_BQHD: Tensor,
    key_BKHD: Tensor,
    lse_BHQ: Tensor,
    *,
    query_block: int,
    key_block: int,
    scale: float | None = None,
) -> Tensor:
    """[B, H, R, C] fp32: the sum over a block's (query, key) pairs of exp(logit - LSE of the query).

    With the LSE of dense attention a row sums to the number of its queries. Blocks of any length.
    """
    batch, num_queries, num_heads, head_dim = query_BQHD.shape
    num_keys = key_BKHD.shape[1]
    if query_block < 1 or key_block < 1:
        raise ValueError(f"blocks of {query_block} queries and {key_block} keys: need at least 1 of each")
    if lse_BHQ.shape != (batch, num_heads, num_queries):
        raise ValueError(
            f"log-sum-exps of shape {tuple(lse_BHQ.shape)}: need {(batch, num_heads, num_queries)}"
        )
    query, key, lse = packed(query_BQHD), packed(key_BKHD), lse_BHQ.contiguous()
    query_tile, key_tile = (min(padded(block), _LONGEST_TILE) for block in (query_block, key_block))
    num_rows, num_columns = -(-num_queries // query_block), -(-num_keys // key_block)
    # long blocks are cut, and their parts added up when all is done
    query_parts, key_parts = -(-query_block // query_tile), -(-key_block // key_tile)
    mass = query.new_empty(
        batch, num_heads, num_rows, query_parts, num_columns, key_parts, dtype=torch.float32
    )
    padded_dim = padded(head_dim)
    exact = torch.get_float32_matmul_precision() == "highest"
    with require_here(query, key, lse):
        if mass.numel():
            cast(Any, _mass)[(mass.numel() // (num_columns * key_parts),)](
                query,
                key,
                lse,
                mass,
                query.stride()[:3],
                key.stride()[:3],
                num_heads,
                num_queries,
                num_keys,
                num_rows,
                num_columns,
                (head_dim**-0.5 if scale is None else scale) * LOG2_E,
                QUERY_BLOCK=query_block,
                KEY_BLOCK=key_block,
                CHECK=key_block % key_tile != 0 or num_keys % key_block != 0,
                DIM=head_dim,
                PADDED_DIM=padded_dim,
                PRECISION="ieee" if exact else "tf32",
                UPCAST=INTERPRETED and query.dtype == torch.bfloat16,
                QUERY_TILE=query_tile,
                KEY_TILE=key_tile,
                num_warps=8 if query_tile * (key_tile + padded_dim) > 128 * 128 else 4,
                num_stages=3 if query.element_size() * padded_dim <= 256 else 2,
            )
    return mass[:, :, :, 0, :, 0] if query_parts == key_parts == 1 else mass.sum((3, 5))


@triton.jit
def _mass(
    query,
    key,
    lse,
    mass,
    query_strides,
    key_strides,
    num_heads,
    num_queries,
    num_keys,
    num_rows,
    num_columns,
    scale_log2,
    QUERY_BLOCK: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
    CHECK: tl.constexpr,  # some keys of a tile may not be there
    DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    QUERY_TILE: tl.constexpr,
    KEY_TILE: tl.constexpr,
):
    QUERY_PARTS: tl.constexpr = (QUERY_BLOCK + QUERY_TILE - 1) // QUERY_TILE
    KEY_PARTS: tl.constexpr = (KEY_BLOCK + KEY_TILE - 1) // KEY_TILE
    number = tl.program_id(0) // QUERY_PARTS
    row = number % num_rows
    head = tl.cast(number // num_rows % num_heads, tl.int64)
    batch = tl.cast(number // num_rows // num_heads, tl.int64)
    places = tl.program_id(0) % QUERY_PARTS * QUERY_TILE + tl.arange(0, QUERY_TILE)
    queries_at = row * QUERY_BLOCK + places
    is_query = (places < QUERY_BLOCK) & (queries_at < num_queries)
    columns = tl.arange(0, KEY_TILE)
    channels = tl.arange(0, PADDED_DIM)

    query += batch * query_strides[0] + head * query_strides[2]
    far = tl.cast(queries_at, tl.int64)[:, None] * query_strides[1]
    is_element = is_query[:, None] & (channels < DIM)[None, :]
    queries = tl.load(query + far + channels[None, :], mask=is_element, other=0.0)
    if UPCAST:  # the interpreter multiplies bit patterns of bf16 (triton issue 11584)
        queries = queries.to(tl.float32)
    lse += (batch * num_heads + head) * num_queries
    # a query that is not there has no share in any key
    levels = tl.load(lse + queries_at, mask=is_query, other=float("inf")) * 1.4426950408889634  # to base 2

    key += batch * key_strides[0] + head * key_strides[2]
    key_offsets = columns[None, :] * key_strides[1] + channels[:, None]
    mass += tl.cast(tl.program_id(0), tl.int64) * num_columns * KEY_PARTS
    for step in range(num_columns * KEY_PARTS):
        column = step // KEY_PARTS
        inside = (step - column * KEY_PARTS) * KEY_TILE
        start = column * KEY_BLOCK + inside
        is_key = (columns < KEY_BLOCK - inside) & (columns < num_keys - start)
        at = key + tl.cast(start, tl.int64) * key_strides[1] + key_offsets
        keys = load_tile(at, is_key[None, :], (channels < DIM)[:, None], CHECK, DIM != PADDED_DIM, UPCAST)
        logits = tl.dot(queries, keys, input_precision=PRECISION)
        shares = tl.exp2(logits * scale_log2 - levels[:, None])
        if CHECK:
            shares = tl.where(is_key[None, :], shares, 0.0)
        tl.store(mass + step, tl.sum(tl.sum(shares, 1), 0))
