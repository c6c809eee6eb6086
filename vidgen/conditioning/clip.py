"""Image features for image-to-video: the last but one hidden states of Wan's CLIP ViT-H/14.

Both formats are prepared as diffusers' WanImageToVideoPipeline.encode_image does: the shorter edge to the
model's size, the centre cut out. (Wan's own code squeezes the whole frame into the square instead.)
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vidgen.conditioning.pretrained import (
    Native,
    count_layers,
    load_native,
    load_pretrained,
    quietly,
    release_memory,
)

if TYPE_CHECKING:
    from PIL.Image import Image

# M image tokens of all images (257 each), I their width

NATIVE_FILES = (
    "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth",
    "models_clip_open-clip-xlm-roberta-large-vit-huge-14.safetensors",
)
NATIVE_IGNORED = ("textual.", "log_scale", "visual.head")  # the text half, and what follows the features


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipSource:
    """Where an image encoder and its image processor are; see clip_source."""

    weights: Path  # a folder that transformers wrote, or a file with Wan's own names
    processor: Path | None  # None: CLIP's own means and deviations, at the size of the weights
    num_heads: int = 16  # of Wan's own file: no shape tells it; ViT-H/14 has 16


def _weight_and_bias(rows: Mapping[str, tuple[str, ...]]) -> tuple[Native, ...]:
    return tuple(
        Native(native=f"visual.{native}.{part}", theirs=tuple(f"{name}.{part}" for name in theirs))
        for native, theirs in rows.items()
        for part in ("weight", "bias")
    )


_LAYER = "encoder.layers.{}."
NATIVE_NAMES = (
    Native(native="visual.cls_embedding", theirs=("embeddings.class_embedding",), ones=2),
    Native(native="visual.pos_embedding", theirs=("embeddings.position_embedding.weight",), ones=1),
    Native(native="visual.patch_embedding.weight", theirs=("embeddings.patch_embedding.weight",)),
    *_weight_and_bias(
        {
            "pre_norm": ("pre_layrnorm",),
            "transformer.{}.norm1": (_LAYER + "layer_norm1",),
            "transformer.{}.attn.to_qkv": tuple(f"{_LAYER}self_attn.{part}_proj" for part in "qkv"),
            "transformer.{}.attn.proj": (_LAYER + "self_attn.out_proj",),
            "transformer.{}.norm2": (_LAYER + "layer_norm2",),
            "transformer.{}.mlp.0": (_LAYER + "mlp.fc1",),
            "transformer.{}.mlp.2": (_LAYER + "mlp.fc2",),
            "post_norm": ("post_layernorm",),
        }
    ),
)


def clip_source(folder: Path) -> ClipSource:
    """A checkpoint's image encoder, in diffusers' layout or Wan's own. ValueError where there is neither."""
    if (folder / "image_encoder").is_dir():
        return ClipSource(weights=folder / "image_encoder", processor=folder / "image_processor")
    for name in NATIVE_FILES:
        if (folder / name).exists():
            return ClipSource(weights=folder / name, processor=None)
    raise ValueError(
        f"{folder}: no image encoder; need image_encoder/ and image_processor/, or {NATIVE_FILES[0]}"
    )


@torch.no_grad()
def encode_images(
    source: ClipSource,
    images: "Sequence[Image | NDArray[np.uint8]]",
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """[1, M, I] on the CPU: the features of one image, or of a first and a last one after another.

    Arrays are uint8 RGB [H, W, 3]. The encoder is loaded, run in `dtype` on `device`, and released.
    """
    from PIL.Image import Image, fromarray

    if not images:
        raise ValueError("no image: give the first frame, or the first and the last")
    pictures = [image if isinstance(image, Image) else fromarray(np.asarray(image)) for image in images]
    encoder = load_image_encoder(source, dtype).to(device)
    pixels_BCHW = _processor(source, encoder.config.image_size)(images=pictures, return_tensors="pt")
    states = encoder(pixels_BCHW["pixel_values"].to(device), output_hidden_states=True).hidden_states
    features_BMI = states[-2].to("cpu", dtype, copy=True)
    del encoder, states
    release_memory()
    return features_BMI.reshape(1, -1, features_BMI.shape[-1])


def load_image_encoder(source: ClipSource, dtype: torch.dtype) -> Any:
    """A CLIPVisionModel. ValueError that names every tensor missing, unexpected or misshaped."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    def config(tensors: Mapping[str, Tensor]) -> CLIPVisionConfig:
        patch = tensors["visual.patch_embedding.weight"].shape[-1]
        num_patches = tensors["visual.pos_embedding"].shape[-2] - 1
        return CLIPVisionConfig(
            hidden_size=tensors["visual.cls_embedding"].shape[-1],
            intermediate_size=tensors["visual.transformer.0.mlp.0.weight"].shape[0],
            num_hidden_layers=count_layers(tensors, "visual.transformer."),
            num_attention_heads=source.num_heads,
            image_size=patch * math.isqrt(num_patches), patch_size=patch, hidden_act="gelu",
        )  # fmt: skip

    if source.weights.is_dir():
        return load_pretrained(CLIPVisionModel, source.weights, dtype, {})
    return load_native(CLIPVisionModel, source.weights, dtype, NATIVE_NAMES, config, NATIVE_IGNORED)


def _processor(source: ClipSource, image_size: int) -> Any:
    """Pictures to normalised pixels, through PIL: the same with and without torchvision."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    if source.processor is None:
        crop = {"height": image_size, "width": image_size}
        return CLIPImageProcessorPil(size={"shortest_edge": image_size}, crop_size=crop)
    with quietly():
        return CLIPImageProcessorPil.from_pretrained(source.processor, local_files_only=True)
