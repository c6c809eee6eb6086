"""Runs of a model's layers as a render does them: what profiles time."""

from collections.abc import Callable

import torch

from vidgen.model.conditioning import Conditioning
from vidgen.model.context import Context, KeyValue, LayerKeyValues
from vidgen.model.dit import DiT

# B batch, F latent frames, S tokens per frame, D width, N text tokens


def run_of(
    model: DiT, frames: int, tokens: int, text_tokens: int, others: int = 0, *, attends: bool = True
) -> Callable[[], object]:
    """A run of a model's layers on so many frames of so many tokens.

    With keys of `others` frames before and after them to join, and as many lent; without self-attention
    unless it `attends`.
    """
    config, like = model.config, {"device": model.device, "dtype": model.dtype}
    x_BFSD = torch.randn(1, frames, tokens, config.width, **like)
    noise = torch.randn(1, frames, config.width, **like)
    text = torch.randn(1, text_tokens, config.width, **like)
    shared = Conditioning(noise, noise.unsqueeze(2).expand(-1, -1, 6, -1).contiguous(), text)
    heads = config.num_heads, config.width // config.num_heads

    def of_others(count: int) -> LayerKeyValues:
        if not count:
            return ()
        kv = KeyValue(*(torch.randn(1, count, tokens, *heads, **like) for _ in range(2)))
        return (kv,) * len(model.layers)

    sides = others // 2, others - others // 2
    context = Context(*map(of_others, sides))
    skips = None if attends else [lambda query, key, value: query] * len(model.layers)
    grid = frames, tokens, 1

    def run() -> object:
        out, lent = model.run_layers(x_BFSD, shared, grid, context, skips, lends=others > 0)
        for kv in lent:  # copies for those who will join them
            for count in sides:
                kv.frames(0, count)
        return out

    return run
