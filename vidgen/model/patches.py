"""Latents cut into patches and put together again, and what a network's output is added to."""

from torch import Tensor

# B batch, C channels, F frames, Y X latent rows and columns, p q rows and columns of a patch


def fold(latents_BCFYX: Tensor, patch: tuple[int, int]) -> Tensor:
    """[B*F, C*p*q, Y/p, X/q]: patches become channels."""
    p, q = patch
    frames_first = latents_BCFYX.transpose(1, 2).flatten(0, 1)
    patches = frames_first.unflatten(3, (-1, q)).unflatten(2, (-1, p))  # [BF, C, Y/p, p, X/q, q]
    return patches.permute(0, 1, 3, 5, 2, 4).flatten(1, 3)


def unfold(patched: Tensor, like_BCFYX: Tensor, patch: tuple[int, int]) -> Tensor:
    """[B, C, F, Y, X] of patches [B*F, C*p*q, Y/p, X/q], for as many videos as `like_BCFYX`."""
    p, q = patch
    patches = patched.unflatten(1, (-1, p, q)).permute(0, 1, 4, 2, 5, 3)
    frames_first = patches.flatten(4, 5).flatten(2, 3)
    return frames_first.unflatten(0, (like_BCFYX.shape[0], -1)).transpose(1, 2)


def add_linear_estimate(
    out: Tensor, latents_BCFYX: Tensor, noise_level_BF: Tensor, variance: Tensor
) -> Tensor:
    """Velocity from an output of unit variance, given per-channel variance of clean latents.

    The best linear estimate of clean x from z = (1-t)x + t*noise is (1-t)v z / s, s = (1-t)^2 v + t^2;
    the network adds sqrt(v / s) times its output (EDM preconditioning, arXiv 2206.00364, written for flow
    matching and per channel). Its output is a correction plus a gain times z / sqrt(s): the gain lets a
    narrow network take noise out of many channels (a plain background) without carrying them.
    """
    correction, gain = out.chunk(2, dim=1)
    t = noise_level_BF.to(out.dtype).view(out.shape[0], 1, -1, 1, 1)
    variance = variance.to(out.dtype).view(1, -1, 1, 1, 1)
    total = (1 - t).square() * variance + t.square()
    out = correction + gain * latents_BCFYX * total.rsqrt()
    return latents_BCFYX * ((t - (1 - t) * variance) / total) - out * (variance / total).sqrt()
