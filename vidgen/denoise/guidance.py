"""Classifier-free guidance (arXiv 2207.12598): which branches are run, and how they are combined."""

from collections.abc import Sequence

from torch import Tensor


def num_branches(guidance_scale: float) -> int:
    """1 when guidance does nothing, else 2: the prompt and the negative prompt."""
    return 1 if guidance_scale == 1 else 2


def combine(velocities: Sequence[Tensor], guidance_scale: float) -> Tensor:
    """negative + scale * (positive - negative), or the only branch there is."""
    if len(velocities) == 1:
        return velocities[0]
    positive, negative = velocities
    return negative + guidance_scale * (positive - negative)
