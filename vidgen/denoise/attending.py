"""How each layer is run in a queue of blocks, and what is kept of it between a block's steps.

That is what a policy of sparse attention keeps, and what stands for a layer, or for some of its tokens, where
a step cache leaves them out next.
The layers are those at hand: all of them in one process, a stage's own on a rank. What is kept belongs to a
(block, guidance branch, layer) and is read at that block's next step only, so it depends on no other rank.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from torch import Tensor

from vidgen.denoise.lending import Lent
from vidgen.denoise.skipping import Regions
from vidgen.denoise.timetable import Timetable
from vidgen.model.context import Context, KeyValue
from vidgen.model.dit import Grid
from vidgen.model.layer_run import NAMES, Change, LayerRun, Stale
from vidgen.model.layers import Attend
from vidgen.sparsity.policy import Place, Policy, State
from vidgen.sparsity.tally import Tally
from vidgen.stepcache.delta import NO_LAYERS


@dataclass(frozen=True, kw_only=True)
class Sparsity:
    """A task's policy, and what it did so far."""

    policy: Policy
    tally: Tally = field(default_factory=Tally, compare=False)


class Attending:
    """Follows the forwards of one tick after another; what is kept lies in `lent`.

    `left_out` tells of a block which layers each of its steps leaves out.
    """

    def __init__(
        self,
        sparsity: Sparsity | None,
        timetable: Timetable,
        layers: range,
        num_layers: int,
        lent: Lent,
        left_out: Callable[[int], Sequence[range]] | None = None,
        regions: Regions | None = None,
    ) -> None:
        self.sparsity, self.timetable, self.lent, self.left_out = sparsity, timetable, lent, left_out
        self.regions = regions
        self.layer_numbers, self.num_layers = layers, num_layers
        self._this_tick: dict[int, list[list[State]]] = {}

    def attends(self, block: int, step: int, run: int, grid: Grid, context: Context) -> list[LayerRun]:
        """How each layer at hand is run in a run of a block's step; runs come in order."""
        runs = self._this_tick.setdefault(block, [])
        assert len(runs) == run, "runs of a forward come one after another"
        before = self.lent.attention.get(block)
        states: list[State] = list(before[run]) if before else [{} for _ in self.layer_numbers]
        runs.append(states)
        if self.regions is not None:
            return self._of_region(self.regions, block, step, states, grid)
        now, next_ones = self._left_out(block, step), self._left_out(block, step + 1)
        attend_in = (
            None if self.sparsity is None else self._sparse(self.sparsity, states, step, grid, context)
        )

        def keep(index: int, change: Change) -> None:
            states[index] = {**states[index], **change.tensors()}

        def run_of(index: int, layer: int) -> LayerRun:
            known = Change.of(states[index]) if layer in now else None
            if known is None or layer not in next_ones:
                states[index] = without_change(states[index])
            if known is not None:
                return LayerRun(known=known)
            return LayerRun(
                attend=None if attend_in is None else attend_in(index, layer),
                keep=partial(keep, index) if layer in next_ones else None,
            )

        return [run_of(index, layer) for index, layer in enumerate(self.layer_numbers)]

    def _of_region(
        self, regions: Regions, block: int, step: int, states: list[State], grid: Grid
    ) -> list[LayerRun]:
        """How each layer is run where a step cache leaves out tokens; with plain attention."""
        is_now, is_next = regions.only_some(block, step), regions.only_some(block, step + 1)
        frames_before = grid[0] - self.timetable.block(block).num_frames

        def keep(index: int, layer: int, window: KeyValue, x_BFSD: Tensor) -> None:
            own = x_BFSD if is_now else x_BFSD[:, frames_before:]
            states[index] = Stale(window, own if layer == self.num_layers - 1 else None).tensors()

        def run_of(index: int, layer: int) -> LayerRun:
            stale = Stale.of(states[index]) if is_now else None
            states[index] = {}
            return LayerRun(stale=stale, keep_stale=partial(keep, index, layer) if is_next else None)

        return [run_of(index, layer) for index, layer in enumerate(self.layer_numbers)]

    def end_tick(self, tick: int) -> None:
        """What this tick left is what the next one reads; blocks that took their last step are forgotten."""
        new = {block: tuple(tuple(states) for states in runs) for block, runs in self._this_tick.items()}
        self.lent.attention = {
            block: runs
            for block, runs in (self.lent.attention | new).items()
            if self.timetable.last_tick(block) > tick
        }
        self._this_tick = {}

    def _left_out(self, block: int, step: int) -> range:
        if self.left_out is None or step == self.timetable.num_steps:
            return NO_LAYERS
        return self.left_out(block)[step]

    def _sparse(
        self, sparsity: Sparsity, states: list[State], step: int, grid: Grid, context: Context
    ) -> Callable[[int, int], Attend]:
        """The attention of (index among those at hand, layer), which leaves its new state in `states`."""
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
                out, states[index], report = sparsity.policy.attend(
                    query_BQHD, key_BKHD, value_BKHD, place(layer=layer), states[index]
                )
                sparsity.tally(report)
                return out

            return attend

        return attend_in


def without_change(state: State) -> State:
    """What a policy keeps of it."""
    if NAMES[0] not in state:
        return state
    return {name: tensor for name, tensor in state.items() if name not in NAMES}
