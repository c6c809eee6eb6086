"""LayerNorm with adaLN modulation per frame: one call, by Triton on CUDA and in plain torch elsewhere.

Without a named backend the way is chosen by where the tokens are, by whether gradients are wanted, of which
Triton's has none, and by whether torch is compiling, as it fuses the plain one by itself. Source of the
modulation: DiT (arXiv 2212.09748), per frame as in Wan 2.1.
"""

from types import ModuleType

import torch
from torch import Tensor

from vidgen.kernels.modulate import reference

# B batch, F frames, S tokens per frame, D width

BACKENDS = ("auto", "triton", "reference")


def norm_modulate(
    x_BFSD: Tensor, scale_BF1D: Tensor, shift_BF1D: Tensor, eps: float, *, backend: str = "auto"
) -> Tensor:
    """LayerNorm(x) * (1 + scale) + shift in fp32, of x's shape and dtype.

    Scale and shift are per frame, or of length 1 where all batch entries or frames share them.
    """
    _check(x_BFSD, scale=scale_BF1D, shift=shift_BF1D)
    way = _way(backend, x_BFSD, scale_BF1D, shift_BF1D)
    return way.norm_modulate(x_BFSD, scale_BF1D, shift_BF1D, eps)


def gate_residual(x_BFSD: Tensor, branch_BFSD: Tensor, gate_BF1D: Tensor) -> Tensor:
    """x + branch * gate in fp32, of x's dtype. The branch is used up: its memory may hold what comes back."""
    _check_branch(x_BFSD, branch_BFSD)
    _check(x_BFSD, gate=gate_BF1D)
    return reference.gate_residual(x_BFSD, branch_BFSD, gate_BF1D)


def gate_residual_norm_modulate(
    x_BFSD: Tensor,
    branch_BFSD: Tensor,
    gate_BF1D: Tensor,
    scale_BF1D: Tensor,
    shift_BF1D: Tensor,
    eps: float,
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """(x + branch * gate, its LayerNorm * (1 + scale) + shift), of x's dtype: a residual, then the norm."""
    _check_branch(x_BFSD, branch_BFSD)
    _check(x_BFSD, gate=gate_BF1D, scale=scale_BF1D, shift=shift_BF1D)
    way = _way(backend, x_BFSD, branch_BFSD, gate_BF1D, scale_BF1D, shift_BF1D)
    return way.gate_residual_norm_modulate(x_BFSD, branch_BFSD, gate_BF1D, scale_BF1D, shift_BF1D, eps)


def _check_branch(x_BFSD: Tensor, branch_BFSD: Tensor) -> None:
    if branch_BFSD.shape != x_BFSD.shape:
        raise ValueError(
            f"a branch {tuple(branch_BFSD.shape)} to add to tokens {tuple(x_BFSD.shape)}: need equal shapes"
        )


def _check(x_BFSD: Tensor, **per_frame: Tensor) -> None:
    if x_BFSD.ndim != 4:
        raise ValueError(f"tokens {tuple(x_BFSD.shape)}: need [batch, frames, tokens, width]")
    batch, frames, _, width = x_BFSD.shape
    for name, values in per_frame.items():
        fits = values.ndim == 4 and values.shape[2:] == (1, width)
        if not fits or values.shape[0] not in (1, batch) or values.shape[1] not in (1, frames):
            raise ValueError(f"{name} {tuple(values.shape)}: these tokens need {(batch, frames, 1, width)}")


def _way(backend: str, *tensors: Tensor) -> ModuleType:
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r}: need one of {', '.join(BACKENDS)}")
    if backend == "auto":
        differentiated = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
        is_left_alone = not differentiated and not torch.compiler.is_compiling()
        backend = "triton" if tensors[0].is_cuda and is_left_alone else "reference"
    if backend == "reference":
        return reference
    from vidgen.kernels.modulate import triton_modulate

    return triton_modulate
