"""RMSNorm over the full width, then RoPE per head: one call, by Triton on CUDA and in plain torch elsewhere.

Without a named backend the way is chosen by where the tokens are and whether gradients are wanted, of which
Triton's has none. The rotations are those of vidgen/model/rope.py.
"""

import torch
from torch import Tensor

from vidgen.kernels.rope import reference

# B batch, S tokens, D width, H heads, d head width

BACKENDS = ("auto", "triton", "reference")


def norm_rope(
    x_BSD: Tensor,
    weight_D: Tensor,
    cosines_S1d: Tensor,
    signed_sines_S1d: Tensor,
    num_heads: int,
    eps: float,
    *,
    keep_normed: bool = True,
    backend: str = "auto",
) -> tuple[Tensor | None, Tensor]:
    """(RMSNorm(x) * weight [B, S, H, d], the same with each channel pair (2i, 2i+1) turned), of x's dtype.

    The first is what a cache of keys keeps, as blocks turn it anew; None unless `keep_normed`.
    """
    _check(x_BSD, weight_D, num_heads, cosines=cosines_S1d, sines=signed_sines_S1d)
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r}: need one of {', '.join(BACKENDS)}")
    if backend == "auto":
        differentiated = torch.is_grad_enabled() and (x_BSD.requires_grad or weight_D.requires_grad)
        # while compiling, torch fuses the plain one by itself
        is_left_alone = not differentiated and not torch.compiler.is_compiling()
        backend = "triton" if x_BSD.is_cuda and is_left_alone else "reference"
    if backend == "triton":
        from vidgen.kernels.rope.triton_rope import norm_rope as way
    else:
        way = reference.norm_rope
    return way(x_BSD, weight_D, cosines_S1d, signed_sines_S1d, num_heads, eps, keep_normed)


def _check(x_BSD: Tensor, weight_D: Tensor, num_heads: int, **rotations: Tensor) -> None:
    if x_BSD.ndim != 3:
        raise ValueError(f"tokens {tuple(x_BSD.shape)}: need [batch, tokens, width]")
    _, tokens, width = x_BSD.shape
    if num_heads < 1 or width % (2 * num_heads):
        raise ValueError(
            f"width {width} with {num_heads} heads: need an even number of channels in each head"
        )
    if weight_D.shape != (width,):
        raise ValueError(f"a weight of shape {tuple(weight_D.shape)}: these tokens need {(width,)}")
    for name, values in rotations.items():
        if values.shape != (tokens, 1, width // num_heads):
            raise ValueError(
                f"{name} of shape {tuple(values.shape)}: these tokens need {(tokens, 1, width // num_heads)}"
            )
