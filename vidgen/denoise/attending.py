"""Sparse attention in a queue of blocks: each layer's policy, and what it keeps of a block between its steps.

The layers are those at hand: all of them in one process, a stage's own on a rank. What is kept belongs to a
(block, guidance branch, layer) and is read at that block's next step only, so it depends on no other rank.
"""

from dataclasses import dataclass, field
from functools import partial

from torch import Tensor

from vidgen.denoise.lending import Lent
from vidgen.denoise.timetable import Timetable
from vidgen.model.context import Context
from vidgen.model.dit import Grid
from vidgen.model.layers import Attend
from vidgen.sparsity.policy import Place, Policy, State
from vidgen.sparsity.tally import Tally


@dataclass(frozen=True, kw_only=True)
class Sparsity:
    """A task's policy, and what it did so far."""

    policy: Policy
    tally: Tally = field(default_factory=Tally, compare=False)


class Attending:
    """Follows the forwards of one tick after another; what policies keep lies in `lent`."""

    def __init__(
        self, sparsity: Sparsity, timetable: Timetable, layers: range, num_layers: int, lent: Lent
    ) -> None:
        self.sparsity, self.timetable, self.lent = sparsity, timetable, lent
        self.layer_numbers, self.num_layers = layers, num_layers
        self._this_tick: dict[int, list[list[State]]] = {}

    def attends(self, block: int, step: int, run: int, grid: Grid, context: Context) -> list[Attend]:
        """The self-attention of each layer at hand, for a run of a block's step; runs come in order."""
        runs = self._this_tick.setdefault(block, [])
        assert len(runs) == run, "runs of a forward come one after another"
        before = self.lent.attention.get(block)
        states: list[State] = list(before[run]) if before else [{} for _ in self.layer_numbers]
        runs.append(states)
        place = partial(
            Place,
            num_layers=self.num_layers,
            step=step,
            num_steps=self.timetable.num_steps,
            grid=grid,
            frames_before=context.frames_before,
            frames_after=context.frames_after,
        )

        def attend_in(index: int, layer: int) -> Attend:
            def attend(query_BQHD: Tensor, key_BKHD: Tensor, value_BKHD: Tensor) -> Tensor:
                out, states[index], report = self.sparsity.policy.attend(
                    query_BQHD, key_BKHD, value_BKHD, place(layer=layer), states[index]
                )
                self.sparsity.tally(report)
                return out

            return attend

        return [attend_in(index, layer) for index, layer in enumerate(self.layer_numbers)]

    def end_tick(self, tick: int) -> None:
        """What this tick left is what the next one reads; blocks that took their last step are forgotten."""
        new = {block: tuple(tuple(states) for states in runs) for block, runs in self._this_tick.items()}
        self.lent.attention = {
            block: runs
            for block, runs in (self.lent.attention | new).items()
            if self.timetable.last_tick(block) > tick
        }
        self._this_tick = {}
