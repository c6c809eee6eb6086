"""The Wan VAE's decoder and encoder, a few frames at a time, each walk with feature caches of its own.

Shapes: B batch, C latent channels, Y X latent rows and columns. What a causal convolution needs of the frames
before is in its cache, two frames of its input, so that memory does not grow with the video.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn

Cache = list[Any]  # an entry for each causal convolution; None before the first frame


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A part of the decoder whose convolutions all run at one frame rate."""

    run: Callable[[Tensor, Cache], Tensor]
    num_entries: int  # of its cache
    reach: int  # latent frames before the first wanted one that it must have run for exact pixels


def decoder_stages(decoder: Any) -> list[Stage]:
    """The decoder of an AutoencoderKLWan in order, and how far back each stage matters."""

    def middle(frames: Tensor, cache: Cache) -> Tensor:
        return decoder.mid_block(frames, feat_cache=cache, feat_idx=[0])

    def head(frames: Tensor, cache: Cache) -> Tensor:
        return _convolve(decoder.conv_out, decoder.nonlinearity(decoder.norm_out(frames)), cache)

    parts: list[tuple[nn.Module, Callable[[Tensor, Cache], Tensor]]] = [
        (decoder.conv_in, lambda frames, cache: _convolve(decoder.conv_in, frames, cache)),
        (decoder.mid_block, middle),
        *((block, _up(block)) for block in decoder.up_blocks),
        (decoder.conv_out, head),
    ]
    lookbacks, spare, rate = [], [], 1  # in latent frames
    for module, _ in parts:
        lookback = Fraction(sum(conv.kernel_size[0] - 1 for conv in _causal_convolutions(module)), rate)
        spare.append(0)
        if _doubles(module):
            # its first run takes and gives one frame only, and its second one knows of none before
            lookback, spare[-1] = max(lookback, Fraction(2)), int(rate > 1)
            rate *= 2
        lookbacks.append(lookback)
    return [
        Stage(
            run=run,
            num_entries=len(_causal_convolutions(module)),
            reach=math.ceil(sum(lookbacks[index:], Fraction(0))) + spare[index],
        )
        for index, (module, run) in enumerate(parts)
    ]


class Decoder:
    """Pixels of one latent frame after the other, not clamped. `parks`: caches wait in the CPU's memory."""

    def __init__(self, vae: Any, stages: list[Stage], *, parks: bool = False) -> None:
        self._vae, self._stages, self._parks = vae, stages, parks
        self._caches: list[Cache] = [[None] * stage.num_entries for stage in stages]

    def next(self, latent_BC1YX: Tensor) -> Tensor:
        """Pixels [B, 3, frames, height, width] of the next latent frame."""
        pixels = self._run(latent_BC1YX, 1)
        assert pixels is not None
        return pixels

    def skip(self, latent_BC1YX: Tensor, distance: int) -> None:
        """Take a latent frame that is `distance` before the first wanted one, as far as that needs it."""
        self._run(latent_BC1YX, distance)

    def _run(self, latent_BC1YX: Tensor, distance: int) -> Tensor | None:
        frames = self._vae.post_quant_conv(latent_BC1YX)
        for stage, cache in zip(self._stages, self._caches, strict=True):
            if distance > stage.reach:
                return None
            frames = stage.run(frames, cache)
            if self._parks:
                _park(cache)
        return _unpatched(frames, self._vae.config.patch_size or 1)


class Encoder:
    """Latents, not normalised, of one frame and then of one chunk of frames after the other. See Decoder."""

    def __init__(self, vae: Any, *, parks: bool = False) -> None:
        self._vae, self._parks = vae, parks
        self._cache: Cache = [None] * len(_causal_convolutions(vae.encoder))

    def next(self, pixels: Tensor) -> Tensor:
        """The latent frame [B, C, 1, Y, X] that is most likely, of [B, 3, frames, height, width]."""
        patches = _patched(pixels, self._vae.config.patch_size or 1)
        moments = self._vae.quant_conv(self._vae.encoder(patches, feat_cache=self._cache, feat_idx=[0]))
        if self._parks:
            _park(self._cache)
        return moments.chunk(2, dim=1)[0]  # means, then logarithms of variances


def frames_to_settle(encoder: nn.Module) -> int:
    """Latent frames that still differ from the next after the pixels stopped changing."""
    frames = 0
    for conv in _causal_convolutions(encoder):
        if conv.stride[0] > 1:  # over the last frame before a pair and the pair
            frames = math.ceil((frames + 1) / conv.stride[0])
        else:
            frames += conv.kernel_size[0] - 1
    return frames


def _causal_convolutions(module: nn.Module) -> list[nn.Conv3d]:
    return [part for part in module.modules() if isinstance(part, nn.Conv3d)]


def _park(cache: Cache) -> None:
    """To the CPU's memory; every convolution takes its part back as it runs."""
    cache[:] = [entry.cpu() if isinstance(entry, Tensor) else entry for entry in cache]


def _convolve(conv: Any, frames: Tensor, cache: Cache) -> Tensor:
    """A single causal convolution whose cache keeps its last two input frames."""
    before = cache[0]
    cache[0] = frames[:, :, -2:].clone()
    if before is not None and frames.shape[2] < 2:
        cache[0] = torch.cat([before[:, :, -1:].to(frames.device), cache[0]], dim=2)
    return conv(frames, before)


def _up(block: Any) -> Callable[[Tensor, Cache], Tensor]:
    doubles = _doubles(block)

    def run(frames: Tensor, cache: Cache) -> Tensor:
        is_first = cache[0] is None
        if is_first and doubles:
            frames = frames[:, :, -1:]  # more than one after a warm-up that began later here than below
        return block(frames, feat_cache=cache, feat_idx=[0], first_chunk=is_first)

    return run


def _doubles(module: nn.Module) -> bool:
    """Whether it gives two frames for one."""
    return any(getattr(part, "mode", None) == "upsample3d" for part in module.modules())


def _patched(pixels: Tensor, size: int) -> Tensor:
    """[B, 3 * size * size, frames, rows, columns]: the columns of a patch vary slower than its rows."""
    patches = pixels.unflatten(4, (-1, size)).unflatten(3, (-1, size))
    return patches.permute(0, 1, 6, 4, 2, 3, 5).flatten(1, 3)


def _unpatched(patches: Tensor, size: int) -> Tensor:
    """Pixels again."""
    pixels = patches.unflatten(1, (-1, size, size)).permute(0, 1, 4, 5, 3, 6, 2)
    return pixels.flatten(5, 6).flatten(3, 4)
