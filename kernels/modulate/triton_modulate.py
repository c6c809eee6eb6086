"""LayerNorm and modulation in Triton: every token is read once and written once. A program owns a token."""

from typing import Any, cast

import torch
import triton
import triton.language as tl
from torch import Tensor

from vidgen.kernels.triton_device import packed, padded, require_here, rounded

# B batch, F frames, S tokens per frame, D width


def norm_modulate(x_BFSD: Tensor, scale_BF1D: Tensor, shift_BF1D: Tensor, eps: float) -> Tensor:
    """As in reference.py."""
    return _launch(x_BFSD, None, None, scale_BF1D, shift_BF1D, eps)[1]


def gate_residual_norm_modulate(
    x_BFSD: Tensor,
    branch_BFSD: Tensor,
    gate_BF1D: Tensor,
    scale_BF1D: Tensor,
    shift_BF1D: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """As in reference.py."""
    total, modulated = _launch(x_BFSD, branch_BFSD, gate_BF1D, scale_BF1D, shift_BF1D, eps)
    assert total is not None
    return total, modulated


def _launch(
    x: Tensor, branch: Tensor | None, gate: Tensor | None, scale: Tensor, shift: Tensor, eps: float
) -> tuple[Tensor | None, Tensor]:
    batch, frames, tokens, width = x.shape
    x, scale, shift = packed(x), _per_frame(scale, x), _per_frame(shift, x)
    total, inputs = None, [x, scale, shift]
    if branch is not None and gate is not None:
        branch, gate = packed(branch), _per_frame(gate, x)
        total = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        inputs += [branch, gate]
    modulated = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    padded_width = padded(width)
    with require_here(*inputs):
        if modulated.numel():
            cast(Any, _modulate)[(batch * frames * tokens,)](
                x,
                branch,
                gate,
                scale,
                shift,
                total,
                modulated,
                x.stride()[:3],
                None if branch is None else branch.stride()[:3],
                None if gate is None else gate.stride()[:2],
                scale.stride()[:2],
                shift.stride()[:2],
                frames,
                tokens,
                eps,
                WIDTH=width,
                PADDED_WIDTH=padded_width,
                num_warps=min(max(padded_width // 512, 1), 16),
            )
    return total, modulated


def _per_frame(values_BF1D: Tensor, x_BFSD: Tensor) -> Tensor:
    batch, frames, _, width = x_BFSD.shape
    return packed(values_BF1D.expand(batch, frames, 1, width))


@triton.jit
def _modulate(
    x,
    branch,
    gate,
    scale,
    shift,
    total,
    modulated,
    x_strides,
    branch_strides,
    gate_strides,
    scale_strides,
    shift_strides,
    num_frames,
    num_tokens,
    eps,
    WIDTH: tl.constexpr,
    PADDED_WIDTH: tl.constexpr,
):
    number = tl.cast(tl.program_id(0), tl.int64)  # a long video's offsets pass 2**31
    token = number % num_tokens
    frame = number // num_tokens % num_frames
    batch = number // num_tokens // num_frames
    channels = tl.arange(0, PADDED_WIDTH)
    is_channel = channels < WIDTH
    at = batch * x_strides[0] + frame * x_strides[1] + token * x_strides[2]
    values = tl.load(x + at + channels, mask=is_channel, other=0.0).to(tl.float32)
    if branch is not None:
        at = batch * branch_strides[0] + frame * branch_strides[1] + token * branch_strides[2]
        added = tl.load(branch + at + channels, mask=is_channel, other=0.0).to(tl.float32)
        at = batch * gate_strides[0] + frame * gate_strides[1]
        gates = tl.load(gate + at + channels, mask=is_channel, other=0.0).to(tl.float32)
        # what is normalised is what is kept: rounded
        summed = rounded(values + added * gates, total)
        tl.store(total + number * WIDTH + channels, summed, mask=is_channel)
        values = summed.to(tl.float32)
    mean = tl.sum(values, 0) / WIDTH
    centred = tl.where(is_channel, values - mean, 0.0)
    normed = centred * tl.rsqrt(tl.sum(centred * centred, 0) / WIDTH + eps)
    at = batch * scale_strides[0] + frame * scale_strides[1]
    scales = tl.load(scale + at + channels, mask=is_channel, other=0.0).to(tl.float32)
    at = batch * shift_strides[0] + frame * shift_strides[1]
    shifts = tl.load(shift + at + channels, mask=is_channel, other=0.0).to(tl.float32)
    found = normed * (1.0 + scales) + shifts
    tl.store(modulated + number * WIDTH + channels, rounded(found, modulated), mask=is_channel)
