"""What a rank reads a DiT's tensors from, and no more of it than it is asked for."""

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from vidgen.model.dit import DiTConfig
from vidgen.model.dtypes import FP8, FP8_SCALE, quantise_into
from vidgen.model.lora import Change, Expert, Lora, changes_of, merge
from vidgen.model.tensor_files import StoredTensor, open_tensors
from vidgen.model.wan_names import (
    FP8_SCALES,
    PREFIXES,
    Format,
    Name,
    Shape,
    file_shape,
    from_file,
    is_ignored,
    keeps_order,
    names,
)

SHOWN = 4  # names in an error
SECOND_EXPERTS = ("transformer_2", "low_noise_model")  # folders, of diffusers and of Wan


class Weights(Protocol):
    """A DiT's tensors, somewhere; plain data."""

    def read(self, into: dict[str, Tensor]) -> int:
        """Fill tensors in place, by the names of a whole DiT, converting to their dtypes; bytes read.

        ValueError in one line that names what is missing or of another shape.
        """
        ...

    def check(self, shapes: dict[str, Shape]) -> None:
        """ValueError in one line unless there are exactly a whole DiT's tensors, of these shapes."""
        ...


@dataclass(frozen=True, slots=True)
class WanWeights:
    """A transformer of Wan in a folder, or a file, of diffusers' or Wan's own names; LoRAs are merged in.

    A folder's name tells which expert it is, of a model with two.
    """

    path: Path
    format: Format
    config: DiTConfig
    loras: tuple[Lora, ...] = ()

    @torch.no_grad()
    def read(self, into: dict[str, Tensor]) -> int:
        """See Weights.read. Where dtypes agree, values go from the files straight into the tensors."""
        stored, rows = self._stored(), self._rows()
        targets = {name: tensor for name, tensor in into.items() if not _is_scale(name, into)}
        shapes = {name: tuple(tensor.shape) for name, tensor in targets.items()}
        self._raise(self._faults(shapes, stored, rows))
        changes = self._changes(rows, stored, targets)
        return sum(
            self._fill(target, into.get(_scale_of(name)), rows[name], stored, changes.get(name, []))
            for name, target in targets.items()
        )

    def check(self, shapes: dict[str, Shape]) -> None:
        """See Weights.check; also ValueError for LoRAs that do not fit."""
        stored, rows = self._stored(), self._rows()
        wanted = {name: shape for name, shape in shapes.items() if not _is_scale(name, shapes)}
        known = {rows[name].of(self.format) for name in wanted if name in rows}
        known |= {scale for name in known for scale in _scale_names(name)}
        unexpected = [name for name in stored if name not in known and not is_ignored(name)]
        faults = self._faults(wanted, stored, rows)
        if unexpected:
            faults.append(f"{len(unexpected)} unexpected ({_some(unexpected)})")
        self._raise(faults)
        self._changes(rows, stored, rows)

    def _fill(
        self,
        target: Tensor,
        scale: Tensor | None,
        row: Name,
        stored: dict[str, StoredTensor],
        changes: list[Change],
    ) -> int:
        """Bring one tensor into memory; bytes read."""
        name = row.of(self.format)
        source = stored[name]
        factor = next((stored[key] for key in _scale_names(name) if key in stored), None)
        if keeps_order(row.form) and factor is None and not changes and target.dtype != FP8:
            source.read_into(target)
            return source.num_bytes
        num_bytes, weight = source.num_bytes, source.read()
        if factor is not None or changes:
            weight = weight.float()
        if factor is not None:
            per_row = factor.read().float().flatten()
            weight.mul_(per_row.view(-1, *[1] * (weight.ndim - 1)) if per_row.numel() > 1 else per_row)
            num_bytes += factor.num_bytes
        num_bytes += merge(weight, changes)
        ours = from_file(row.form, weight, tuple(target.shape), self.config.patch)
        if target.dtype == FP8:
            assert scale is not None, f"{row.ours} in FP8 goes with a scale"
            quantise_into(ours, target, scale)
        else:
            target.copy_(ours)
        return num_bytes

    def _stored(self) -> dict[str, StoredTensor]:
        """What is in the files, without prefixes that other programs put before all names."""
        found = open_tensors(self.path)
        for prefix in PREFIXES:
            found = {name.removeprefix(prefix): tensor for name, tensor in found.items()}
        return found

    def _rows(self) -> dict[str, Name]:
        return {row.ours: row for row in names(self.config)}

    def _faults(
        self, shapes: dict[str, Shape], stored: dict[str, StoredTensor], rows: dict[str, Name]
    ) -> list[str]:
        """What is wrong, a phrase each: tensors that are missing, and those of another shape."""
        missing, misshaped = [], []
        for name, shape in shapes.items():
            row = rows.get(name)
            theirs = row.of(self.format) if row else name
            if row is None or theirs not in stored:
                missing.append(theirs)
                continue
            wanted = file_shape(row.form, shape, self.config.patch)
            if stored[theirs].shape != wanted:
                misshaped.append(f"{theirs} is {stored[theirs].shape}, need {wanted}")
        faults = [f"{len(missing)} missing ({_some(missing)})"] if missing else []
        return faults + ([f"{len(misshaped)} of another shape ({_some(misshaped)})"] if misshaped else [])

    def _raise(self, faults: list[str]) -> None:
        if faults:
            raise ValueError(
                f"{self.path}: its tensors do not fit its config, by {self.format} names: "
                f"{'; '.join(faults)}; get the files again, or those of one model"
            )

    def _changes(
        self, rows: dict[str, Name], stored: dict[str, StoredTensor], wanted: Iterable[str]
    ) -> dict[str, list[Change]]:
        """What the LoRAs change in tensors that are wanted."""
        if not self.loras:
            return {}
        found = changes_of(self.loras, rows.values(), self._expert, self._num_experts)
        found = {name: found[name] for name in wanted if name in found}
        shapes = {name: stored[rows[name].of(self.format)].shape for name in found}
        misshaped = [
            f"{name} {shapes[name]}"
            for name, changes in found.items()
            if any(change.count != prod(shapes[name]) for change in changes)
        ]
        if misshaped:
            paths = ", ".join(str(lora.path) for lora in self.loras)
            raise ValueError(
                f"lora {paths}: made for other sizes than {len(misshaped)} tensors of the model "
                f"({_some(misshaped)}); use a LoRA made for this model"
            )
        return found

    @property
    def _expert(self) -> Expert:
        return "second" if self.path.name in SECOND_EXPERTS else "first"

    @property
    def _num_experts(self) -> int:
        folders = (self.path.with_name(name) for name in SECOND_EXPERTS)
        return 2 if self._expert == "second" or any(folder.is_dir() for folder in folders) else 1


def _scale_of(name: str) -> str:
    return name.removesuffix(".weight") + FP8_SCALE


def _is_scale(name: str, among: Iterable[str]) -> bool:
    """Whether a tensor of ours is what goes with an FP8 weight, and so is in no file."""
    return name.endswith(FP8_SCALE) and name.removesuffix(FP8_SCALE) + ".weight" in among


def _scale_names(name: str) -> list[str]:
    """What files may call the scale of their FP8 tensor of that name."""
    return (
        [f"{name.removesuffix('weight')}{scale}" for scale in FP8_SCALES] if name.endswith(".weight") else []
    )


def _some(items: list[str]) -> str:
    return ", ".join(items[:SHOWN]) + (", ..." if len(items) > SHOWN else "")
