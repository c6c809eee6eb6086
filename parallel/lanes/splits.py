"""Where the tensors of a forward are split over ranks and where they come together again.

SCHEME is the whole of it, and the only place that says it. All else that a layer does, it does to each token
alone: norms, projections, modulation, cross-attention and the feed-forward know of no other rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

from vidgen.parallel.lanes.exchange import Exchange
from vidgen.parallel.lanes.runs import Runs
from vidgen.parallel.topology import Axis

# B batch, F frames, S tokens of a frame, H heads, D width (of a head after H)


class Cut(StrEnum):
    """Along what a tensor is split over the members of an axis."""

    NOT = "not at all"
    TOKENS = "tokens of each frame"
    HEADS = "heads"
    BLOCKS = "runs of a layout's blocks"  # of queries or of keys, in the order of the whole


DIMS = {Cut.TOKENS: 2, Cut.HEADS: 3}  # of tensors [B, F, S, D] and [B, F, S, H, D]


@dataclass(frozen=True, slots=True)
class Boundary:
    """Where tensors change from one cut to another, and the axis over whose ranks they are cut."""

    tensors: str
    axis: Axis
    before: Cut
    after: Cut


SCHEME: dict[str, Boundary] = {
    # once in a forward, around the layers
    "cut rows": Boundary("x after embedding", "ring", Cut.NOT, Cut.TOKENS),
    "cut tokens": Boundary("x of a row", "ulysses", Cut.NOT, Cut.TOKENS),
    "gather tokens": Boundary("x before projecting", "ulysses", Cut.TOKENS, Cut.NOT),
    "gather rows": Boundary("x before projecting", "ring", Cut.TOKENS, Cut.NOT),
    # in every self-attention, from the outside in; between the last two keys and values go round the ring
    "to heads": Boundary("queries, keys, values", "ulysses", Cut.TOKENS, Cut.HEADS),
    "to blocks": Boundary("queries, keys, values, under a layout", "ring", Cut.TOKENS, Cut.BLOCKS),
    "from blocks": Boundary("what is attended, under a layout", "ring", Cut.BLOCKS, Cut.TOKENS),
    "from heads": Boundary("what is attended", "ulysses", Cut.HEADS, Cut.TOKENS),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Held:
    """What each member of an axis has of what is cut in each way."""

    tokens: Sequence[range]
    heads: Sequence[range] = ()
    runs: Runs | None = None

    def ranges(self, cut: Cut) -> Sequence[range]:
        """Of tokens or of heads."""
        return self.tokens if cut is Cut.TOKENS else self.heads


def move(boundary: Boundary, exchange: Exchange, tensors: Sequence[Tensor], held: Held) -> list[Tensor]:
    """Tensors cut as after the boundary, from those cut as before it.

    They are [B, F, S, D] or [B, F, S, H, D], but runs of blocks [B, L, H, D]. What comes together does so in
    the order of the members, which is that of the uncut tensor.
    """
    before, after = boundary.before, boundary.after
    if exchange.size == 1:
        return list(tensors)
    if before is Cut.NOT:
        return [_narrow(tensor, after, held.ranges(after)[exchange.index]) for tensor in tensors]
    if Cut.BLOCKS in (before, after):
        assert held.runs is not None
        carry = held.runs.collect if after is Cut.BLOCKS else held.runs.give_back
        return carry(exchange, tensors)
    outgoing = [tensors] * exchange.size
    if after is not Cut.NOT:
        outgoing = [[_narrow(tensor, after, part) for tensor in tensors] for part in held.ranges(after)]
    own_shapes = [tensor.shape for tensor in outgoing[exchange.index]]
    shapes = [[_sized(shape, before, part) for shape in own_shapes] for part in held.ranges(before)]
    received = exchange.swap_groups(outgoing, shapes)
    return [torch.cat(pieces, dim=DIMS[before]) for pieces in zip(*received, strict=True)]


def _narrow(tensor: Tensor, cut: Cut, part: range) -> Tensor:
    return tensor.narrow(DIMS[cut], part.start, len(part))


def _sized(shape: Sequence[int], cut: Cut, part: range) -> tuple[int, ...]:
    """The shape that the holder of another part has."""
    return (*shape[: DIMS[cut]], len(part), *shape[DIMS[cut] + 1 :])
