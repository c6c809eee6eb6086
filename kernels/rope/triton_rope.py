"""RMSNorm and rotation in Triton: every token is read once. A program owns a token, all heads of it."""

from typing import Any, cast

import torch
import triton
import triton.language as tl
from torch import Tensor

from vidgen.kernels.triton_device import packed, padded, require_here, rounded

# B batch, S tokens, D width, H heads, d head width


def norm_rope(
    x_BSD: Tensor,
    weight_D: Tensor,
    cosines_S1d: Tensor,
    signed_sines_S1d: Tensor,
    num_heads: int,
    eps: float,
    keep_normed: bool = True,
) -> tuple[Tensor | None, Tensor]:
    """As in reference.py."""
    batch, tokens, width = x_BSD.shape
    x, weight = packed(x_BSD), packed(weight_D)
    cosines, sines = packed(cosines_S1d), packed(signed_sines_S1d)
    shape = batch, tokens, num_heads, width // num_heads
    normed = torch.empty(shape, dtype=x.dtype, device=x.device) if keep_normed else None
    rotated = torch.empty(shape, dtype=x.dtype, device=x.device)
    padded_width = padded(width)
    with require_here(x, weight, cosines, sines):
        if rotated.numel():
            cast(Any, _norm_rope)[(batch * tokens,)](
                x,
                weight,
                cosines,
                sines,
                normed,
                rotated,
                x.stride()[:2],
                cosines.stride(0),
                sines.stride(0),
                tokens,
                eps,
                WIDTH=width,
                HEAD_WIDTH=width // num_heads,
                PADDED_WIDTH=padded_width,
                num_warps=min(max(padded_width // 512, 1), 16),
            )
    return normed, rotated


@triton.jit
def _turn(values, cosines, sines, PADDED_WIDTH: tl.constexpr):
    """values * cosines + (neighbours in the channel pair) * sines."""
    HALF: tl.constexpr = PADDED_WIDTH // 2
    even, odd = tl.split(tl.reshape(values, (HALF, 2)))
    swapped = tl.reshape(tl.join(odd, even), (PADDED_WIDTH,))
    return values * cosines + swapped * sines


@triton.jit
def _norm_rope(
    x,
    weight,
    cosines,
    sines,
    normed,
    rotated,
    x_strides,
    cosine_stride,
    sine_stride,
    num_tokens,
    eps,
    WIDTH: tl.constexpr,
    HEAD_WIDTH: tl.constexpr,
    PADDED_WIDTH: tl.constexpr,
):
    number = tl.cast(tl.program_id(0), tl.int64)  # a long video's offsets pass 2**31
    token = number % num_tokens
    channels = tl.arange(0, PADDED_WIDTH)
    is_channel = channels < WIDTH
    at = number // num_tokens * x_strides[0] + token * x_strides[1]
    values = tl.load(x + at + channels, mask=is_channel, other=0.0).to(tl.float32)
    weights = tl.load(weight + channels, mask=is_channel, other=0.0).to(tl.float32)
    values = values * tl.rsqrt(tl.sum(values * values, 0) / WIDTH + eps) * weights
    kept = rounded(values, rotated)  # what is turned is what is kept
    if normed is not None:
        tl.store(normed + number * WIDTH + channels, kept, mask=is_channel)
    angle = channels % HEAD_WIDTH
    turned = _turn(
        kept.to(tl.float32),
        tl.load(cosines + token * cosine_stride + angle, mask=is_channel, other=0.0),
        tl.load(sines + token * sine_stride + angle, mask=is_channel, other=0.0),
        PADDED_WIDTH,
    )
    tl.store(rotated + number * WIDTH + channels, rounded(turned, rotated), mask=is_channel)
