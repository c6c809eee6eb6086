"""Which rank holds which layers. Integers only: no tensors, no devices, no processes.

The ranks of one render form a row of stages; a tick's forwards pass through them in order.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Stage:
    """One rank's part of the model. The first stage also embeds, the last one also projects."""

    index: int
    num_stages: int
    layers: range

    @property
    def is_first(self) -> bool:
        return self.index == 0

    @property
    def is_last(self) -> bool:
        return self.index == self.num_stages - 1


@dataclass(frozen=True, slots=True)
class Topology:
    """A row of stages, said by how many layers each holds."""

    layers_per_stage: tuple[int, ...]

    @property
    def num_stages(self) -> int:
        return len(self.layers_per_stage)

    @property
    def num_layers(self) -> int:
        return sum(self.layers_per_stage)

    def stage(self, rank: int) -> Stage:
        """What a rank holds."""
        first = sum(self.layers_per_stage[:rank])
        return Stage(rank, self.num_stages, range(first, first + self.layers_per_stage[rank]))

    def stages(self) -> tuple[Stage, ...]:
        return tuple(self.stage(rank) for rank in range(self.num_stages))


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
