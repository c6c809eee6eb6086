"""Small random DiTs."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from vidgen.model.dit import DiT, DiTConfig

# head width 12: frame, row and column turn 4 channels each
SIZES: dict[str, Any] = {
    "latent_channels": 3, "width": 24, "num_layers": 2, "num_heads": 2, "ffn_width": 40, "text_width": 7,
    "num_frequencies": 16, "rope_theta": 100.0,
}  # fmt: skip


@pytest.fixture(scope="session")
def dit() -> Callable[..., DiT]:
    @torch.no_grad()
    def dit(**settings: Any) -> DiT:
        """All parameters drawn anew, since a fresh model's output layer is zero."""
        model = DiT(DiTConfig(**SIZES | settings))
        generator = torch.Generator().manual_seed(0)
        for name, parameter in model.named_parameters():
            mean = 1.0 if "norm.weight" in name else 0.0
            parameter.copy_(mean + 0.25 * torch.randn(parameter.shape, generator=generator))
        return model.eval().requires_grad_(False)

    return dit


@pytest.fixture
def draw() -> Callable[..., Tensor]:
    """Standard normal tensors, the same in every run of a test."""
    generator = torch.Generator().manual_seed(7)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    return draw
