"""What a rank does together with those that hold the same layers in other lanes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from vidgen.denoise.lockstep import Inner
from vidgen.kernels.attention.layout import BlockLayout
from vidgen.model.layers import Attend
from vidgen.model.part import Part
from vidgen.parallel.lanes.exchange import Exchange

# B batch, F latent frames, S tokens per frame, D width, C channels, Y X rows and columns


class SequencePart(Part, Protocol):
    """Tokens of every frame; see sequence.py."""

    @property
    def bytes_sent(self) -> int: ...

    def cut(self, x_BFSD: Tensor) -> Tensor: ...

    def gather(self, x_BFSD: Tensor) -> Tensor: ...


class ClipPart(Protocol):
    """Frames of every window; see clip.py."""

    @property
    def bytes_sent(self) -> int: ...

    @property
    def frames(self) -> slice: ...

    def attend(self, query_BQHD: Tensor, key_BKHD: Tensor, value_BKHD: Tensor, inner: Inner) -> Tensor: ...

    def gather(self, x_BF: Tensor, dim: int) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class Lane:
    """A lane's parts of a forward. Without any it is the only lane, and everything here the identity."""

    sequence: SequencePart | None = None
    clips: ClipPart | None = None
    guidance: Exchange | None = None

    @property
    def num_branches(self) -> int:
        """Lanes that share branches of guidance."""
        return 1 if self.guidance is None else self.guidance.size

    @property
    def bytes_sent(self) -> int:
        """To other lanes."""
        parts = (self.sequence, self.clips, self.guidance)
        return sum(part.bytes_sent for part in parts if part is not None)

    def runs(self, num_runs: int) -> range:
        """Those of a forward's runs of the model that are this lane's."""
        return (
            range(num_runs)
            if self.guidance is None
            else range(self.guidance.index, num_runs, self.num_branches)
        )

    @property
    def part(self) -> Part | None:
        """What the model has to know of it."""
        return self.sequence if self.clips is None else ClippedPart(self.clips, self.sequence)

    def num_frames(self, num_frames: int) -> int:
        """How many of a window's frames are at hand."""
        return num_frames if self.clips is None else len(range(num_frames)[self.clips.frames])

    def cut_frames(self, x_BF: Tensor) -> Tensor:
        """The frames at hand."""
        return x_BF if self.clips is None else x_BF[:, self.clips.frames]

    def cut(self, x_BFSD: Tensor) -> Tensor:
        """The tokens at hand of a whole window's."""
        x_BFSD = self.cut_frames(x_BFSD)
        return x_BFSD if self.sequence is None else self.sequence.cut(x_BFSD)

    def whole_frames(self, x_BFSD: Tensor) -> Tensor:
        """Every token of the frames at hand: projections look at neighbours."""
        return x_BFSD if self.sequence is None else self.sequence.gather(x_BFSD)

    def all_frames(self, out: Tensor, batch: int) -> Tensor:
        """Projections [B*F, C, Y, X] of every frame, from those of the frames at hand."""
        if self.clips is None:
            return out
        return self.clips.gather(out.unflatten(0, (batch, -1)), 1).flatten(0, 1)

    def all_branches(self, velocities: Sequence[Tensor]) -> list[Tensor]:
        """Velocities of every branch in order, from this lane's own."""
        if self.guidance is None:
            return list(velocities)
        own = torch.stack(list(velocities))
        lanes = self.guidance.gather(own, [own.shape] * self.guidance.size)
        return [velocity for branch in zip(*lanes, strict=True) for velocity in branch]


@dataclass(frozen=True, slots=True)
class ClippedPart:
    """A run of frames, and perhaps only some of their tokens, as the model sees it."""

    clips: ClipPart
    sequence: SequencePart | None

    @property
    def frames(self) -> slice:
        return self.clips.frames

    @property
    def tokens(self) -> slice:
        return slice(None) if self.sequence is None else self.sequence.tokens

    def around(
        self, attend: Attend, key_frames: int, *, query_frames: int, layout: BlockLayout | None = None,
        is_plain: bool = True,
    ) -> Attend:  # fmt: skip
        """Clips attend to what they see; each of these attentions may be shared by tokens or heads."""

        def inner(query_frames: int, key_frames: int) -> Attend:
            if self.sequence is None:
                return attend
            return self.sequence.around(attend, key_frames, query_frames=query_frames)

        def clipped(query_BQHD: Tensor, key_BKHD: Tensor, value_BKHD: Tensor) -> Tensor:
            return self.clips.attend(query_BQHD, key_BKHD, value_BKHD, inner)

        return clipped


ALONE = Lane()
