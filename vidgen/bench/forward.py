"""One forward of the built-in model against the same work written as plain PyTorch, and against its floor.

The floor is nothing but the matrix products and the attention.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, linear, rms_norm, scaled_dot_product_attention, silu

from vidgen.bench.machine import interleaved
from vidgen.bench.rendering import PROMPT
from vidgen.builtin import load_small
from vidgen.model.context import Context, KeyValue
from vidgen.model.dit import DiT
from vidgen.model.layers import Block
from vidgen.model.rope import rotations


@torch.inference_mode()
def bench_model(repeats: int = 60) -> list[dict[str, Any]]:
    """Milliseconds of one forward of the built-in model at a render's shapes, and ratios to plain PyTorch."""
    torch.set_num_threads(1)
    model = load_small()
    dit, best = model.dit, model.recommended
    rows = best.height // model.codec.spatial_stride
    frames, context = best.block_frames + best.context_frames, best.context_frames
    latents = torch.randn(1, dit.config.latent_channels, frames, rows, rows)
    levels = torch.full((1, frames), 0.5)
    text = model.text(model.text.ids([PROMPT]))
    heads = dit.config.num_heads
    shape = (1, context, rows * rows, heads, dit.config.width // heads)
    after = tuple(KeyValue(torch.randn(shape), torch.randn(shape)) for _ in dit.layers)
    cases: dict[str, Callable[[], object]] = {
        "engine": lambda: dit.forward_and_lend(latents, levels, text, Context(after=after)),
        "plain": lambda: _plain_forward(dit, latents, levels, text, after),
        "products and attention only": lambda: _products_only(dit, frames, context, rows * rows, text),
    }
    times = interleaved(cases, repeats)
    return [
        {"case": name, "ms": round(1000 * times[name], 3), "ratio": round(times["engine"] / times[name], 3)}
        for name in cases
    ]


def _plain_forward(
    dit: DiT, latents: Tensor, levels: Tensor, text: Tensor, after: tuple[KeyValue, ...]
) -> Tensor:
    """The forward written out for this one shape: no classes, no options, no context handling."""
    config, eps = dit.config, dit.config.eps
    _, _, frames, rows, columns = latents.shape
    tokens, width, heads = rows * columns, config.width, config.num_heads
    x = dit.patch_in(latents[0].transpose(0, 1)).flatten(2).transpose(1, 2).reshape(1, frames, tokens, width)
    half = config.num_frequencies // 2
    angles = levels.unsqueeze(-1) * 1000 * torch.exp(-math.log(10000) * torch.arange(half) / half)
    level = dit.noise_level
    noise = level.out(silu(level.hidden(torch.cat((angles.cos(), angles.sin()), -1))))
    modulation = dit.noise_modulation(silu(noise)).view(1, frames, 6, width)
    text = dit.text_in(text)
    key_frames = frames + after[0].num_frames
    both = rotations((key_frames, rows, columns), width // heads, config.rope_theta, latents.device)
    cosines, sines = (angles[..., 1::2] for angles in both)
    length = frames * tokens
    for layer, kv in zip(_blocks(dit), after, strict=True):
        parts = (layer.modulation + modulation).unsqueeze(3).unbind(2)
        h = layer_norm(x, (width,), eps=eps) * (1 + parts[1]) + parts[0]
        sa = layer.self_attention
        q = rms_norm(sa.query(h), (width,), sa.query_norm.weight, eps).view(1, length, heads, -1)
        k = rms_norm(sa.key(h), (width,), sa.key_norm.weight, eps).view(1, length, heads, -1)
        k = torch.cat((k, kv.key_BFSHD.flatten(1, 2)), 1)
        v = torch.cat((sa.value(h).view(1, length, heads, -1), kv.value_BFSHD.flatten(1, 2)), 1)
        q, k = _plain_rotate(q, cosines[:length], sines[:length]), _plain_rotate(k, cosines, sines)
        out = scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        x = x + sa.out(out.transpose(1, 2).reshape(1, frames, tokens, width)) * parts[2]
        ca = layer.cross_attention
        h = layer_norm(x, (width,), layer.cross_norm.weight, layer.cross_norm.bias, eps)
        q = rms_norm(ca.query(h), (width,), ca.query_norm.weight, eps).view(1, length, heads, -1)
        k = rms_norm(ca.key(text), (width,), ca.key_norm.weight, eps).view(1, -1, heads, width // heads)
        v = ca.value(text).view(1, -1, heads, width // heads)
        out = scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        x = x + ca.out(out.transpose(1, 2).reshape(1, frames, tokens, width))
        h = layer_norm(x, (width,), eps=eps) * (1 + parts[4]) + parts[3]
        x = x + layer.feed_forward.down(gelu(layer.feed_forward.up(h), approximate="tanh")) * parts[5]
    shift, scale = (dit.head_modulation + noise.unsqueeze(2)).unsqueeze(3).unbind(2)
    x = layer_norm(x, (width,), eps=eps) * (1 + scale) + shift
    out = dit.patch_out(x[0].transpose(1, 2).reshape(frames, width, rows, columns))
    out = out.transpose(0, 1).unsqueeze(0)
    t, variance = levels.view(1, 1, -1, 1, 1), dit.variance.view(1, -1, 1, 1, 1)
    total = (1 - t).square() * variance + t.square()
    out = out[:, : latents.shape[1]] + out[:, latents.shape[1] :] * latents * total.rsqrt()
    return latents * ((t - (1 - t) * variance) / total) - out * (variance / total).sqrt()


def _blocks(dit: DiT) -> list[Block]:
    return [layer for layer in dit.layers if isinstance(layer, Block)]


def _plain_rotate(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack((even * cosines - odd * sines, even * sines + odd * cosines), -1).flatten(-2)


def _products_only(dit: DiT, frames: int, context: int, tokens: int, text: Tensor) -> Tensor:
    """The floor: the layers' matrix products and attention of the same shapes, and nothing between them."""
    width, heads, length = dit.config.width, dit.config.num_heads, frames * tokens
    x = torch.randn(1, length, width)
    extra = torch.randn(1, heads, context * tokens, width // heads)

    def split(y: Tensor) -> Tensor:
        return y.view(1, -1, heads, width // heads).transpose(1, 2)

    for layer in _blocks(dit):
        sa, ca, ffn = layer.self_attention, layer.cross_attention, layer.feed_forward
        q, k, v = (split(linear(x, part.weight)) for part in (sa.query, sa.key, sa.value))
        out = scaled_dot_product_attention(q, torch.cat((k, extra), 2), torch.cat((v, extra), 2))
        x = linear(out.transpose(1, 2).flatten(2), sa.out.weight)
        q, k, v = split(ca.query(x)), split(ca.key(text)), split(ca.value(text))
        out = scaled_dot_product_attention(q, k, v)
        x = linear(linear(out.transpose(1, 2).flatten(2), ca.out.weight), ffn.up.weight)
        x = linear(x, ffn.down.weight)
    return x
