"""What sparse attention leaves out, added from a step at which all was known (Re-ttention, arXiv 2505.22918).

The sparse part of a query's attention has the share rho = exp(LSE_sparse - LSE_full): the paper's ratio of
sums of exponentials, from log-sum-exps alone. The rest R = O_full - rho * O_sparse is kept for later steps.
"""

from torch import Tensor

# B batch, Q queries, H heads, D head dimension


def restoration(
    full_BQHD: Tensor, full_lse_BHQ: Tensor, sparse_BQHD: Tensor, sparse_lse_BHQ: Tensor
) -> dict[str, Tensor]:
    """What to keep: `rho` [B, H, Q] fp32 of 0 to 1, `residual` [B, Q, H, D] in the dtype of attention."""
    rho_BHQ = (sparse_lse_BHQ - full_lse_BHQ).float().exp().clamp(max=1)
    residual = full_BQHD.float() - _per_query(rho_BHQ) * sparse_BQHD.float()
    return {"rho": rho_BHQ.contiguous(), "residual": residual.to(full_BQHD.dtype).contiguous()}


def restored(sparse_BQHD: Tensor, rho_BHQ: Tensor, residual_BQHD: Tensor) -> Tensor:
    """rho * O_sparse + R."""
    return (_per_query(rho_BHQ) * sparse_BQHD.float() + residual_BQHD.float()).to(sparse_BQHD.dtype)


def drifted(rho_BHQ: Tensor, drift: float) -> Tensor:
    """rho for the next step: as video emerges, the sparse part takes a larger share."""
    return (rho_BHQ + drift).clamp(max=1)


def _per_query(rho_BHQ: Tensor) -> Tensor:
    return rho_BHQ.transpose(1, 2).unsqueeze(-1)
