"""design.md's "blocks, steps, ticks" once more: slow, plain, in float64, sharing no code with the loop.

Of the engine it takes a DiT's weights and its linear, convolution and LayerNorm modules, nothing else. Every
K,V and every version of every block's latents is kept for ever and looked up by (block, step).

What fp32 does to the input of the noise-level embedding is part of the model (1000 radians in fp32 are off by
3e-5), so those angles are taken in fp32 here too.
"""

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import gelu, silu

LayerContext = list[tuple[Tensor, Tensor]]  # per layer: normed, unrotated keys and values [F, S, H, D]


@torch.no_grad()
def plain_denoise(
    model: Any,
    *,
    noise: Sequence[Tensor],
    texts: Sequence[Sequence[Tensor]],
    levels: Sequence[float],
    guidance_scale: float,
    context_frames: int,
    stride: int = 1,
    cache: bool = False,
    anchor_frames: int = 0,
) -> list[Tensor]:
    """Clean latents [C, F, Y, X] of all blocks, from their noise of that shape.

    `texts` is per block (positive [N, T], negative [N, T]); `levels` are num_steps + 1 from 1 to 0.
    """
    model = copy.deepcopy(model).double()
    num_blocks, num_steps = len(noise), len(levels) - 1
    latents = [[block.double()] for block in noise]  # latents[k][t]: block k after t steps
    kept: dict[tuple[int, int, int], LayerContext] = {}  # (block, step, branch)

    def steps_done_before(tick: int, block: int) -> int:
        return max(0, min(num_steps, tick - stride * block))

    for tick in range(stride * (num_blocks - 1) + num_steps):
        for block in range(num_blocks - 1, -1, -1):
            step = tick - stride * block
            if not 0 <= step < num_steps:
                continue
            window = latents[block][step]
            window_levels = [levels[step]] * window.shape[1]
            recomputed = 0
            done_before = steps_done_before(tick, block - 1) if block else 0
            if block and context_frames and not cache:
                last_frames = latents[block - 1][done_before][:, -context_frames:]
                window = torch.cat((last_frames, window), dim=1)
                recomputed = last_frames.shape[1]
                window_levels = [levels[done_before]] * recomputed + window_levels
            velocities = []
            for branch in range(1 if guidance_scale == 1 else 2):
                before: list[LayerContext] = []
                if anchor_frames and block >= 2 and tick >= num_steps:  # block 0 finished in an earlier tick
                    first = kept[0, num_steps - 1, branch]
                    before.append([(k[:anchor_frames], v[:anchor_frames]) for k, v in first])
                if block and context_frames and cache:
                    last = kept[block - 1, done_before - 1, branch]
                    before.append([(k[-context_frames:], v[-context_frames:]) for k, v in last])
                after: list[LayerContext] = []
                next_step = tick - stride * (block + 1)
                if block + 1 < num_blocks and next_step >= 0 and context_frames:
                    following = kept[block + 1, next_step, branch]
                    after.append([(k[:context_frames], v[:context_frames]) for k, v in following])
                velocity, own = plain_forward(
                    model, window, window_levels, texts[block][branch].double(), before, after
                )
                velocities.append(velocity[:, recomputed:])
                kept[block, step, branch] = [(k[recomputed:], v[recomputed:]) for k, v in own]
            velocity = velocities[0]
            if guidance_scale != 1:
                velocity = velocities[1] + guidance_scale * (velocities[0] - velocities[1])
            latents[block].append(latents[block][step] + (levels[step + 1] - levels[step]) * velocity)
    return [versions[num_steps] for versions in latents]


def plain_forward(
    model: Any,
    latents_CFYX: Tensor,
    levels: Sequence[float],
    text_NT: Tensor,
    before: Sequence[LayerContext],
    after: Sequence[LayerContext],
) -> tuple[Tensor, LayerContext]:
    """(velocity [C, F, Y, X], own keys and values per layer)."""
    config = model.config
    channels, frames, height, width = latents_CFYX.shape
    p, q = config.patch
    rows, columns = height // p, width // q
    heads, head_width = config.num_heads, config.width // config.num_heads
    places = [(c, i, j) for c in range(channels) for i in range(p) for j in range(q)]

    folded = torch.stack([latents_CFYX[c, :, i::p, j::q] for c, i, j in places], dim=1)
    x = _to_tokens(model.patch_in(folded))  # [F, S, D]
    text = model.text_in.out(gelu(model.text_in.hidden(text_NT), approximate="tanh"))
    noise = _noise_embedding(model, levels)  # [F, D]
    modulation = model.noise_modulation(silu(noise)).reshape(frames, 6, config.width)

    num_before = sum(context[0][0].shape[0] for context in before)
    num_after = sum(context[0][0].shape[0] for context in after)
    all_frames = num_before + frames + num_after
    turns = _turns(all_frames, rows, columns, head_width, config.rope_theta)
    own_tokens = slice(num_before * rows * columns, (num_before + frames) * rows * columns)
    sees = _window_mask(all_frames, rows, columns, config.window)[own_tokens]

    own: LayerContext = []
    for index, layer in enumerate(model.layers):
        m = (layer.modulation + modulation).unsqueeze(2)  # [F, 6, 1, D]
        h = _norm(x, config.eps) * (1 + m[:, 1]) + m[:, 0]
        module = layer.self_attention
        query = _rms(module.query(h), module.query_norm.weight, config.eps).unflatten(-1, (heads, head_width))
        key = _rms(module.key(h), module.key_norm.weight, config.eps).unflatten(-1, (heads, head_width))
        value = module.value(h).unflatten(-1, (heads, head_width))
        own.append((key, value))
        parts = [context[index] for context in (*before, own, *after)]
        keys, values = (torch.cat([part[i] for part in parts]).flatten(0, 1) for i in range(2))  # [K, H, D]
        attended = _attend(_turn(query.flatten(0, 1), turns[own_tokens]), _turn(keys, turns), values, sees)
        x = x + module.out(attended).reshape(x.shape) * m[:, 2]

        module = layer.cross_attention
        h = layer.cross_norm(x).flatten(0, 1)
        query = _rms(module.query(h), module.query_norm.weight, config.eps).unflatten(-1, (heads, head_width))
        key = _rms(module.key(text), module.key_norm.weight, config.eps).unflatten(-1, (heads, head_width))
        value = module.value(text).unflatten(-1, (heads, head_width))
        x = x + module.out(_attend(query, key, value)).reshape(x.shape)

        h = _norm(x, config.eps) * (1 + m[:, 4]) + m[:, 3]
        x = x + layer.feed_forward.down(gelu(layer.feed_forward.up(h), approximate="tanh")) * m[:, 5]

    m = (model.head_modulation + noise.unsqueeze(1)).unsqueeze(2)
    x = _norm(x, config.eps) * (1 + m[:, 1]) + m[:, 0]
    folded = model.patch_out(x.transpose(1, 2).reshape(frames, -1, rows, columns))
    num_out = folded.shape[1] // (p * q)
    out = torch.empty((num_out, *latents_CFYX.shape[1:]), dtype=torch.float64)
    for number, (c, i, j) in enumerate((c, i, j) for c in range(num_out) for i in range(p) for j in range(q)):
        out[c, :, i::p, j::q] = folded[:, number]
    if config.linear_skip:
        t = torch.tensor(levels, dtype=torch.float64).reshape(1, -1, 1, 1)
        v = model.variance.reshape(-1, 1, 1, 1)
        total = (1 - t) ** 2 * v + t**2
        correction = out[:channels] + out[channels:] * latents_CFYX / torch.sqrt(total)
        # E[noise - clean | z] of Gaussians, and what the network corrects in units of its deviation
        out = (t - (1 - t) * v) / total * latents_CFYX - torch.sqrt(v / total) * correction
    return out, own


def _to_tokens(x_FDYX: Tensor) -> Tensor:
    return x_FDYX.flatten(2).transpose(1, 2)


def _noise_embedding(model: Any, levels: Sequence[float]) -> Tensor:
    half = model.config.num_frequencies // 2
    frequencies = torch.exp(-math.log(10000) * (torch.arange(half, dtype=torch.float32) / half))
    angles = torch.tensor(levels, dtype=torch.float32).unsqueeze(1) * 1000 * frequencies
    waves = torch.cat((angles.double().cos(), angles.double().sin()), dim=1)
    return model.noise_level.out(silu(model.noise_level.hidden(waves)))


def _norm(x: Tensor, eps: float) -> Tensor:
    centred = x - x.mean(dim=-1, keepdim=True)
    return centred / torch.sqrt(centred.square().mean(dim=-1, keepdim=True) + eps)


def _rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / torch.sqrt(x.square().mean(dim=-1, keepdim=True) + eps) * weight


def _turns(frames: int, rows: int, columns: int, head_width: int, theta: float) -> Tensor:
    """Complex [frames*rows*columns, 1, head_width/2] of modulus 1: what RoPE multiplies channel pairs by."""
    third = 2 * (head_width // 6)
    angles = []
    for frame in range(frames):
        for row in range(rows):
            for column in range(columns):
                placed = ((frame, head_width - 2 * third), (row, third), (column, third))
                angles.append(
                    [at * theta ** (-2 * i / width) for at, width in placed for i in range(width // 2)]
                )
    angle = torch.tensor(angles, dtype=torch.float64).unsqueeze(1)
    return torch.polar(torch.ones_like(angle), angle)


def _turn(x_SHD: Tensor, turns: Tensor) -> Tensor:
    pairs = torch.view_as_complex(x_SHD.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * turns).flatten(-2)


def _window_mask(
    frames: int, rows: int, columns: int, window: tuple[int | None, int | None, int | None] | None
) -> Tensor:
    """[S, S] True where a token may see another."""
    places = [(f, y, x) for f in range(frames) for y in range(rows) for x in range(columns)]
    if window is None:
        return torch.ones(len(places), len(places), dtype=torch.bool)
    return torch.tensor(
        [
            [all(r is None or abs(i - j) <= r for i, j, r in zip(a, b, window, strict=True)) for b in places]
            for a in places
        ]
    )


def _attend(query_QHD: Tensor, key_KHD: Tensor, value_KHD: Tensor, sees_QK: Tensor | None = None) -> Tensor:
    """[Q, H*D] by an explicit softmax over all keys."""
    out = []
    for head in range(query_QHD.shape[1]):
        scores = query_QHD[:, head] @ key_KHD[:, head].T / math.sqrt(query_QHD.shape[2])
        if sees_QK is not None:
            scores = scores.masked_fill(~sees_QK, -math.inf)
        weights = torch.exp(scores - scores.max(dim=1, keepdim=True).values)
        out.append(weights / weights.sum(dim=1, keepdim=True) @ value_KHD[:, head])
    return torch.cat(out, dim=1)
