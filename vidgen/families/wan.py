"""Wan 2.1 and 2.2 as the engine sees them, from diffusers' folders or the original files."""

import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vidgen.codec.protocol import Codec
from vidgen.codec.wan import load_wan_codec, wan_codec_sizes, wan_decode_bytes, wan_warm_up_frames
from vidgen.conditioning.clip import encode_images
from vidgen.conditioning.umt5 import TextCache, encode_prompts
from vidgen.denoise.given import NOTHING, Given
from vidgen.denoise.multistep import SolverName, make_solver
from vidgen.denoise.solver import Solver
from vidgen.families.family import Decoding, LoadDecode, Pictures, as_pixels
from vidgen.families.wan_defaults import recommended
from vidgen.families.wan_folder import WanFolder, read_folder
from vidgen.model.dit import DiT
from vidgen.model.dtypes import DType
from vidgen.model.lora import Lora
from vidgen.model.tensor_files import fingerprint
from vidgen.model.wan import dit_config
from vidgen.model.weights import WanWeights, Weights
from vidgen.sections import LoraConfig, OffloadConfig

# F frames, H height, W width


class WanFamily:
    """See Family. Encoders are loaded when they are used, and let go after."""

    def __init__(
        self,
        root: Path,
        dtype: DType | None,
        loras: Sequence[LoraConfig],
        *,
        tile: int | None,
        offload: OffloadConfig,
        text_cache: Path | None,
    ) -> None:
        self.folder: WanFolder = read_folder(root)
        self.name = str(root)
        self.dtype: DType = dtype or "bf16"
        has_clip = self.folder.image is not None
        configs = [
            dit_config(config, dtype=self.dtype, has_clip=has_clip) for config in self.folder.configs()
        ]
        with torch.device("meta"):
            self.dits = tuple(DiT(config).eval().requires_grad_(False) for config in configs)
        self.boundary = self.folder.boundary
        self.sizes = wan_codec_sizes(self.folder.codec)
        self.recommended = recommended(self.folder, configs[0])
        self.loras = tuple(Lora(lora.path.absolute(), lora.scale, lora.expert) for lora in loras)
        self.tile, self.offload = tile, offload
        self.text_cache = TextCache(text_cache) if text_cache is not None else None
        self._codec: Codec | None = None
        for weights, dit in zip(self.weights(), self.dits, strict=True):
            weights.check({name: tuple(tensor.shape) for name, tensor in dit.state_dict().items()})

    def weights(self) -> tuple[Weights, ...]:
        """See Family.weights."""
        return tuple(
            WanWeights(folder.absolute(), self.folder.format, dit.config, self.loras)
            for folder, dit in zip(self.folder.transformers, self.dits, strict=True)
        )

    def load_dits(self, device: str) -> None:
        """See Family.load_dits."""
        for weights, dit in zip(self.weights(), self.dits, strict=True):
            weights.read(dit.to_empty(device=device).state_dict())

    def encode_texts(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """See Family.encode_texts."""
        if not prompts:
            return {}
        device = _device(self.offload.encoders)
        return encode_prompts(
            self.folder.text,
            prompts,
            device=device,
            dtype=self._encoder_dtype,
            cache=self.text_cache,
        )

    @torch.inference_mode()
    def give(self, pictures: Pictures, num_latent_frames: int) -> Given:
        """See Family.give."""
        self._check_pictures(pictures)
        if pictures.first is None:
            return NOTHING
        first = as_pixels(pictures.first)
        if self.folder.kind in ("t2v", "ti2v"):
            pinned = self.codec().encode(first)[0, :, :num_latent_frames]
            return Given(pinned_CFYX=pinned.clone())
        channels = self._channels(first, pictures, num_latent_frames)
        return Given(channels_CFYX=_without_tail(channels), image_BMI=self._image_features(pictures))

    def make_solver(
        self, name: SolverName | None, num_steps: int, shift: float
    ) -> tuple[Solver, list[float]]:
        """See Family.make_solver."""
        scheduler = self.folder.scheduler
        return make_solver(name or (None if scheduler else "unipc"), num_steps, shift, scheduler)

    def codec(self) -> Codec:
        """See Family.codec."""
        if self._codec is None:
            self._codec = load_wan_codec(
                self.folder.codec, device=_device(self.offload.codec), tile=_square(self.tile)
            )
        return self._codec

    def load_decode(self) -> LoadDecode:
        """See Family.load_decode."""
        return partial(_load_decode, self.folder.codec.absolute(), self.tile)

    @property
    def warm_up_frames(self) -> int:
        """See Family.warm_up_frames."""
        return wan_warm_up_frames(self.folder.codec)

    def decode_bytes(self, height: int, width: int) -> int:
        """See Family.decode_bytes."""
        return wan_decode_bytes(self.folder.codec, height, width)

    def warn(self, prompts: Sequence[str]) -> None:
        """See Family.warn: any text will do."""

    def facts(self) -> dict[str, Any]:
        """See Family.facts."""
        files = self.folder.files()
        parts = {
            f"transformer{'' if index == 0 else f'_{index + 1}'}": sum(p.numel() for p in dit.parameters())
            for index, dit in enumerate(self.dits)
        }
        return {
            "family": f"wan-{self.folder.kind}",
            "format": self.folder.format,
            "parameters": parts,
            "bytes": sum(path.stat().st_size for path in files),
        }

    def sha256(self) -> str:
        """See Family.sha256: of samples of the contents."""
        return fingerprint([*self.folder.files(), *(lora.path for lora in self.loras)], self.folder.root)

    @property
    def _encoder_dtype(self) -> torch.dtype:
        return torch.float32 if self.dtype == "fp32" else torch.bfloat16

    def _check_pictures(self, pictures: Pictures) -> None:
        kind, has_first = self.folder.kind, pictures.first is not None
        if kind in ("i2v", "flf2v") and not has_first:
            raise ValueError(f"input: {self.name} ({kind}) begins with a picture; give --image or --video")
        if kind == "flf2v" and pictures.last is None:
            raise ValueError(f"input: {self.name} ({kind}) also needs the last picture; give --last-image")
        if kind in ("t2v", "ti2v") and pictures.last is not None:
            raise ValueError(f"input: {self.name} ({kind}) takes no last picture; leave it out")
        if pictures.first is None or kind != "t2v":
            return
        if len(pictures.first) == 1:
            raise ValueError(f"input: {self.name} (t2v) takes no image; use an i2v or ti2v checkpoint")
        warnings.warn(
            "going on from a clip with a text-to-video model: it was not trained with frames of different "
            "noise, so the join may show; i2v and ti2v checkpoints were",
            stacklevel=4,
        )

    def _channels(self, first: Tensor, pictures: Pictures, num_latent_frames: int) -> Tensor:
        """Mask and latents of the known pixels [4 + C, F, Y, X], which image-to-video models take."""
        codec, num_known = self.codec(), first.shape[2]
        num_frames = codec.num_pixel_frames(num_latent_frames)
        if num_known > num_frames:
            first, num_known = first[:, :, :num_frames], num_frames
        if pictures.last is None:
            latents = codec.encode_first_frames(first, num_latent_frames)
        else:
            gray = first.new_zeros(1, 3, num_frames - num_known - 1, *first.shape[3:])
            latents = codec.encode(torch.cat([first, gray, as_pixels(pictures.last)], dim=2))
        known = torch.zeros(num_frames)
        known[:num_known] = 1
        if pictures.last is not None:
            known[-1] = 1
        # a latent frame has a channel for each of its pixel frames; the first latent is one frame, four times
        mask_F4 = torch.cat([known[:1].repeat(self.sizes.temporal_stride), known[1:]]).view(
            -1, self.sizes.temporal_stride
        )
        mask = mask_F4.T[:, :, None, None].expand(-1, -1, *latents.shape[3:])
        return torch.cat([mask.to(latents), latents[0]])

    def _image_features(self, pictures: Pictures) -> Tensor | None:
        if self.folder.image is None:
            return None
        assert pictures.first is not None
        images = [pictures.first[-1], *([] if pictures.last is None else [pictures.last[0]])]
        device = _device(self.offload.encoders)
        return encode_images(self.folder.image, images, device=device, dtype=self._encoder_dtype)


def _without_tail(channels_CFYX: Tensor) -> Tensor:
    """Without the frames at the end that repeat the one before; see Given.channels."""
    frames = channels_CFYX.shape[1]
    while frames > 1 and torch.equal(channels_CFYX[:, frames - 1], channels_CFYX[:, frames - 2]):
        frames -= 1
    return channels_CFYX[:, :frames].clone()


def _device(is_offloaded: bool) -> str:
    return "cuda" if torch.cuda.is_available() and not is_offloaded else "cpu"


def _square(tile: int | None) -> tuple[int, int] | None:
    return None if tile is None else (tile, tile)


def _load_decode(codec: Path, tile: int | None, warm_up: Tensor | None) -> Decoding:
    """A decoder in a process of its own, which has no GPU."""
    return Decoding(load_wan_codec(codec, tile=_square(tile)), warm_up)
