"""PyTorch's own attention: dense, and the yardstick of all others."""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from vidgen.kernels.attention.layout import BlockLayout

# B batch, Q queries, K keys, H heads, D head dimension


def run(
    query_BQHD: Tensor,
    key_BKHD: Tensor,
    value_BKHD: Tensor,
    layout: BlockLayout | None,
    scale: float,
    lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """Dense attention [B, Q, H, D] and, if asked for, LSE [B, H, Q]."""
    assert layout is None
    query, key, value = (tensor.transpose(1, 2) for tensor in (query_BQHD, key_BKHD, value_BKHD))
    if not lse:
        return scaled_dot_product_attention(query, key, value, scale=scale).transpose(1, 2), None
    # what scaled_dot_product_attention runs where it can, asked for by the names that also return the LSE
    aten = torch.ops.aten
    if query.device.type == "cpu":
        out, lse_BHQ = aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, scale=scale)
    elif query.dtype in (torch.float16, torch.bfloat16):
        out, lse_BHQ = aten._scaled_dot_product_flash_attention(query, key, value, scale=scale)[:2]
    else:
        out, lse_BHQ = aten._scaled_dot_product_efficient_attention(
            query, key, value, None, True, scale=scale
        )[:2]
    return out.transpose(1, 2), lse_BHQ[..., : query.shape[2]].float()


def attend_weighted(
    query_BQHD: Tensor, key_BKHD: Tensor, value_BKHD: Tensor, log_weights_K: Tensor
) -> Tensor:
    """Dense attention [B, Q, H, D] in which a key counts as exp(log weight) equal ones do."""
    if log_weights_K.shape != key_BKHD.shape[1:2]:
        raise ValueError(
            f"log-weights of shape {tuple(log_weights_K.shape)}: {key_BKHD.shape[1]} keys need as many"
        )
    query, key, value = (tensor.transpose(1, 2) for tensor in (query_BQHD, key_BKHD, value_BKHD))
    added_11QK = log_weights_K.to(query.dtype).expand(1, 1, query.shape[2], -1)
    return scaled_dot_product_attention(query, key, value, attn_mask=added_11QK).transpose(1, 2)
