"""Attention over a set of keys from attention over its parts, by their log-sum-exps."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

# B batch, Q queries, H heads, D head dimension


def merge(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """(O [B, Q, H, D], LSE [B, H, Q]) over all keys, from those over disjoint sets of them.

    A part in which a query sees nothing has the LSE -inf there and counts for nothing.
    """
    lse_PBHQ = torch.stack([lse for _, lse in parts])
    total_BHQ = lse_PBHQ.logsumexp(0)
    shares_PBQH = (lse_PBHQ - total_BHQ.masked_fill(total_BHQ == -math.inf, 0)).exp().transpose(2, 3)
    weighted = [
        part.float() * share.unsqueeze(-1) for (part, _), share in zip(parts, shares_PBQH, strict=True)
    ]
    return torch.stack(weighted).sum(0).to(parts[0][0].dtype), total_BHQ
