"""Modules to and from one safetensors file; the settings that rebuild them travel in its header."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

SETTINGS_KEY = "vidgen"


@dataclass(frozen=True, slots=True)
class PartWeights:
    """A part of a file that `save_parts` wrote, as a model's weights; see weights.Weights."""

    path: Path
    part: str

    def read(self, into: dict[str, Tensor]) -> int:
        """Fill tensors by their names in the part; bytes read. ValueError as by `read_tensors`."""
        return read_tensors(self.path, {f"{self.part}.{name}": tensor for name, tensor in into.items()})

    def check(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """ValueError in one line unless the part has exactly these tensors."""
        with safe_open(self.path, "pt") as file:
            prefix = f"{self.part}."
            found = {
                key.removeprefix(prefix): tuple(file.get_slice(key).get_shape())
                for key in file.keys()  # noqa: SIM118
                if key.startswith(prefix)
            }
        wrong = sorted(name for name in found.keys() | shapes if found.get(name) != shapes.get(name))
        if wrong:
            raise ValueError(f"{self.path}: does not fit its settings: {', '.join(wrong[:5])}")


def save_parts(path: Path, parts: dict[str, nn.Module], settings: dict[str, Any], dtype: torch.dtype) -> None:
    """Write the parts' tensors as `part.name`; floats of many values in `dtype`, small ones as they are."""
    tensors = {
        f"{part}.{name}": (
            tensor.to(dtype) if tensor.is_floating_point() and tensor.ndim > 1 else tensor
        ).contiguous()
        for part, module in parts.items()
        for name, tensor in module.state_dict().items()
    }
    save_file(tensors, path, metadata={SETTINGS_KEY: json.dumps(settings)})
    path.chmod(0o644)  # safetensors makes it private


def read_settings(path: Path) -> dict[str, Any]:
    """The settings in a file written by `save_parts`. ValueError when it is no such file."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
    except Exception as error:
        raise ValueError(f"{path}: not a safetensors file ({error}); give a vidgen checkpoint") from error
    if SETTINGS_KEY not in metadata:
        raise ValueError(f"{path}: a safetensors file without vidgen settings; give a vidgen checkpoint")
    try:
        settings = json.loads(metadata[SETTINGS_KEY])
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: its vidgen settings are no JSON; give another checkpoint") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path}: its vidgen settings are no mapping; give another checkpoint")
    return settings


def load_part(path: Path, part: str, module: nn.Module) -> None:
    """Fill a module from its part of the file, in the module's own dtype. ValueError when they do not fit."""
    with safe_open(path, "pt") as file:
        prefix = f"{part}."
        tensors: dict[str, Tensor] = {
            key.removeprefix(prefix): file.get_tensor(key)
            for key in file.keys()
            if key.startswith(prefix)  # noqa: SIM118
        }
    try:
        module.load_state_dict(tensors)
    except RuntimeError as error:
        raise ValueError(f"{path}: part {part!r} does not fit its settings: {error}") from error


@torch.no_grad()
def read_tensors(path: Path, into: dict[str, Tensor]) -> int:
    """Fill tensors, each in its own dtype, from the keys of a file and read nothing else; bytes read.

    ValueError in one line that names the keys that are missing or of another shape.
    """
    wrong: list[str] = []
    num_bytes = 0
    with safe_open(path, "pt") as file:
        known = set(file.keys())
        for key, target in into.items():
            if key not in known:
                wrong.append(f"{key} is missing")
                continue
            source = file.get_tensor(key)
            if source.shape != target.shape:
                wrong.append(f"{key} is {tuple(source.shape)}, need {tuple(target.shape)}")
                continue
            target.copy_(source)
            num_bytes += source.numel() * source.element_size()
    if wrong:
        raise ValueError(f"{path}: does not fit its settings: {'; '.join(wrong[:5])}")
    return num_bytes
