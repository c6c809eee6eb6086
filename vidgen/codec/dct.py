"""The built-in codec: an orthonormal 3D DCT of 4x8x8 pixel patches that keeps the coefficients that matter.

Nothing is learned but which coefficients to keep and how to scale them, read off sample clips. Every chunk of
four frames is coded on its own. Decoding makes the steps between patches small; in time it looks back at one
chunk and never ahead, so that every block can be shown as soon as it is decoded.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vidgen.codec.deblock import smooth_edges, smooth_join
from vidgen.codec.protocol import CodecSizes, DecodeStream

# B batch, C latent channels, F latent frames, Y X latent rows and columns


def dct_matrix(size: int) -> Tensor:
    """[size, size] orthonormal DCT-II: row k is the k-th cosine."""
    n = torch.arange(size, dtype=torch.float64)
    matrix = torch.cos(math.pi / size * (n + 0.5) * n.view(-1, 1)) * math.sqrt(2 / size)
    matrix[0] /= math.sqrt(2)
    return matrix.float()


@dataclass(frozen=True, kw_only=True, slots=True)
class DctConfig:
    """Patch size in pixels, how many of its 3 * frames * height * width coefficients are kept, deblocking."""

    patch: tuple[int, int, int] = (4, 8, 8)
    num_channels: int = 128
    whitening: float = 0.5  # 0: natural spectrum, 1: every coefficient has unit variance
    smooth_edges: float = 0.15  # in units of [-1, 1], the highest step that is smoothed between patches
    smooth_joins: float = 0.5  # and between chunks of frames; 0: none

    def __post_init__(self) -> None:
        for name in ("smooth_edges", "smooth_joins"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)}: need 0 (none) or more")
        most = 3 * math.prod(self.patch)
        if not 1 <= self.num_channels <= most:
            raise ValueError(f"num_channels={self.num_channels}: a patch of {self.patch} has 1 to {most}")


class DctCodec(nn.Module):
    """Pixels [B, 3, frames, height, width] in [-1, 1] to latents [B, C, F, Y, X] and back."""

    kept: Tensor
    mean: Tensor
    scale: Tensor
    variance: Tensor

    def __init__(self, config: DctConfig) -> None:
        super().__init__()
        self.config = config
        channels = config.num_channels
        self.register_buffer("kept", torch.arange(channels))
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("scale", torch.ones(channels))  # coefficient = latent * scale + mean
        self.register_buffer("variance", torch.ones(channels))  # of the latents
        for name, size in zip(("frame", "row", "column"), config.patch, strict=True):
            self.register_buffer(f"{name}_basis", dct_matrix(size), persistent=False)
        # a 3-point DCT over RGB is an opponent colour space: light, red-blue, green-magenta
        self.register_buffer("colour_basis", dct_matrix(3), persistent=False)

    @property
    def sizes(self) -> CodecSizes:
        """See Codec."""
        frames, rows, _ = self.config.patch
        channels = self.config.num_channels
        return CodecSizes(
            temporal_stride=frames, spatial_stride=rows, num_channels=channels, first_frames=frames
        )

    @property
    def warm_up_frames(self) -> int:
        """See Codec. A chunk is led over from the one before it."""
        return int(self.config.smooth_joins > 0 and self.temporal_stride > 1)

    @property
    def temporal_stride(self) -> int:
        """See CodecSizes."""
        return self.config.patch[0]

    @property
    def spatial_stride(self) -> int:
        """See CodecSizes."""
        return self.config.patch[1]

    @property
    def num_channels(self) -> int:
        """See CodecSizes."""
        return self.config.num_channels

    def num_latent_frames(self, num_frames: int) -> int:
        """Latent frames that cover `num_frames` pixel frames."""
        return self.sizes.num_latent_frames(num_frames)

    def num_pixel_frames(self, num_latent_frames: int) -> int:
        """See Codec."""
        return self.sizes.num_pixel_frames(num_latent_frames)

    def stream(self) -> DecodeStream:
        """See Codec."""
        return _DctDecodeStream(self)

    @torch.no_grad()
    def fit(self, clips: Tensor) -> None:
        """Choose and scale the coefficients by their variance over clips [B, 3, frames, height, width]."""
        coefficients = self._transform(clips).transpose(0, 1).flatten(1)
        variance, mean = torch.var_mean(coefficients, dim=1)
        self.kept = variance.argsort(descending=True)[: self.num_channels].sort().values
        deviation = variance[self.kept].sqrt().clamp_min(1e-4)
        scale = deviation**self.config.whitening
        variance_left = (deviation / scale).square()
        overall = variance_left.mean().sqrt()
        self.mean, self.scale = mean[self.kept], scale * overall
        self.variance = variance_left / overall.square()

    def encode(self, pixels: Tensor) -> Tensor:
        """Latents [B, C, F, Y, X] of pixels whose sizes are multiples of the patch."""
        coefficients = self._transform(pixels.to(self.mean.device))[:, self.kept]
        return (coefficients - _per_channel(self.mean)) / _per_channel(self.scale)

    def encode_first_frames(self, pixels: Tensor, num_latent_frames: int) -> Tensor:
        """See Codec. Every gray chunk of frames has the same latents."""
        missing = self.num_pixel_frames(self.num_latent_frames(pixels.shape[2])) - pixels.shape[2]
        first = self.encode(nn.functional.pad(pixels, (0, 0, 0, 0, 0, missing)))
        num_gray = num_latent_frames - first.shape[2]
        if num_gray < 0:
            raise ValueError(
                f"num_latent_frames={num_latent_frames}: {pixels.shape[2]} frames are {first.shape[2]}; "
                "give fewer"
            )
        gray = self.encode(torch.zeros_like(pixels[:, :, :1]).repeat(1, 1, self.temporal_stride, 1, 1))
        return torch.cat([first, gray.repeat(1, 1, num_gray, 1, 1)], dim=2)

    def decode(self, latents_BCFYX: Tensor) -> Tensor:
        """Pixels [B, 3, frames, height, width] in [-1, 1] of a whole video, where the codec is."""
        return self.stream().decode(latents_BCFYX)

    def decode_chunk(self, latents_BCYX: Tensor) -> Tensor:
        """Pixels [B, 3, frames, height, width] of one latent frame alone, hardly beyond [-1, 1]."""
        latents_BCYX = latents_BCYX.to(self.mean)
        batch, channels, rows, columns = latents_BCYX.shape
        if channels != self.num_channels:
            raise ValueError(f"latents of {channels} channels: this codec has {self.num_channels}")
        t, y, x = self.config.patch
        coefficients = latents_BCYX.new_zeros(batch, 3 * t * y * x, rows, columns)
        coefficients[:, self.kept] = latents_BCYX * self.scale.view(-1, 1, 1) + self.mean.view(-1, 1, 1)
        patches = coefficients.unflatten(1, (3, t, y, x))
        pixels = torch.einsum(
            "bktyxij,kc,tu,yv,xw->bcuivjw",
            patches, self.colour_basis, self.frame_basis, self.row_basis, self.column_basis,
        )  # fmt: skip
        pixels = pixels.reshape(batch, 3, t, rows * y, columns * x).clamp(-1, 1)
        for dim, period in ((3, y), (4, x)):
            pixels = smooth_edges(pixels, dim, period, self.config.smooth_edges)
        return pixels

    def _transform(self, pixels: Tensor) -> Tensor:
        """All coefficients [B, 3*t*y*x, F, Y, X]."""
        t, y, x = self.config.patch
        if any(size % patch for size, patch in zip(pixels.shape[2:], (t, y, x), strict=True)):
            raise ValueError(
                f"pixels of {tuple(pixels.shape[2:])} (frames, height, width): need multiples of {(t, y, x)}"
            )
        patches = pixels.unflatten(4, (-1, x)).unflatten(3, (-1, y)).unflatten(2, (-1, t))
        coefficients = torch.einsum(
            "bcfuivjw,kc,tu,yv,xw->bktyxfij",
            patches, self.colour_basis, self.frame_basis, self.row_basis, self.column_basis,
        )  # fmt: skip
        return coefficients.flatten(1, 4)


class _DctDecodeStream(DecodeStream):
    """See DecodeStream. It remembers one chunk, as it was before it was led over from the one before it."""

    def __init__(self, codec: DctCodec) -> None:
        self._codec = codec
        self._before: Tensor | None = None

    def decode(self, latents_BCFYX: Tensor) -> Tensor:
        """See DecodeStream. One latent frame at a time: other shapes would give other last bits."""
        chunks = [self._next(latents_BCYX) for latents_BCYX in latents_BCFYX.unbind(2)]
        return torch.cat(chunks, dim=2).clamp_(-1, 1)

    def warm_up(self, latents_BCFYX: Tensor) -> None:
        """See DecodeStream."""
        if latents_BCFYX.shape[2]:
            self._before = self._codec.decode_chunk(latents_BCFYX[:, :, -1])

    def _next(self, latents_BCYX: Tensor) -> Tensor:
        before, chunk = self._before, self._codec.decode_chunk(latents_BCYX)
        if before is not None and before.shape != chunk.shape:
            raise ValueError(
                f"latents of {tuple(chunk.shape)} pixels after {tuple(before.shape)}: one stream is one video"
            )
        self._before = chunk
        if before is None:
            return chunk
        return smooth_join(before, chunk, self._codec.config.smooth_joins)


def _per_channel(values: Tensor) -> Tensor:
    return values.view(1, -1, 1, 1, 1)
