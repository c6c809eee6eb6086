"""One denoising step of one block. A solver's memory travels with the block, never inside the solver."""

from typing import Protocol

from torch import Tensor

History = tuple[Tensor, ...]


class Solver(Protocol):
    """Takes a block from noise level `step` to `step + 1` of its schedule."""

    def step(self, latents: Tensor, velocity: Tensor, step: int, history: History) -> tuple[Tensor, History]:
        """(latents after the step, the block's new history). The first step's history is empty."""
        ...


class Euler:
    """First-order flow-matching steps: latents + (next level - level) * velocity."""

    def __init__(self, noise_levels: list[float]) -> None:
        self.noise_levels = noise_levels

    def step(self, latents: Tensor, velocity: Tensor, step: int, history: History) -> tuple[Tensor, History]:
        """See Solver.step; Euler keeps no history."""
        return latents + (self.noise_levels[step + 1] - self.noise_levels[step]) * velocity, history
