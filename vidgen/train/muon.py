"""Muon whose matrices of one shape are orthogonalised together: many small ones take few kernel launches."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

# N matrices, R rows, C columns

COEFFICIENTS = (3.4445, -4.775, 2.0315)
NUM_ITERATIONS = 5
SMALLEST_NORM = 1e-7


class Muon(torch.optim.Optimizer):
    """As torch.optim.Muon with Nesterov momentum and no weight decay (arXiv 2502.16982)."""

    def __init__(self, matrices: Sequence[Tensor], lr: float, momentum: float = 0.95) -> None:
        super().__init__(matrices, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step along the orthogonalised momentum."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for matrix in group["params"]:
                if matrix.grad is not None:
                    by_shape[matrix.shape].append(matrix)
            for matrices in by_shape.values():
                self._step(matrices, group["lr"], group["momentum"])

    def _step(self, matrices: list[Tensor], rate: float, momentum: float) -> None:
        grads = [matrix.grad for matrix in matrices if matrix.grad is not None]
        kept = [
            self.state[matrix].setdefault("momentum_buffer", torch.zeros_like(matrix)) for matrix in matrices
        ]
        torch._foreach_lerp_(kept, grads, 1 - momentum)
        updates = orthogonal(torch.stack(torch._foreach_lerp(grads, kept, momentum)))
        rows, columns = matrices[0].shape
        rate *= max(1.0, rows / columns) ** 0.5
        torch._foreach_add_(matrices, list(updates.to(matrices[0].dtype).unbind()), alpha=-rate)


def orthogonal(matrices_NRC: Tensor) -> Tensor:
    """About the nearest orthogonal matrices, in bf16, by Newton and Schulz's quintic iteration."""
    is_tall = matrices_NRC.shape[1] > matrices_NRC.shape[2]
    x = matrices_NRC.bfloat16()
    x = x.mT if is_tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=SMALLEST_NORM)
    a, b, c = COEFFICIENTS
    for _ in range(NUM_ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x
