"""What a codec is: pixels to latents, and latents to pixels as they come."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

# B batch, C latent channels, F latent frames, Y X latent rows and columns


@dataclass(frozen=True, kw_only=True, slots=True)
class CodecSizes:
    """How many pixels a latent stands for. Known without any weights."""

    temporal_stride: int  # pixel frames of each latent frame but the first
    spatial_stride: int  # pixels per latent row and column
    num_channels: int
    first_frames: int  # pixel frames of a video's first latent frame

    def num_latent_frames(self, num_frames: int) -> int:
        """Latent frames that cover the first `num_frames` pixel frames of a video."""
        if num_frames < 1:
            return 0
        more = max(0, num_frames - self.first_frames)
        return 1 + -(-more // self.temporal_stride)

    def num_pixel_frames(self, num_latent_frames: int) -> int:
        """Pixel frames that a video's first latent frames stand for."""
        if num_latent_frames < 1:
            return 0
        return self.first_frames + (num_latent_frames - 1) * self.temporal_stride


class DecodeStream(Protocol):
    """Decodes one video from its latent frames in order. Streams of one codec do not disturb each other."""

    def decode(self, latents_BCFYX: Tensor) -> Tensor:
        """Pixels [B, 3, frames, height, width] in [-1, 1] of the next latent frames."""
        ...

    def warm_up(self, latents_BCFYX: Tensor) -> None:
        """Take the next latent frames without making their pixels, to begin in the middle of a video."""
        ...


class Codec(Protocol):
    """Turns pixels [B, 3, frames, height, width] in [-1, 1] into latents of about unit variance, and back."""

    @property
    def sizes(self) -> CodecSizes:
        """How latents lie to pixels."""
        ...

    @property
    def warm_up_frames(self) -> int:
        """Latent frames before a position that a stream must be given for exact pixels from there on."""
        ...

    @property
    def temporal_stride(self) -> int:
        """See CodecSizes."""
        return self.sizes.temporal_stride

    @property
    def spatial_stride(self) -> int:
        """See CodecSizes."""
        return self.sizes.spatial_stride

    @property
    def num_channels(self) -> int:
        """See CodecSizes."""
        return self.sizes.num_channels

    def num_latent_frames(self, num_frames: int) -> int:
        """See CodecSizes."""
        return self.sizes.num_latent_frames(num_frames)

    def num_pixel_frames(self, num_latent_frames: int) -> int:
        """See CodecSizes."""
        return self.sizes.num_pixel_frames(num_latent_frames)

    def encode(self, pixels: Tensor) -> Tensor:
        """Latents [B, C, F, Y, X]. ValueError for sizes that do not fit the strides."""
        ...

    def encode_first_frames(self, pixels: Tensor, num_latent_frames: int) -> Tensor:
        """Latents [B, C, num_latent_frames, Y, X] of a video that is gray (0) after these frames."""
        ...

    def stream(self) -> DecodeStream:
        """A decoder for one video."""
        ...
