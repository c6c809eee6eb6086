"""Tensors in files: what there is, from headers alone, and reading one straight into memory that is there.

Formats: safetensors (github.com/huggingface/safetensors), one file or shards with an index, and torch's
pickles, of which nothing but tensors is taken.
"""

import hashlib
import json
import math
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

STEM = "diffusion_pytorch_model"  # of all published transformers' files
PICKLED = (".pth", ".pt", ".bin", ".ckpt")
SAFETENSORS_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32,
    "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
SAMPLES, SAMPLE_BYTES = 64, 4096  # of a file, for its fingerprint
MAX_HEADER_BYTES = 100_000_000  # the format's own limit


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in a file. `fill` writes its values to a contiguous CPU tensor of its dtype and count."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    fill: Callable[[Tensor], None]

    @property
    def num_bytes(self) -> int:
        """Of its values."""
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> Tensor:
        """It, in memory of its own."""
        found = torch.empty(self.shape, dtype=self.dtype)
        self.fill(found)
        return found

    def read_into(self, target: Tensor) -> None:
        """Its values in their order, converted only where the target's dtype or device differ."""
        if target.dtype == self.dtype and target.device.type == "cpu" and target.is_contiguous():
            self.fill(target)
        else:
            target.copy_(self.read().view(target.shape))


def fingerprint(files: Iterable[Path], root: Path) -> str:
    """SHA-256 over names, sizes and samples of the contents: small files whole, tens of gigabytes not."""
    digest = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        name = path.relative_to(root) if path.is_relative_to(root) else path.name
        digest.update(f"{name} {size}\n".encode())
        with path.open("rb") as file:
            for sample in range(SAMPLES):
                file.seek(max(0, size - SAMPLE_BYTES) * sample // (SAMPLES - 1))
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()


def open_tensors(path: Path) -> dict[str, StoredTensor]:
    """All tensors by name, of a file or of a folder as it is published; no values are read.

    ValueError in one line when there is none, a shard is missing, or a file is damaged.
    """
    found: dict[str, StoredTensor] = {}
    for file in _files(path):
        found |= _pickled(file) if file.suffix in PICKLED else _safetensors(file)
    return found


def read_metadata(path: Path) -> dict[str, str]:
    """The texts in a safetensors file's header; none for other files."""
    return {} if path.suffix in PICKLED else _header(path)[0].get("__metadata__") or {}


def _files(path: Path) -> list[Path]:
    """The files that together are a checkpoint."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise ValueError(f"{path}: no such file or folder")
    index, single = path / f"{STEM}.safetensors.index.json", path / f"{STEM}.safetensors"
    if index.is_file():
        try:
            shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{index}: no index of shards ({error!r}); get the file again") from error
        missing = [name for name in shards if not (path / name).is_file()]
        if missing:
            raise ValueError(
                f"{path}: lacks {len(missing)} of {len(shards)} files that its index names: "
                f"{', '.join(missing[:3])}; get them again"
            )
        return [path / name for name in shards]
    if single.is_file():
        return [single]
    others = sorted(path.glob(f"{STEM}*.safetensors")) or [
        file for suffix in PICKLED for file in sorted(path.glob(f"{STEM}*{suffix}"))
    ]
    if not others:
        raise ValueError(f"{path}: no {STEM}.safetensors, shards with an index, or {STEM}.pth there")
    return others


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """(a safetensors file's header, where its values begin)."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(size, MAX_HEADER_BYTES):
                raise ValueError(f"a header of {length} bytes")
            header = json.loads(file.read(length))
        if not isinstance(header, dict):
            raise ValueError("its header is no mapping")
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, struct.error) as error:
        raise ValueError(f"{path}: not a safetensors file ({error}); get it again") from error
    return header, 8 + length


def _safetensors(path: Path) -> dict[str, StoredTensor]:
    header, base = _header(path)
    size, found = path.stat().st_size, {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        try:
            dtype, shape = SAFETENSORS_DTYPES[entry["dtype"]], tuple(map(int, entry["shape"]))
            start, stop = map(int, entry["data_offsets"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: cannot read the entry of {name} ({error!r})") from error
        if stop - start != math.prod(shape) * dtype.itemsize or start < 0:
            raise ValueError(f"{path}: {name} has {stop - start} bytes for a shape of {shape}; get it again")
        if base + stop > size:
            raise ValueError(f"{path}: ends at byte {size}, before the values of {name}; get it again")
        found[name] = StoredTensor(dtype, shape, _Span(path, base + start))
    return found


@dataclass(frozen=True, slots=True)
class _Span:
    """Fills a tensor with a file's bytes from a place on."""

    path: Path
    offset: int

    def __call__(self, target: Tensor) -> None:
        if not target.numel():
            return
        numbers: Any = target.detach().view(-1).view(torch.uint8).numpy()
        left = memoryview(numbers)
        with self.path.open("rb", buffering=0) as file:
            file.seek(self.offset)
            while left:  # one call reads at most 2 GB
                count = file.readinto(left)
                if not count:
                    raise ValueError(f"{self.path}: ended while it was read; get it again")
                left = left[count:]


def _pickled(path: Path) -> dict[str, StoredTensor]:
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else repr(error)
        raise ValueError(f"{path}: cannot be loaded as tensors only ({reason})") from error
    if isinstance(loaded, dict) and isinstance(loaded.get("state_dict"), dict):
        loaded = loaded["state_dict"]
    if not isinstance(loaded, dict) or not all(isinstance(tensor, Tensor) for tensor in loaded.values()):
        raise ValueError(f"{path}: need a mapping of names to tensors")
    return {
        name: StoredTensor(tensor.dtype, tuple(tensor.shape), _Copy(tensor))
        for name, tensor in loaded.items()
    }


@dataclass(frozen=True, slots=True)
class _Copy:
    """Fills a tensor from one that lies in a mapped file."""

    tensor: Tensor

    def __call__(self, target: Tensor) -> None:
        target.copy_(self.tensor.reshape(target.shape))
