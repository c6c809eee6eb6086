"""Keys and values that a block lends to its neighbours: kept normalised but not rotated.

Rotation is by the reader's own frame numbers, so the same tensors serve any position.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

# B batch, F frames, S tokens per frame, H heads, D head dimension


@dataclass(frozen=True, slots=True)
class KeyValue:
    """Self-attention keys (after QK-norm, before RoPE) and values of some frames in one layer."""

    key_BFSHD: Tensor
    value_BFSHD: Tensor

    @property
    def num_frames(self) -> int:
        return self.key_BFSHD.shape[1]

    def frames(self, start: int, stop: int) -> "KeyValue":
        """A copy of frames [start, stop), so that the rest can be freed."""
        return KeyValue(self.key_BFSHD[:, start:stop].clone(), self.value_BFSHD[:, start:stop].clone())

    def to(self, device: torch.device) -> "KeyValue":
        return KeyValue(self.key_BFSHD.to(device), self.value_BFSHD.to(device))


LayerKeyValues = tuple[KeyValue, ...]  # one per layer


def concatenate(*parts: LayerKeyValues) -> LayerKeyValues:
    """The frames of all parts one after another, layer by layer; empty parts are left out."""
    present = [part for part in parts if part]
    if len(present) <= 1:
        return present[0] if present else ()
    return tuple(
        KeyValue(
            torch.cat([kv.key_BFSHD for kv in layer], dim=1),
            torch.cat([kv.value_BFSHD for kv in layer], dim=1),
        )
        for layer in zip(*present, strict=True)
    )


@dataclass(frozen=True, slots=True)
class Context:
    """What a forward sees beside its own frames: keys and values of earlier and of later frames."""

    before: LayerKeyValues = ()
    after: LayerKeyValues = ()

    @property
    def frames_before(self) -> int:
        return self.before[0].num_frames if self.before else 0

    @property
    def frames_after(self) -> int:
        return self.after[0].num_frames if self.after else 0

    def layer(self, index: int) -> tuple[KeyValue | None, KeyValue | None]:
        return self.before[index] if self.before else None, self.after[index] if self.after else None
