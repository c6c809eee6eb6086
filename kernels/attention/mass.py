"""How much attention falls on each block, from known log-sum-exps: AdaSpa's search (arXiv 2502.21079)."""

import math

import torch
from torch import Tensor

# B batch, Q queries, K keys, H heads, D head dimension, R rows (blocks of queries), C key blocks

CHUNK_WEIGHTS = 1 << 19  # fp32 weights at a time, which a core's L2 cache holds


def block_mass(
    query_BQHD: Tensor,
    key_BKHD: Tensor,
    lse_BHQ: Tensor,
    *,
    query_block: int,
    key_block: int,
    scale: float | None = None,
) -> Tensor:
    """Attention mass of each block [B, H, R, C], fp32: its pairs' sum of exp(logit - LSE of the query).

    With the LSE of dense attention over these queries and keys a row sums to the number of its queries. No
    value is read and no maximum is taken.
    """
    batch, num_queries, num_heads, head_dim = query_BQHD.shape
    if lse_BHQ.shape != (batch, num_heads, num_queries):
        raise ValueError(
            f"lse of shape {tuple(lse_BHQ.shape)}: these queries need {(batch, num_heads, num_queries)}"
        )
    if min(query_block, key_block) < 1:
        raise ValueError(f"query_block={query_block}, key_block={key_block}: need at least 1 each")
    scale = 1 / math.sqrt(head_dim) if scale is None else scale
    if query_BQHD.device.type == "cuda":
        from vidgen.kernels.attention import triton_mass

        return triton_mass.block_mass(
            query_BQHD, key_BKHD, lse_BHQ, query_block=query_block, key_block=key_block, scale=scale
        )
    num_rows, num_columns = -(-num_queries // query_block), -(-key_BKHD.shape[1] // key_block)
    mass_BHRC = query_BQHD.new_empty(batch, num_heads, num_rows, num_columns, dtype=torch.float32)
    for entry in range(batch):
        for head in range(num_heads):
            _mass_of_head(
                query_BQHD[entry, :, head].float(),
                key_BKHD[entry, :, head].float(),
                lse_BHQ[entry, head].float(),
                mass_BHRC[entry, head],
                blocks=(query_block, key_block),
                scale=scale,
            )
    return mass_BHRC


def _mass_of_head(
    query_QD: Tensor, key_KD: Tensor, lse_Q: Tensor, out_RC: Tensor, *, blocks: tuple[int, int], scale: float
) -> None:
    """Fill `out_RC`, so many whole blocks at a time as fit, and ragged rows by themselves."""
    query_block, key_block = blocks
    columns_at_once = max(1, CHUNK_WEIGHTS // (query_block * key_block))
    rows_at_once = max(1, CHUNK_WEIGHTS // (query_block * min(columns_at_once * key_block, len(key_KD))))
    for rows in _parts(len(query_QD), query_block, rows_at_once):
        queries = slice(rows.start * query_block, rows.stop * query_block)
        query, minus_lse = query_QD[queries], -lse_Q[queries].unsqueeze(1)
        for first in range(0, out_RC.shape[1], columns_at_once):
            key = key_KD[first * key_block : (first + columns_at_once) * key_block]
            weights = torch.addmm(minus_lse, query, key.t(), alpha=scale).exp_()
            by_key = weights.unflatten(0, (rows.stop - rows.start, -1)).sum(1)  # rows first: whole vectors
            num_whole = len(key) // key_block
            whole, ragged = by_key.split((num_whole * key_block, len(key) % key_block), 1)
            out_RC[rows, first : first + num_whole] = whole.unflatten(1, (num_whole, key_block)).sum(2)
            if ragged.shape[1]:
                out_RC[rows, first + num_whole] = ragged.sum(1)


def _parts(num_queries: int, query_block: int, rows_at_once: int) -> list[slice]:
    """Runs of whole rows, then the ragged one."""
    num_whole = num_queries // query_block
    starts = range(0, num_whole, rows_at_once)
    runs = [slice(start, min(start + rows_at_once, num_whole)) for start in starts]
    return runs + [slice(num_whole, num_whole + 1)] * bool(num_queries % query_block)
