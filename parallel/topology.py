"""Which rank does which part of the work. Integers only: no tensors, no devices, no processes.

The ranks of one render form lanes, each a row of stages: a tick's forwards pass through the stages of every
lane in order. Lanes share a forward's tokens, attention heads, branches of guidance or frames.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal, get_args

Axis = Literal["clip", "guidance", "ring", "ulysses"]
AXES: tuple[Axis, ...] = get_args(Axis)  # of lanes, the slowest first in the numbers of lanes


@dataclass(frozen=True, kw_only=True, slots=True)
class Lanes:
    """How many lanes share each kind of work; 1 is the identity. Their product is the number of lanes."""

    clip: int = 1  # runs of frames, in lock step
    guidance: int = 1  # branches of guidance
    ring: int = 1  # tokens: keys and values are passed around
    ulysses: int = 1  # tokens, or within attention its heads

    def __post_init__(self) -> None:
        for axis in AXES:
            if getattr(self, axis) < 1:
                raise ValueError(f"{axis}={getattr(self, axis)}: need at least 1")

    @property
    def num_lanes(self) -> int:
        return prod(self.sizes)

    @property
    def sequence(self) -> int:
        """Lanes that share the tokens of a frame."""
        return self.ring * self.ulysses

    @property
    def sizes(self) -> tuple[int, ...]:
        """In the order of AXES."""
        return tuple(getattr(self, axis) for axis in AXES)

    def coordinate(self, lane: int, axis: Axis) -> int:
        """Where a lane stands along an axis."""
        place = AXES.index(axis)
        return lane // prod(self.sizes[place + 1 :]) % self.sizes[place]

    def peers(self, lane: int, *axes: Axis) -> tuple[int, ...]:
        """The lanes that differ from this one along those axes only, this one too, in order."""
        others: list[Axis] = [axis for axis in AXES if axis not in axes]
        return tuple(
            peer
            for peer in range(self.num_lanes)
            if all(self.coordinate(peer, axis) == self.coordinate(lane, axis) for axis in others)
        )


@dataclass(frozen=True, slots=True)
class Stage:
    """One rank's part of the work. A lane's first stage also embeds, its last one also projects."""

    index: int
    num_stages: int
    layers: range
    lane: int = 0
    lanes: Lanes = Lanes()

    @property
    def is_first(self) -> bool:
        return self.index == 0

    @property
    def is_last(self) -> bool:
        return self.index == self.num_stages - 1

    @property
    def rank(self) -> int:
        return self.rank_of(self.lane)

    @property
    def num_ranks(self) -> int:
        return self.num_stages * self.lanes.num_lanes

    @property
    def before(self) -> int:
        """The rank that sends to this one."""
        return self.lane * self.num_stages + (self.index - 1) % self.num_stages

    @property
    def after(self) -> int:
        """The rank that this one sends to."""
        return self.lane * self.num_stages + (self.index + 1) % self.num_stages

    def rank_of(self, lane: int) -> int:
        """The rank that holds the same layers in a lane."""
        return lane * self.num_stages + self.index

    def peers(self, *axes: Axis) -> tuple[int, ...]:
        """Ranks with the same layers in the lanes along those axes, this one too."""
        return tuple(self.rank_of(lane) for lane in self.lanes.peers(self.lane, *axes))


@dataclass(frozen=True, slots=True)
class Topology:
    """Lanes of stages; the stages said by how many layers each holds."""

    layers_per_stage: tuple[int, ...]
    lanes: Lanes = Lanes()

    @property
    def num_stages(self) -> int:
        return len(self.layers_per_stage)

    @property
    def num_layers(self) -> int:
        return sum(self.layers_per_stage)

    @property
    def num_ranks(self) -> int:
        return self.num_stages * self.lanes.num_lanes

    def stage(self, rank: int) -> Stage:
        """What a rank holds: ranks are numbered lane by lane."""
        lane, index = divmod(rank, self.num_stages)
        first = sum(self.layers_per_stage[:index])
        layers = range(first, first + self.layers_per_stage[index])
        return Stage(index, self.num_stages, layers, lane, self.lanes)

    def stages(self) -> tuple[Stage, ...]:
        """Every rank's."""
        return tuple(self.stage(rank) for rank in range(self.num_ranks))


def parts(total: int, num_parts: int) -> tuple[range, ...]:
    """Consecutive ranges that share `total` things evenly; some may be empty."""
    return tuple(
        range(part * total // num_parts, (part + 1) * total // num_parts) for part in range(num_parts)
    )


def check_num_ranks(num_ranks: int, num_layers: int) -> None:
    """ValueError unless every rank can have a layer."""
    if not 1 <= num_ranks <= num_layers:
        raise ValueError(
            f"ranks={num_ranks}: the model has {num_layers} layers and a rank needs at least one; take 1 to "
            f"{num_layers}"
        )


def by_hand(layers_per_stage: Sequence[int], num_layers: int) -> Topology:
    """The cut that somebody chose. ValueError when it does not use every layer once."""
    if min(layers_per_stage, default=0) < 1 or sum(layers_per_stage) != num_layers:
        raise ValueError(
            f"layers_per_rank={list(layers_per_stage)}: need numbers above 0 that add up to the model's "
            f"{num_layers} layers"
        )
    return Topology(tuple(layers_per_stage))


def balanced(
    num_layers: int, num_ranks: int, *, layer: float = 1.0, first: float = 0.0, last: float = 0.0
) -> Topology:
    """The cut whose slowest stage is fastest, from the costs of a layer and of the first's and last's extras.

    Among equals the one with the least sum of squares, so that no stage is needlessly full.
    """
    check_num_ranks(num_ranks, num_layers)
    if num_ranks == 1:
        return Topology((num_layers,))
    extras = [first, *[0.0] * (num_ranks - 2), last]
    # best[n]: (slowest, squares, cut) of the stages so far holding n layers
    best: dict[int, tuple[float, float, tuple[int, ...]]] = {0: (0.0, 0.0, ())}
    for rank, extra in enumerate(extras):
        following: dict[int, tuple[float, float, tuple[int, ...]]] = {}
        for held, (slowest, squares, cut) in best.items():
            for count in range(1, num_layers - held - (num_ranks - rank - 1) + 1):
                cost = count * layer + extra
                option = max(slowest, cost), squares + cost**2, (*cut, count)
                if held + count not in following or option < following[held + count]:
                    following[held + count] = option
        best = following
    return Topology(best[num_layers][2])
