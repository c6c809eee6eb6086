"""The parts of a Wan-style video DiT block.

Source: Wan 2.1 (github.com/Wan-Video/Wan2.1, arXiv 2503.20314): adaLN-single modulation per frame, RMSNorm
on queries and keys over the full width, cross-attention to text and image, tanh-GELU feed-forward. Layers
compute in their weights' dtype; norms, modulation and noise levels in fp32, as in diffusers.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, layer_norm, rms_norm, silu

from vidgen.kernels.attention.api import attention
from vidgen.kernels.attention.layout import BlockLayout
from vidgen.kernels.attention.native import attend_weighted
from vidgen.kernels.modulate.api import gate_residual, norm_modulate
from vidgen.kernels.rope.api import norm_rope
from vidgen.kernels.rope.reference import rotate
from vidgen.model.context import KeyValue
from vidgen.model.region import Region

# B batch, F frames, S tokens per frame, N text tokens, M image tokens, I image feature width, H heads,
# D width (or head width after H), T text width

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # queries [B, Q, H, D], keys, values to [B, Q, H, D]


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, in fp32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).to(x.dtype)


class LayerNorm(nn.LayerNorm):
    """Over the last dimension, in fp32 or above, of x's dtype."""

    def forward(self, input: Tensor) -> Tensor:
        dtype = torch.promote_types(input.dtype, torch.float32)
        weight, bias = self.weight.to(dtype), self.bias.to(dtype)
        return layer_norm(input.to(dtype), self.normalized_shape, weight, bias, self.eps).to(input.dtype)


class NoiseLevelEmbedding(nn.Module):
    """Noise levels [B, F] in [0, 1] to conditioning [B, F, D]: sinusoids and a two-layer MLP."""

    def __init__(self, num_frequencies: int, width: int) -> None:
        super().__init__()
        self.num_frequencies = num_frequencies
        self.hidden = nn.Linear(num_frequencies, width)
        self.out = nn.Linear(width, width)

    def forward(self, noise_level_BF: Tensor) -> Tensor:
        half = self.num_frequencies // 2
        exponents = torch.arange(half, device=noise_level_BF.device, dtype=torch.float32) / half
        angles = noise_level_BF.float().unsqueeze(-1) * 1000 * torch.exp(-math.log(10000) * exponents)
        waves = torch.cat((angles.cos(), angles.sin()), dim=-1).to(self.hidden.weight.dtype)
        return self.out(silu(self.hidden(waves)))


class TextProjection(nn.Module):
    """Text embeddings [B, N, T] to the model's width."""

    def __init__(self, text_width: int, width: int) -> None:
        super().__init__()
        self.hidden, self.out = nn.Linear(text_width, width), nn.Linear(width, width)

    def forward(self, text_BNT: Tensor) -> Tensor:
        return self.out(gelu(self.hidden(text_BNT), approximate="tanh"))


class ImageProjection(nn.Module):
    """Features [B, M, I] of an image, or of a first and a last one, to the model's width."""

    def __init__(self, image_width: int, width: int, num_positions: int) -> None:
        super().__init__()
        self.norm_in, self.norm_out = LayerNorm(image_width), LayerNorm(width)
        self.hidden, self.out = nn.Linear(image_width, image_width), nn.Linear(image_width, width)
        self.positions = nn.Parameter(torch.zeros(num_positions, image_width)) if num_positions else None

    def forward(self, image_BMI: Tensor) -> Tensor:
        if self.positions is not None:
            image_BMI = image_BMI + self.positions
        return self.norm_out(self.out(gelu(self.hidden(self.norm_in(image_BMI)))))


@dataclass(frozen=True, slots=True)
class Positions:
    """Where a forward's tokens stand: rotations of all keys, and which of them are its own frames."""

    cosines: Tensor
    sines: Tensor
    own_tokens: slice
    window: BlockLayout | None
    backend: str | None = None  # of attention
    region: Region | None = None  # the tokens that run, where not all of them do
    region_turns: tuple[Tensor, Tensor] | None = None

    @property
    def own(self) -> tuple[Tensor, Tensor]:
        """Rotations of the tokens that run."""
        return self.region_turns or (self.cosines[self.own_tokens], self.sines[self.own_tokens])

    def rotate_window(self, kv: KeyValue) -> Tensor:
        """Keys [B, S, H, D] of the whole window, turned."""
        tokens = self.own_tokens
        return rotate(kv.key_BFSHD.flatten(1, 2), self.cosines[tokens], self.sines[tokens])

    def rotate_before(self, kv: KeyValue) -> Tensor:
        """Keys [B, S, H, D] of frames before the own ones, turned."""
        tokens = slice(0, self.own_tokens.start)
        return rotate(kv.key_BFSHD.flatten(1, 2), self.cosines[tokens], self.sines[tokens])

    def rotate_after(self, kv: KeyValue) -> Tensor:
        """Keys [B, S, H, D] of frames after the own ones, turned."""
        tokens = slice(self.own_tokens.stop, None)
        return rotate(kv.key_BFSHD.flatten(1, 2), self.cosines[tokens], self.sines[tokens])

    def attend(self, query_BQHD: Tensor, key_BKHD: Tensor, value_BKHD: Tensor) -> Tensor:
        """Attention to all keys, or to those in the window."""
        return attention(query_BQHD, key_BKHD, value_BKHD, layout=self.window, backend=self.backend)


class SelfAttention(nn.Module):
    """Attention of a block's frames to themselves and to the context around them."""

    def __init__(self, width: int, num_heads: int, eps: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.query_norm, self.key_norm = RMSNorm(width, eps), RMSNorm(width, eps)

    def forward(
        self,
        x_BFSD: Tensor,
        positions: Positions,
        before: KeyValue | None,
        after: KeyValue | None,
        attend: Attend | None = None,
        stale: KeyValue | None = None,
    ) -> tuple[Tensor, KeyValue]:
        """(attended [B, F, S, D], own keys and values); `attend` stands in for positions.attend.

        `stale`: of the whole window when it last ran, where only a region's tokens run now.
        """
        frames = x_BFSD.shape[1]
        turns, heads, eps = positions.own, self.num_heads, self.query_norm.eps
        query_BLD, key_BLD = self.query(x_BFSD).flatten(1, 2), self.key(x_BFSD).flatten(1, 2)
        _, query_BLHD = norm_rope(query_BLD, self.query_norm.weight, *turns, heads, eps, keep_normed=False)
        normed_BLHD, key_BLHD = norm_rope(key_BLD, self.key_norm.weight, *turns, heads, eps)
        assert normed_BLHD is not None
        value_BFSHD = self.value(x_BFSD).unflatten(-1, (self.num_heads, -1))
        own = KeyValue(normed_BLHD.unflatten(1, (frames, -1)), value_BFSHD)
        if stale is not None:
            assert positions.region is not None
            own = positions.region.window(stale, own)
            key_BLHD = positions.rotate_window(own)
        keys, values = [key_BLHD], [own.value_BFSHD.flatten(1, 2)]
        if before is not None:
            keys.insert(0, positions.rotate_before(before))
            values.insert(0, before.value_BFSHD.flatten(1, 2))
        if after is not None:
            keys.append(positions.rotate_after(after))
            values.append(after.value_BFSHD.flatten(1, 2))
        joined = [torch.cat(parts, dim=1) if len(parts) > 1 else parts[0] for parts in (keys, values)]
        attended_BLHD = (attend or positions.attend)(query_BLHD, *joined)
        return self.out(attended_BLHD.flatten(2).view_as(x_BFSD)), own


class CrossAttention(nn.Module):
    """Attention of video tokens to text tokens, and to the image tokens that come before them."""

    def __init__(self, width: int, num_heads: int, eps: float, image_tokens: int = 0) -> None:
        super().__init__()
        self.num_heads, self.image_tokens = num_heads, image_tokens
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.query_norm, self.key_norm = RMSNorm(width, eps), RMSNorm(width, eps)
        if image_tokens:
            self.image_key, self.image_value = nn.Linear(width, width), nn.Linear(width, width)
            self.image_key_norm = RMSNorm(width, eps)

    def forward(
        self,
        x_BFSD: Tensor,
        text_BND: Tensor,
        backend: str | None = None,
        log_weights_N: Tensor | None = None,
    ) -> Tensor:
        heads = (self.num_heads, -1)
        query_BLHD = self.query_norm(self.query(x_BFSD)).flatten(1, 2).unflatten(-1, heads)
        image_BMD, text_BND = text_BND[:, : self.image_tokens], text_BND[:, self.image_tokens :]
        key_BNHD = self.key_norm(self.key(text_BND)).unflatten(-1, heads)
        value_BNHD = self.value(text_BND).unflatten(-1, heads)
        if log_weights_N is None:
            attended_BLHD = attention(query_BLHD, key_BNHD, value_BNHD, backend=backend)
        else:
            attended_BLHD = attend_weighted(query_BLHD, key_BNHD, value_BNHD, log_weights_N)
        if self.image_tokens:
            attended_BLHD = attended_BLHD + attention(
                query_BLHD,
                self.image_key_norm(self.image_key(image_BMD)).unflatten(-1, heads),
                self.image_value(image_BMD).unflatten(-1, heads),
                backend=backend,
            )
        return self.out(attended_BLHD.flatten(2).view_as(x_BFSD))


class FeedForward(nn.Module):
    """Linear, tanh-GELU, Linear."""

    def __init__(self, width: int, hidden_width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, hidden_width), nn.Linear(hidden_width, width)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.up(x)
        if torch.is_grad_enabled() and hidden.requires_grad:
            return self.down(gelu(hidden, approximate="tanh"))
        # in place: the largest tensor of a forward, and fresh memory for it costs more than the GELU
        return self.down(torch.ops.aten.gelu_(hidden, approximate="tanh"))


def random_rows(count: int, width: int) -> nn.Parameter:
    """[count, width], each row about as long as 1.

    Nothing is drawn or worked out on the meta device: for the one torch imports sympy, for the other its
    compiler, a second and 100 MiB.
    """
    rows = torch.empty(count, width)
    return nn.Parameter(rows if rows.is_meta else rows.normal_() / math.sqrt(width))


class Block(nn.Module):
    """Self-attention, cross-attention, feed-forward; the first and last modulated per frame."""

    def __init__(self, width: int, num_heads: int, ffn_width: int, eps: float, image_tokens: int = 0) -> None:
        super().__init__()
        self.eps = eps
        self.modulation = random_rows(6, width)
        self.self_attention = SelfAttention(width, num_heads, eps)
        self.cross_norm = LayerNorm(width, eps)
        self.cross_attention = CrossAttention(width, num_heads, eps, image_tokens)
        self.feed_forward = FeedForward(width, ffn_width)

    def forward(
        self,
        x_BFSD: Tensor,
        conditioning_BF6D: Tensor,
        text_BND: Tensor,
        positions: Positions,
        before: KeyValue | None = None,
        after: KeyValue | None = None,
        attend: Attend | None = None,
        log_weights_N: Tensor | None = None,
        stale: KeyValue | None = None,
    ) -> tuple[Tensor, KeyValue]:
        """(the tokens after this layer, this layer's own keys and values).

        `log_weights_N`: of text tokens that stand for several, how many (see DiT.run_layers). `stale`: see
        SelfAttention.
        """
        modulation = (self.modulation + conditioning_BF6D.float()).unsqueeze(3)  # [B, F, 6, 1, D]
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = modulation.unbind(2)
        attended, own = self.self_attention(
            norm_modulate(x_BFSD, scale, shift, self.eps), positions, before, after, attend, stale=stale
        )
        x_BFSD = gate_residual(x_BFSD, attended, gate)
        crossed = self.cross_attention(self.cross_norm(x_BFSD), text_BND, positions.backend, log_weights_N)
        x_BFSD = x_BFSD + crossed
        fed = self.feed_forward(norm_modulate(x_BFSD, ffn_scale, ffn_shift, self.eps))
        return gate_residual(x_BFSD, fed, ffn_gate), own

    @property
    def dtype(self) -> torch.dtype:
        """Of the tokens."""
        return self.feed_forward.up.bias.dtype
