"""Tokens regrouped from parts of each frame to runs of whole blocks of a layout, and back."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from vidgen.kernels.attention.cut import tokens_of
from vidgen.parallel.lanes.exchange import Exchange
from vidgen.parallel.topology import parts

# B batch, F frames, S tokens of a frame, H heads, D head dimension, L tokens of a run


@dataclass(frozen=True)
class Runs:
    """What goes where, for one member: each gets a run of consecutive blocks, perhaps none.

    What is at hand of each frame lies in the order of the whole, so that what goes into one run is one slice.
    """

    num_frames: int
    blocks: tuple[range, ...]  # that each member gets
    lengths: tuple[int, ...]  # tokens of these
    sends: tuple[slice, ...]  # of the tokens at hand, by who gets them
    places: tuple[Tensor, ...]  # int64: where in the run at hand each member's tokens stand
    order: Tensor  # int64: the run's tokens, of those of all members one after another

    def collect(self, exchange: Exchange, tensors_BFSHD: Sequence[Tensor]) -> list[Tensor]:
        """The run at hand [B, L, H, D], from what is at hand of each frame."""
        tensors = [tensor.flatten(1, 2) for tensor in tensors_BFSHD]
        groups = [[tensor[:, here] for tensor in tensors] for here in self.sends]
        shapes = [[_sized(tensor, len(places)) for tensor in tensors] for places in self.places]
        received = exchange.swap_groups(groups, shapes)
        return [torch.cat(pieces, dim=1)[:, self.order] for pieces in zip(*received, strict=True)]

    def give_back(self, exchange: Exchange, tensors_BLHD: Sequence[Tensor]) -> list[Tensor]:
        """What is at hand of each frame [B, F, S, H, D], from the run at hand."""
        groups = [[tensor[:, places] for tensor in tensors_BLHD] for places in self.places]
        shapes = [[_sized(tensor, _length(here)) for tensor in tensors_BLHD] for here in self.sends]
        received = exchange.swap_groups(groups, shapes)
        frame = sum(_length(here) for here in self.sends) // self.num_frames
        return [
            torch.cat(pieces, dim=1).unflatten(1, (self.num_frames, frame))
            for pieces in zip(*received, strict=True)
        ]


@lru_cache(maxsize=64)
def runs_of(
    index: int, held: tuple[range, ...], num_frames: int, num_blocks: int, block: int, device: torch.device
) -> Runs:
    """For the member of that index, from the tokens that each one holds of a frame."""
    per_frame = held[-1].stop
    blocks = parts(num_blocks, len(held))
    runs = [tokens_of(each, block, num_frames * per_frame) for each in blocks]
    frames = torch.arange(num_frames).unsqueeze(1) * per_frame
    tokens = [(frames + torch.arange(part.start, part.stop)).flatten() for part in held]  # ascending
    edges = torch.searchsorted(tokens[index], torch.tensor([run.start for run in runs] + [runs[-1].stop]))
    sends = tuple(slice(start, stop) for start, stop in zip(edges.tolist(), edges[1:].tolist(), strict=False))
    mine = runs[index]
    places = tuple(each[(each >= mine.start) & (each < mine.stop)] - mine.start for each in tokens)
    return Runs(
        num_frames=num_frames,
        blocks=blocks,
        lengths=tuple(len(run) for run in runs),
        sends=sends,
        places=tuple(each.to(device) for each in places),
        order=torch.cat(places).argsort().to(device),
    )


def _sized(tensor_BLHD: Tensor, num_tokens: int) -> tuple[int, ...]:
    batch, _, *head = tensor_BLHD.shape
    return batch, num_tokens, *head


def _length(part: slice) -> int:
    return part.stop - part.start
