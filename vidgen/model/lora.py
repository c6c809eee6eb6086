"""LoRA files as changes of a Wan transformer's weights, to be added as these are read.

Names understood: diffusers' and peft's (`transformer.blocks.0.attn1.to_q.lora_A.weight`), Wan's own
(`diffusion_model.blocks.0.self_attn.q.lora_down.weight`, `.alpha`, `.diff`, `.diff_b`, `.diff_m`) and kohya's
(`lora_unet_blocks_0_self_attn_q.lora_down.weight`). Merged, they are what diffusers' set_adapters gives.
"""

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from vidgen.model.tensor_files import StoredTensor, open_tensors, read_metadata
from vidgen.model.wan_names import PREFIXES, Name

Expert = Literal["first", "second"]

# endings of a LoRA's tensors -> what they are
ROLES = {
    "lora_A.weight": "down", "lora_B.weight": "up", "lora_A.default.weight": "down",
    "lora_B.default.weight": "up", "lora_down.weight": "down", "lora_up.weight": "up",
    "lora.down.weight": "down", "lora.up.weight": "up", "lora_B.bias": "up_bias",
    "lora_B.default.bias": "up_bias", "alpha": "alpha", "diff": "diff", "diff_b": "diff_bias",
    "diff_m": "diff_table",
}  # fmt: skip
ENDING = re.compile(rf"^(.+)\.({'|'.join(map(re.escape, ROLES))})$")
SECOND, FIRST = "transformer_2.", "transformer."  # diffusers' prefixes for the experts
OTHER_PREFIXES = (*PREFIXES, "base_model.model.", "lora_unet__", "lora_unet_")
METADATA = "lora_adapter_metadata"  # diffusers keeps peft's settings under this
SHOWN = 4


@dataclass(frozen=True, slots=True)
class Lora:
    """A file to merge, how strongly, and into which of a model's experts."""

    path: Path
    scale: float = 1.0
    expert: Expert | Literal["both"] = "both"


@dataclass(frozen=True, slots=True)
class Change:
    """What one LoRA adds to one tensor: scale * (up @ down), or scale * diff where there is no down."""

    scale: float
    up: StoredTensor
    down: StoredTensor | None = None

    @property
    def count(self) -> int:
        """How many values it changes; -1 when its parts do not fit together."""
        if self.down is None:
            return math.prod(self.up.shape)
        if len(self.up.shape) < 2 or len(self.down.shape) < 2:
            return -1
        (rows, *ranks), (rank, *columns) = self.up.shape, self.down.shape
        return rows * math.prod(columns) if math.prod(ranks) == rank else -1

    @property
    def num_bytes(self) -> int:
        """Of what is read for it."""
        return self.up.num_bytes + (0 if self.down is None else self.down.num_bytes)

    def add_to(self, weight: Tensor) -> None:
        """Change an fp32 tensor, in the shape of Wan's files, in place."""
        up = self.up.read().float()
        if self.down is None:
            weight.add_(up.view(weight.shape), alpha=self.scale)
            return
        flat = weight.view(up.shape[0], -1)
        flat.addmm_(up.flatten(1), self.down.read().float().flatten(1), alpha=self.scale)


def changes_of(
    loras: Iterable[Lora], rows: Iterable[Name], expert: Expert, num_experts: int
) -> dict[str, list[Change]]:
    """By our names, what the LoRAs change in an expert of a model with these tensors.

    ValueError in one line for a LoRA with targets that the model lacks, or parts that are missing or unknown.
    """
    targets = _targets(rows)
    found: dict[str, list[Change]] = {}
    for lora in loras:
        if lora.expert in ("both", expert):
            for name, change in _changes(lora, targets, expert, num_experts):
                found.setdefault(name, []).append(change)
    return found


def _targets(rows: Iterable[Name]) -> dict[str, dict[str, str]]:
    """Every name that a file may give a module -> its tensors: `weight`, `bias` or `table` -> our name."""
    targets: dict[str, dict[str, str]] = {}
    for row in rows:
        for name in (row.diffusers, row.native):
            module, _, kind = name.rpartition(".")
            if kind in ("weight", "bias"):
                spellings = {module, module.replace(".", "_")}
            else:
                # a modulation table: LoRAs have `blocks.0.diff_m`, or `blocks.0.modulation.diff`
                spellings, kind = {module, name}, "table"
            for spelling in spellings:
                targets.setdefault(spelling, {})[kind] = row.ours
    return targets


def _changes(
    lora: Lora, targets: dict[str, dict[str, str]], expert: Expert, num_experts: int
) -> list[tuple[str, Change]]:
    """(our name, change) for each tensor that one file changes."""
    tensors = _of_expert(open_tensors(lora.path), lora, expert, num_experts)
    modules: dict[str, dict[str, StoredTensor]] = {}
    unknown = []
    for name, tensor in tensors.items():
        match = ENDING.match(name)
        if match:
            modules.setdefault(match[1], {})[ROLES[match[2]]] = tensor
        else:
            unknown.append(name)
    if unknown:
        raise ValueError(
            f"lora {lora.path}: {_some(unknown)} are of no kind that can be merged; use a plain LoRA"
        )
    settings = _Settings.of(lora.path, FIRST if expert == "first" else SECOND)
    found, lacking, broken = [], [], []
    for module, parts in modules.items():
        kinds = targets.get(_without_prefix(module))
        if kinds is None:
            lacking.append(module)
            continue
        changes = _of_module(lora.scale, parts, settings.factor(module, parts), kinds)
        (broken.append(module) if changes is None else found.extend(changes))
    if lacking:
        raise ValueError(
            f"lora {lora.path}: the model lacks {len(lacking)} of its {len(modules)} targets: "
            f"{_some(lacking)}; use a LoRA made for this model"
        )
    if broken:
        raise ValueError(f"lora {lora.path}: {_some(broken)} lack one of their parts; get the file again")
    return found


def _of_module(
    scale: float, parts: dict[str, StoredTensor], factor: float, kinds: dict[str, str]
) -> list[tuple[str, Change]] | None:
    """(our name, change) for a module's tensors; None when a part is missing or has nothing to change."""
    if ("up" in parts) != ("down" in parts):
        return None
    found: list[tuple[str | None, Change]] = []
    if "up" in parts:
        found.append((kinds.get("weight"), Change(scale * factor, parts["up"], parts["down"])))
    if "up_bias" in parts:
        found.append((kinds.get("bias"), Change(scale * factor, parts["up_bias"])))
    if "diff" in parts:
        found.append((kinds.get("weight", kinds.get("table")), Change(scale, parts["diff"])))
    if "diff_bias" in parts:
        found.append((kinds.get("bias"), Change(scale, parts["diff_bias"])))
    if "diff_table" in parts:
        found.append((kinds.get("table"), Change(scale, parts["diff_table"])))
    named = [(name, change) for name, change in found if name is not None]
    return named if named and len(named) == len(found) else None


def _of_expert(
    tensors: dict[str, StoredTensor], lora: Lora, expert: Expert, num_experts: int
) -> dict[str, StoredTensor]:
    """Those of a file that are for this expert, without prefixes that say so.

    A file with parts for both experts gives each its own; another changes every expert that it is given to.
    """
    seconds = {name: tensor for name, tensor in tensors.items() if name.startswith(SECOND)}
    if seconds and num_experts == 1:
        raise ValueError(
            f"lora {lora.path}: {_some(seconds)} are for a second expert, which the model lacks; use a LoRA "
            "made for this model"
        )
    if seconds:
        own = expert == "second"
        tensors = {name: tensor for name, tensor in tensors.items() if name.startswith(SECOND) == own}
    return {name.removeprefix(SECOND).removeprefix(FIRST): tensor for name, tensor in tensors.items()}


def _without_prefix(module: str) -> str:
    for prefix in OTHER_PREFIXES:
        module = module.removeprefix(prefix)
    return module


@dataclass(frozen=True, slots=True)
class _Settings:
    """What peft was told, where the file says: by which factor a module's up @ down counts."""

    path: Path
    values: dict[str, Any]

    @classmethod
    def of(cls, path: Path, prefix: str) -> "_Settings":
        """From the file's header. ValueError when it cannot be understood, or asks for DoRA."""
        try:
            values = json.loads(read_metadata(path).get(METADATA) or "{}")
            own = {key.removeprefix(prefix): value for key, value in values.items() if key.startswith(prefix)}
            if not own and prefix == SECOND:
                return cls.of(path, FIRST)
        except (ValueError, AttributeError) as error:
            raise ValueError(f"lora {path}: its {METADATA} is no mapping in JSON; get it again") from error
        if own.get("use_dora"):
            raise ValueError(f"lora {path}: DoRA cannot be merged; use a plain LoRA")
        return cls(path, own)

    def factor(self, module: str, parts: dict[str, StoredTensor]) -> float:
        """alpha / rank; 1 where no alpha is known."""
        if "down" not in parts:
            return 1.0
        rank = parts["down"].shape[0]
        if "alpha" in parts:
            return float(parts["alpha"].read().float()) / rank
        alpha = self.values.get("lora_alpha")
        for pattern, value in (self.values.get("alpha_pattern") or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                alpha = value
                break
        if alpha is None:
            return 1.0
        return alpha / (math.sqrt(rank) if self.values.get("use_rslora") else rank)


def _some(names: Iterable[str]) -> str:
    """The first few of some names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


@torch.no_grad()
def merge(weight: Tensor, changes: Iterable[Change]) -> int:
    """Add changes to an fp32 tensor, in the shape of Wan's files, in place; bytes read."""
    num_bytes = 0
    for change in changes:
        change.add_to(weight)
        num_bytes += change.num_bytes
    return num_bytes
