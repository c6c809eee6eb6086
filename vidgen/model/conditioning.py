"""What a model's layers see beside the tokens: noise levels and text."""

from dataclasses import dataclass

import torch
from torch import Tensor

# B batch, F latent frames, N text tokens, D width


@dataclass(frozen=True, slots=True)
class Conditioning:
    """What every layer of one forward sees beside the tokens; it travels with them."""

    noise_BFD: Tensor
    noise_BF6D: Tensor
    text_BND: Tensor  # image tokens, where there are such, before the text's

    def frames(self, first: int) -> "Conditioning":
        """Of the frames from this one on."""
        return Conditioning(self.noise_BFD[:, first:], self.noise_BF6D[:, first:], self.text_BND)


TEXT_CHUNK = 64  # tokens: texts of about the same length have the same shape, for compiled layers


def without_repeats(text_BND: Tensor) -> tuple[int, int]:
    """(how many tokens are kept of a text, for how many the last of these stands).

    Only where it pays: on a CPU without gradients, and by whole chunks of tokens.
    """
    length = text_BND.shape[1]
    if text_BND.device.type != "cpu" or torch.is_grad_enabled() or length <= TEXT_CHUNK:
        return length, 1
    differs_N = (text_BND != text_BND[:, -1:]).any(-1).any(0)
    distinct = int(differs_N.nonzero().max()) + 2 if differs_N.any() else 1
    kept = min(length, -(-distinct // TEXT_CHUNK) * TEXT_CHUNK)
    return kept, length - kept + 1
