"""LayerNorm and modulation written out: what every kernel of them is held against, and the way on a CPU."""

import torch
from torch import Tensor
from torch.nn.functional import layer_norm

# B batch, F frames, S tokens per frame, D width


def norm_modulate(x_BFSD: Tensor, scale_BF1D: Tensor, shift_BF1D: Tensor, eps: float) -> Tensor:
    """LayerNorm(x) * (1 + scale) + shift, computed in fp32 or above, of x's shape and dtype."""
    dtype = torch.promote_types(x_BFSD.dtype, torch.float32)
    normed = layer_norm(x_BFSD.to(dtype), x_BFSD.shape[-1:], eps=eps)
    factors, shift = 1 + scale_BF1D.to(dtype), shift_BF1D.to(dtype)
    if _needs_gradient(normed, factors, shift):
        return (normed * factors + shift).to(x_BFSD.dtype)
    return normed.mul_(factors).add_(shift).to(x_BFSD.dtype)


def gate_residual(x_BFSD: Tensor, branch_BFSD: Tensor, gate_BF1D: Tensor) -> Tensor:
    """x + branch * gate in fp32 or above, of x's dtype, in the branch's memory where that can be."""
    dtype = torch.promote_types(x_BFSD.dtype, torch.float32)
    x, branch, gate = (values.to(dtype) for values in (x_BFSD, branch_BFSD, gate_BF1D))
    if _needs_gradient(x, branch, gate):
        return (x + branch * gate).to(x_BFSD.dtype)
    return branch.mul_(gate).add_(x).to(x_BFSD.dtype)


def gate_residual_norm_modulate(
    x_BFSD: Tensor,
    branch_BFSD: Tensor,
    gate_BF1D: Tensor,
    scale_BF1D: Tensor,
    shift_BF1D: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """(x + branch * gate, LayerNorm of that * (1 + scale) + shift), each rounded to x's dtype once."""
    dtype = torch.promote_types(x_BFSD.dtype, torch.float32)
    total = (x_BFSD.to(dtype) + branch_BFSD.to(dtype) * gate_BF1D.to(dtype)).to(x_BFSD.dtype)
    return total, norm_modulate(total, scale_BF1D, shift_BF1D, eps)


def _needs_gradient(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
