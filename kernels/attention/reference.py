"""Attention written out: what every backend is held against. Slow and plain, in fp32 or above."""

import math

import torch
from torch import Tensor

from vidgen.kernels.attention.layout import BlockLayout

# B batch, Q queries, K keys, H heads, D head dimension, R rows, C key blocks


def attention_reference(
    query_BQHD: Tensor,
    key_BKHD: Tensor,
    value_BKHD: Tensor,
    layout: BlockLayout | None = None,
    scale: float | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """(softmax(Q K^T * scale) V [B, Q, H, D], log-sum-exp of the logits [B, H, Q]), both in `dtype`.

    A query that sees no key has zeros and -inf.
    """
    logits = masked_logits(query_BQHD, key_BKHD, layout, scale, dtype)
    lse_BHQ = logits.logsumexp(-1)
    weights = (logits - lse_BHQ.masked_fill(lse_BHQ == -math.inf, 0).unsqueeze(-1)).exp()
    return torch.einsum("bhqk,bkhd->bqhd", weights, value_BKHD.to(dtype)), lse_BHQ


def masked_logits(
    query_BQHD: Tensor, key_BKHD: Tensor, layout: BlockLayout | None, scale: float | None, dtype: torch.dtype
) -> Tensor:
    """[B, H, Q, K]: -inf where a key is not seen; a block's log-weight is added."""
    scale = 1 / math.sqrt(query_BQHD.shape[-1]) if scale is None else scale
    logits = torch.einsum("bqhd,bkhd->bhqk", query_BQHD.to(dtype), key_BKHD.to(dtype)) * scale
    if layout is None:
        return logits
    if layout.key_log_weights_BHC is not None:
        weights = layout.key_log_weights_BHC.to(dtype).repeat_interleave(layout.key_block, -1)
        logits = logits + weights[..., : layout.num_keys].unsqueeze(2)
    return logits.masked_fill(~layout.dense_mask(), -math.inf)


def block_mass_reference(
    query_BQHD: Tensor,
    key_BKHD: Tensor,
    lse_BHQ: Tensor,
    *,
    query_block: int,
    key_block: int,
    scale: float | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """[B, H, R, C]: the sum over a block's (query, key) pairs of exp(logit - LSE of the query).

    With the LSE of dense attention a row sums to the number of its queries. Source: AdaSpa (arXiv
    2502.21079).
    """
    logits = masked_logits(query_BQHD, key_BKHD, None, scale, dtype)
    weights = (logits - lse_BHQ.to(dtype).unsqueeze(-1)).exp()
    num_queries, num_keys = weights.shape[2:]
    rows, columns = -(-num_queries // query_block), -(-num_keys // key_block)
    padded = weights.new_zeros(*weights.shape[:2], rows * query_block, columns * key_block)
    padded[:, :, :num_queries, :num_keys] = weights
    return padded.unflatten(3, (columns, key_block)).unflatten(2, (rows, query_block)).sum((3, 5))


def run(
    query_BQHD: Tensor,
    key_BKHD: Tensor,
    value_BKHD: Tensor,
    layout: BlockLayout | None,
    scale: float,
    lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """The reference as a backend: in fp32, or fp64 for fp64."""
    dtype = torch.promote_types(query_BQHD.dtype, torch.float32)
    out, lse_BHQ = attention_reference(query_BQHD, key_BKHD, value_BKHD, layout, scale, dtype)
    return out.to(query_BQHD.dtype), lse_BHQ.float() if lse else None
