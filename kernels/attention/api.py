"""The one attention call of the engine, over tensors [B, S, H, D] (diffusers' layout)."""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from vidgen.kernels.attention.layout import SlidingWindow3D

# B batch, Q query tokens, K key tokens, H heads, D head dimension


def attention(
    query_BQHD: Tensor,
    key_BKHD: Tensor,
    value_BKHD: Tensor,
    *,
    layout: SlidingWindow3D | None = None,
    scale: float | None = None,
) -> Tensor:
    """softmax(Q K^T * scale) V of shape [B, Q, H, D]; without a layout every query sees every key.

    ValueError when the layout does not fit the number of queries or keys.
    """
    if layout is None:
        return _dense(query_BQHD, key_BKHD, value_BKHD, mask=None, scale=scale)
    tokens = layout.tokens_per_frame
    expected = layout.grid[0] * tokens, layout.key_frames * tokens
    if (query_BQHD.shape[1], key_BKHD.shape[1]) != expected:
        raise ValueError(
            f"{query_BQHD.shape[1]} queries and {key_BKHD.shape[1]} keys: this layout needs {expected}"
        )
    spatial = layout.spatial_mask(query_BQHD.device)
    out = []
    for frame in range(layout.grid[0]):  # a frame sees a run of frames: slices, never an [S, S] mask of all
        start, stop = layout.key_frame_range(frame)
        keys = slice(start * tokens, stop * tokens)
        mask = None if spatial is None else spatial.repeat(1, stop - start)
        queries = query_BQHD[:, frame * tokens : (frame + 1) * tokens]
        out.append(_dense(queries, key_BKHD[:, keys], value_BKHD[:, keys], mask=mask, scale=scale))
    return torch.cat(out, dim=1)


def _dense(query: Tensor, key: Tensor, value: Tensor, *, mask: Tensor | None, scale: float | None) -> Tensor:
    out = scaled_dot_product_attention(
        query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), attn_mask=mask, scale=scale
    )
    return out.transpose(1, 2)
