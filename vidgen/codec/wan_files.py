"""The Wan VAE's files: diffusers' folder (config.json and safetensors) or the original one file."""

import json
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vidgen.codec.protocol import CodecSizes

WEIGHTS = "diffusion_pytorch_model.safetensors"
_SHARED = {
    "dim_mult": [1, 2, 4, 4],
    "num_res_blocks": 2,
    "attn_scales": [],
    "temperal_downsample": [False, True, True],
}
# What the original files do not say, by latent channels. github.com/Wan-Video/Wan2.2, wan/modules/vae2_*.py
ORIGINALS: dict[int, dict[str, Any]] = {
    16: {
        **_SHARED,
        "z_dim": 16,
        "latents_mean": [
            -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
            0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
        ],
        "latents_std": [
            2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
            3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
        ],
    },
    48: {
        **_SHARED,
        "z_dim": 48,
        "is_residual": True,
        "in_channels": 12,
        "out_channels": 12,
        "patch_size": 2,
        "scale_factor_spatial": 16,
        "latents_mean": [
            -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557,
            -0.1382, 0.0542, 0.2813, 0.0891, 0.1570, -0.0098, 0.0375, -0.1825,
            -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502,
            -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230,
            -0.0313, -0.1649, 0.0117, 0.0723, -0.2839, -0.2083, -0.0520, 0.3748,
            0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667,
        ],
        "latents_std": [
            0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013,
            0.8158, 1.0344, 0.5894, 1.0901, 0.6885, 0.6165, 0.8454, 0.4978,
            0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
            0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093,
            0.5709, 0.6065, 0.6415, 0.4944, 0.5726, 1.2042, 0.5458, 1.6887,
            0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744,
        ],
    },
}  # fmt: skip
# original name -> diffusers' name; of levels see _level
_RENAMED = (
    (r"^conv1\.", "quant_conv."),
    (r"^conv2\.", "post_quant_conv."),
    (r"^(..coder)\.conv1\.", r"\1.conv_in."),
    (r"\.middle\.0\.", ".mid_block.resnets.0."),
    (r"\.middle\.1\.", ".mid_block.attentions.0."),
    (r"\.middle\.2\.", ".mid_block.resnets.1."),
    (r"\.head\.0\.", ".norm_out."),
    (r"\.head\.2\.", ".conv_out."),
    (r"\.residual\.0\.", ".norm1."),
    (r"\.residual\.2\.", ".conv1."),
    (r"\.residual\.3\.", ".norm2."),
    (r"\.residual\.6\.", ".conv2."),
    (r"\.shortcut\.", ".conv_shortcut."),
)


def read_config(path: Path) -> dict[str, Any]:
    """The VAE's settings by diffusers' names, without reading weights. ValueError for something else."""
    if not path.exists():
        raise ValueError(
            f"VAE {path}: no such file or folder; give a diffusers folder, Wan2.1_VAE.pth or Wan2.2_VAE.pth"
        )
    if path.is_file():
        return _config_of_shapes(path, _shapes(path))
    file = _folder(path) / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: damaged ({error}); copy it anew") from None
    name = config.get("_class_name", "AutoencoderKLWan")
    if name != "AutoencoderKLWan":
        raise ValueError(f"{file}: a {name}; need an AutoencoderKLWan")
    return {key: value for key, value in config.items() if not key.startswith("_")}


def sizes_of(config: Any) -> CodecSizes:
    """Strides and channels that follow from the settings."""
    levels = len(config.get("dim_mult", _SHARED["dim_mult"])) - 1
    return CodecSizes(
        temporal_stride=2 ** sum(config.get("temperal_downsample", _SHARED["temperal_downsample"])),
        spatial_stride=2**levels * (config.get("patch_size") or 1),
        num_channels=config.get("z_dim", 16),
        first_frames=1,
    )


def empty_vae(config: dict[str, Any]) -> Any:
    """An AutoencoderKLWan without storage."""
    from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan

    with torch.device("meta"):
        return AutoencoderKLWan.from_config(config)


def load_vae(path: Path, *, dtype: torch.dtype, device: str | torch.device) -> Any:
    """The AutoencoderKLWan of a folder or file. ValueError in one line for all tensors that do not fit."""
    config = read_config(path)
    vae = empty_vae(config)
    if path.is_file():
        tensors = {diffusers_name(name, config): tensor for name, tensor in _read(path).items()}
    else:
        tensors = _read_folder(_folder(path))
    _check(path, tensors, vae.state_dict())
    # copied: files are mapped into memory, and may go while the codec stays
    state = {name: tensor.to(device, dtype, copy=True) for name, tensor in tensors.items()}
    vae.load_state_dict(state, assign=True)
    return vae


def diffusers_name(original: str, config: dict[str, Any]) -> str:
    """diffusers' name of a tensor in Wan2.1_VAE.pth or Wan2.2_VAE.pth."""
    name = _level(original, config["num_res_blocks"])
    for pattern, replacement in _RENAMED:
        name = re.sub(pattern, replacement, name)
    return name


def _level(name: str, num_res_blocks: int) -> str:
    """The name with its level as diffusers counts it. 2.1 counts parts through all levels, 2.2 in each."""
    if nested := re.match(r"(..coder)\.(up|down)samples\.(\d+)\.\2samples\.(\d+)\.(.*)", name):
        side, way, level, part, rest = nested.groups()
        num_resnets = num_res_blocks + (way == "up")
        inner = f"resnets.{part}" if int(part) < num_resnets else f"{way}sampler"
        return f"{side}.{way}_blocks.{level}.{inner}.{rest}"
    if flat := re.match(r"decoder\.upsamples\.(\d+)\.(.*)", name):
        level, part = divmod(int(flat[1]), num_res_blocks + 2)
        inner = f"resnets.{part}" if part <= num_res_blocks else "upsamplers.0"
        return f"decoder.up_blocks.{level}.{inner}.{flat[2]}"
    return name.replace("encoder.downsamples.", "encoder.down_blocks.")


def _folder(path: Path) -> Path:
    for folder in (path, path / "vae"):
        if (folder / "config.json").is_file():
            return folder
    raise ValueError(f"{path}: no config.json here nor in vae/; give a diffusers folder or the VAE's file")


def _read_folder(folder: Path) -> dict[str, Tensor]:
    index = folder / f"{WEIGHTS}.index.json"
    names = [WEIGHTS]
    if index.is_file():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    return {name: tensor for file in names for name, tensor in _read(folder / file).items()}


def _read(file: Path, device: str = "cpu") -> dict[str, Tensor]:
    """A file's tensors, mapped where the format allows; on `meta` only shapes. Runs no code of the file."""
    if not file.is_file():
        raise ValueError(f"{file}: no such file; the checkpoint is incomplete")
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(file)
        mapped = zipfile.is_zipfile(file)
        return torch.load(file, map_location=device, weights_only=True, mmap=mapped)
    except Exception as error:  # safetensors and pickle have no common error
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"{file}: cannot be read ({reason}); copy it anew, or save it as safetensors"
        ) from error


def _shapes(file: Path) -> dict[str, tuple[int, ...]]:
    if file.suffix == ".safetensors":
        return _shapes_of_header(file)
    return {
        name: tuple(tensor.shape)
        for name, tensor in _read(file, "meta").items()
        if isinstance(tensor, Tensor)
    }


def _shapes_of_header(file: Path) -> dict[str, tuple[int, ...]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            return {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{file}: cannot be read ({error}); copy it anew") from error


def _config_of_shapes(file: Path, shapes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    """The known settings with as many latent channels; the widths are the file's."""
    channels = shapes.get("conv2.weight", (0,))[0]
    if channels not in ORIGINALS or {"encoder.conv1.bias", "decoder.head.0.gamma"} - set(shapes):
        raise ValueError(
            f"{file}: not an original Wan VAE; need Wan2.1_VAE.pth, Wan2.2_VAE.pth or diffusers' folder"
        )
    widths = {
        "base_dim": shapes["encoder.conv1.bias"][0],
        "decoder_base_dim": shapes["decoder.head.0.gamma"][0],
    }
    return {**ORIGINALS[channels], **widths}


def _check(path: Path, tensors: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    faults = {
        "missing": sorted(expected.keys() - tensors.keys()),
        "unexpected": sorted(tensors.keys() - expected.keys()),
        "misshaped": [
            f"{name} {list(tensors[name].shape)}, need {list(tensor.shape)}"
            for name, tensor in sorted(expected.items())
            if name in tensors and tensors[name].shape != tensor.shape
        ],
    }
    if any(faults.values()):
        told = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in faults.items() if names)
        raise ValueError(f"VAE {path}: tensors do not fit its settings; {told}")
