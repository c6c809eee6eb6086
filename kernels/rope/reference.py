"""RMSNorm and rotation written out: what every kernel of them is held against, and the way on a CPU."""

import torch
from torch import Tensor
from torch.nn.functional import rms_norm

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
    """(RMSNorm(x) * weight [B, S, H, d] or None, the same with each channel pair (2i, 2i+1) turned).

    In fp32 or above, rounded to x's dtype after the norm and after the turn.
    """
    dtype = torch.promote_types(x_BSD.dtype, torch.float32)
    normed = rms_norm(x_BSD.to(dtype), weight_D.shape, weight_D.to(dtype), eps).to(x_BSD.dtype)
    normed_BSHd = normed.unflatten(-1, (num_heads, -1))
    return normed_BSHd if keep_normed else None, rotate(normed_BSHd, cosines_S1d, signed_sines_S1d)


def rotate(tokens_BSHd: Tensor, cosines_S1d: Tensor, signed_sines_S1d: Tensor) -> Tensor:
    """The tokens with each channel pair (2i, 2i+1) turned by its angle, in fp32 or above."""
    x = tokens_BSHd.to(torch.promote_types(tokens_BSHd.dtype, torch.float32))
    swapped = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    return (x * cosines_S1d + swapped * signed_sines_S1d).to(tokens_BSHd.dtype)
