"""The Wan 2.1 and 2.2 VAEs as a codec: frame by frame with causal caches, in tiles where frames are large.

Equal to diffusers' AutoencoderKLWan, which does the mathematics. Latents are normalised as DiTs take them.
"""

import json
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from vidgen.codec.live_bytes import LiveBytes
from vidgen.codec.protocol import Codec, CodecSizes, DecodeStream
from vidgen.codec.tiles import Grid
from vidgen.codec.wan_files import empty_vae, load_vae, read_config, sizes_of
from vidgen.codec.wan_stages import Decoder, Encoder, decoder_stages, frames_to_settle

# B batch, C latent channels, F latent frames, Y X latent rows and columns

LEAST_TILE = 4  # latents: fewer leave nothing between the overlaps


def load_wan_codec(
    path: Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    tile: tuple[int, int] | None = None,
) -> "WanCodec":
    """The codec of a diffusers folder (or its vae/) or of Wan2.1_VAE.pth, Wan2.2_VAE.pth (or safetensors).

    ValueError in one line when it is something else or incomplete.
    """
    return WanCodec(load_vae(path, dtype=dtype, device=device), tile=tile)


def wan_codec_sizes(path: Path) -> CodecSizes:
    """Sizes of the codec that `load_wan_codec` would load; reads no weights and does not import diffusers."""
    return sizes_of(read_config(path))


def wan_warm_up_frames(path: Path) -> int:
    """See Codec.warm_up_frames; reads no weights."""
    return decoder_stages(empty_vae(read_config(path)).decoder)[0].reach


def wan_decode_bytes(
    path: Path,
    height: int,
    width: int,
    *,
    dtype: torch.dtype = torch.float32,
    tile: tuple[int, int] | None = None,
    device: str = "cpu",
) -> int:
    """See WanCodec.decode_bytes; reads no weights."""
    return _decode_bytes(read_config(path), (height, width), dtype, tile, torch.device(device))


class WanCodec(Codec):
    """See Codec. Latents and pixels come out in fp32, on the codec's device, whatever its dtype.

    `tile` (height, width in pixels) bounds what is decoded and encoded at once. The result then only looks
    like the whole: attention and convolutions see one tile at a time. Tiles save an accelerator's memory: the
    caches of those that wait lie in the CPU's, where they take as much as the whole's or more.
    """

    def __init__(self, vae: Any, *, tile: tuple[int, int] | None = None) -> None:
        self.vae = vae.eval().requires_grad_(False)
        self._sizes = sizes_of(vae.config)
        self.tile = tile and _checked_tile(tile, self._sizes.spatial_stride)
        self.stages = decoder_stages(vae.decoder)
        self._mean = torch.tensor(vae.config.latents_mean).view(1, -1, 1, 1, 1)
        # the inverse is rounded as in diffusers' pipelines
        self._inverse_std = 1.0 / torch.tensor(vae.config.latents_std).view(1, -1, 1, 1, 1)
        self.to(self.device)

    @property
    def sizes(self) -> CodecSizes:
        """See Codec."""
        return self._sizes

    @property
    def warm_up_frames(self) -> int:
        """See Codec. From the structure: what all causal convolutions of the decoder together look back."""
        return self.stages[0].reach

    @property
    def device(self) -> torch.device:
        """Where the VAE's weights are."""
        return next(self.vae.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """In which the VAE computes."""
        return next(self.vae.parameters()).dtype

    def to(self, device: str | torch.device) -> Self:
        """Move the weights. Streams go on there."""
        self.vae.to(device)
        self._mean, self._inverse_std = self._mean.to(device), self._inverse_std.to(device)
        return self

    def stream(self) -> DecodeStream:
        """See Codec."""
        return _WanDecodeStream(self)

    @torch.no_grad()
    def decode(self, latents_BCFYX: Tensor) -> Tensor:
        """Pixels [B, 3, frames, height, width] of a whole video."""
        return self.stream().decode(latents_BCFYX)

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Latents [B, C, F, Y, X] of an image (one frame) or of 1 + a multiple of 4 frames.

        Pixels may lie on another device: each chunk is moved as it is used. ValueError for other sizes.
        """
        grid, num_frames, stride = self._grid_of(pixels), pixels.shape[2], self.temporal_stride
        if num_frames % stride != 1:
            nearest = max(1, round((num_frames - 1) / stride) * stride + 1)
            raise ValueError(f"frames={num_frames}: need 1 + a multiple of {stride}; try {nearest}")
        return torch.cat(list(self._encoded(self._chunks(pixels), grid)), dim=2)

    @torch.no_grad()
    def encode_first_frames(self, pixels: Tensor, num_latent_frames: int) -> Tensor:
        """See Codec. Encodes no more gray frames than there are before the latents repeat."""
        grid, num_given = self._grid_of(pixels), self.num_latent_frames(pixels.shape[2])
        num_gray = num_latent_frames - num_given
        if num_gray < 0:
            raise ValueError(
                f"num_latent_frames={num_latent_frames}: {pixels.shape[2]} frames are {num_given}; give fewer"
            )
        missing = self.num_pixel_frames(num_given) - pixels.shape[2]
        given = nn.functional.pad(pixels, (0, 0, 0, 0, 0, missing))
        gray = pixels.new_zeros(1, 1, 1, 1, 1).expand(
            *pixels.shape[:2], self.temporal_stride, *pixels.shape[3:]
        )
        num_encoded = min(num_gray, frames_to_settle(self.vae.encoder) + 1)
        chunks = [*self._chunks(given), *[gray] * num_encoded]
        latents = list(self._encoded(chunks, grid))
        return torch.cat([*latents, *latents[-1:] * (num_gray - num_encoded)], dim=2)

    def decode_bytes(self, height: int, width: int) -> int:
        """Bytes on its device that decoding one video of this size holds at once, beside the VAE's weights.

        Found by decoding three latent frames without storage (device `meta`) and counting what is alive.
        Exact for the caches and what passes between operations; not counted is what convolutions use inside,
        and the attention of the smallest level.
        """
        return _decode_bytes(self.vae.config, (height, width), self.dtype, self.tile, self.device)

    def grid(self, rows: int, columns: int) -> Grid:
        """Tiles over frames of so many latent rows and columns."""
        stride = self.spatial_stride
        return Grid(rows, columns, self.tile and (self.tile[0] // stride, self.tile[1] // stride))

    def denormalised(self, latents_BCFYX: Tensor) -> Tensor:
        """As the VAE takes them, in its dtype and on its device."""
        return (latents_BCFYX.to(self.device).float() / self._inverse_std + self._mean).to(self.dtype)

    def _encoded(self, chunks: Iterable[Tensor], grid: Grid) -> Iterator[Tensor]:
        """A latent frame of each chunk."""
        encoders = [Encoder(self.vae, parks=len(grid) > 1) for _ in range(len(grid))]
        for chunk in chunks:
            tiles = grid.cut(chunk.to(self.device, self.dtype), self.spatial_stride)
            parts = (encoder.next(tile) for encoder, tile in zip(encoders, tiles, strict=True))
            yield (grid.join(parts).float() - self._mean) * self._inverse_std

    def _chunks(self, pixels: Tensor) -> list[Tensor]:
        return [pixels[:, :, :1], *pixels[:, :, 1:].split(self.temporal_stride, dim=2)][: pixels.shape[2]]

    def _grid_of(self, pixels: Tensor) -> Grid:
        """Tiles of pixels. ValueError when their sizes are not the VAE's."""
        stride = self.spatial_stride
        if pixels.ndim != 5 or pixels.shape[1] != 3 or pixels.shape[2] < 1:
            raise ValueError(f"pixels of {tuple(pixels.shape)}: need [batch, 3, frames, height, width]")
        for name, size in zip(("height", "width"), pixels.shape[3:], strict=True):
            if size < 1 or size % stride:
                nearest = max(stride, round(size / stride) * stride)
                raise ValueError(f"{name}={size}: need a multiple of {stride}; try {nearest}")
        return self.grid(pixels.shape[3] // stride, pixels.shape[4] // stride)


class _WanDecodeStream(DecodeStream):
    """See DecodeStream. Holds the caches of one video, of each tile its own."""

    def __init__(self, codec: WanCodec) -> None:
        self._codec = codec
        self._shape: tuple[int, ...] = ()  # batch, channels, rows, columns of the first latents
        self._grid, self._decoders = Grid(1, 1, None), []

    @torch.no_grad()
    def decode(self, latents_BCFYX: Tensor) -> Tensor:
        """See DecodeStream: one pixel frame of a video's first latent frame, four of every other."""
        frames = [self._pixels(frame) for frame in self._frames(latents_BCFYX)]
        return torch.cat(frames, dim=2)

    @torch.no_grad()
    def warm_up(self, latents_BCFYX: Tensor) -> None:
        """See DecodeStream. Only as much of the decoder runs as the frame after these depends on."""
        for index, frame in enumerate(self._frames(latents_BCFYX)):
            distance = latents_BCFYX.shape[2] - index
            for decoder, tile in zip(self._decoders, self._grid.cut(frame), strict=True):
                decoder.skip(tile, distance)

    def _pixels(self, frame: Tensor) -> Tensor:
        tiles = zip(self._decoders, self._grid.cut(frame), strict=True)
        pixels = self._grid.join((decoder.next(tile) for decoder, tile in tiles), self._codec.spatial_stride)
        return pixels.float().clamp_(-1, 1)

    def _frames(self, latents_BCFYX: Tensor) -> Iterator[Tensor]:
        """Latents one frame at a time, as the VAE takes them. ValueError when they are not of this video."""
        batch, channels, num_frames, rows, columns = latents_BCFYX.shape
        if channels != self._codec.num_channels or not num_frames:
            shape, need = tuple(latents_BCFYX.shape), self._codec.num_channels
            raise ValueError(f"latents of {shape}: need {need} channels and a frame or more")
        shape = (batch, channels, rows, columns)
        if not self._shape:
            self._shape, self._grid = shape, self._codec.grid(rows, columns)
            self._decoders = [
                Decoder(self._codec.vae, self._codec.stages, parks=len(self._grid) > 1)
                for _ in range(len(self._grid))
            ]
        elif self._shape != shape:
            raise ValueError(
                f"latents of {shape} (batch, channels, rows, columns): this stream is of {self._shape}; "
                "open another"
            )
        return (self._codec.denormalised(frame) for frame in latents_BCFYX.split(1, dim=2))


def _checked_tile(tile: tuple[int, int], stride: int) -> tuple[int, int]:
    for name, size in zip(("tile height", "tile width"), tile, strict=True):
        if size % stride or size < LEAST_TILE * stride:
            nearest = max(LEAST_TILE, round(size / stride)) * stride
            raise ValueError(
                f"{name}={size}: need a multiple of {stride} of at least {LEAST_TILE * stride}; try {nearest}"
            )
    return tile


def _decode_bytes(
    config: Any,
    size: tuple[int, int],
    dtype: torch.dtype,
    tile: tuple[int, int] | None,
    device: torch.device,
) -> int:
    """See WanCodec.decode_bytes. One tile runs; the caches of the others lie in the CPU's memory."""
    stride = sizes_of(config).spatial_stride
    rows, columns = (pixels // stride for pixels in size)
    grid = Grid(rows, columns, tile and (tile[0] // stride, tile[1] // stride))
    tile_rows, tile_columns = (spans[0][1] for spans in (grid.rows, grid.columns))
    peak, cached = _tile_bytes(json.dumps(dict(config), sort_keys=True), tile_rows, tile_columns, dtype)
    if len(grid) == 1:
        return peak
    frames = 3 * sizes_of(config).temporal_stride * size[0] * size[1] * (dtype.itemsize + 4)  # also in fp32
    waiting = (len(grid) - 1) * cached if device.type == "cpu" else 0
    return peak + frames + waiting


@cache
def _tile_bytes(config: str, rows: int, columns: int, dtype: torch.dtype) -> tuple[int, int]:
    """Bytes at the peak of decoding frames of so many latent rows and columns, and of the caches alone."""
    vae = empty_vae(json.loads(config))
    # without storage attention is computed with its matrix of all pairs, which no device's kernel makes
    vae.decoder.mid_block.attentions = nn.ModuleList(nn.Identity() for _ in vae.decoder.mid_block.attentions)
    nn.Module.to(vae, dtype)  # diffusers' own `to` warns of dtypes
    codec = WanCodec(vae)
    stream, latent = codec.stream(), torch.empty(1, codec.num_channels, 1, rows, columns, device="meta")
    with LiveBytes() as live:
        for _ in range(3):  # the first two are smaller: of one frame, and without all caches
            stream.decode(latent)
    return live.peak, live.now
