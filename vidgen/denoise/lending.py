"""Keys and values that forwards lend to one another: within a tick, to the next tick, and to all that follow.

A forward that a step cache skips lends again what its block lent when it last ran.
The layers are those at hand: all of them in one process, a stage's own on a rank. None of this is ever sent.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from vidgen.denoise.forwards import Forward, Lend, Lender, Read
from vidgen.model.context import Context, LayerKeyValues, concatenate
from vidgen.sparsity.policy import State

BranchKeyValues = tuple[LayerKeyValues, ...]  # one per guidance branch
Lends = dict[Lend, BranchKeyValues]
RunStates = tuple[tuple[State, ...], ...]  # of a sparsity policy: per run of the model, per layer


@dataclass
class Lent:
    """What outlives a tick, and travels in checkpoints."""

    for_later: dict[int, tuple[int, BranchKeyValues]] = field(default_factory=dict)  # block -> (step, K,V)
    anchor: BranchKeyValues = ()
    attention: dict[int, RunStates] = field(
        default_factory=dict
    )  # block -> what a sparsity policy keeps of it
    last: dict[int, tuple[int, Lends]] = field(default_factory=dict)  # block -> its last step that ran, lent

    def copy(self) -> "Lent":
        """The same tensors in a record of their own, for a checkpoint while the loop goes on."""
        return Lent(dict(self.for_later), self.anchor, dict(self.attention), dict(self.last))

    def to(self, device: torch.device) -> "Lent":
        """The same on a device."""

        def moved(branches: BranchKeyValues) -> BranchKeyValues:
            return tuple(tuple(kv.to(device) for kv in layers) for layers in branches)

        attention: dict[int, RunStates] = {
            block: tuple(
                tuple({name: tensor.to(device) for name, tensor in state.items()} for state in layers)
                for layers in runs
            )
            for block, runs in self.attention.items()
        }
        return self.each(moved, attention)

    def each(
        self, change: Callable[[BranchKeyValues], BranchKeyValues], attention: dict[int, RunStates]
    ) -> "Lent":
        """The same with all keys and values changed, and what is kept of attention."""
        return Lent(
            {block: (step, change(kv)) for block, (step, kv) in self.for_later.items()},
            change(self.anchor),
            attention,
            {
                block: (step, {lend: change(kv) for lend, kv in lends.items()})
                for block, (step, lends) in self.last.items()
            },
        )

    def layers(self, layers: range) -> "Lent":
        """The part of some layers."""
        part = slice(layers.start, layers.stop)
        attention: dict[int, RunStates] = {
            block: tuple(layers[part] for layers in runs) for block, runs in self.attention.items()
        }
        return self.each(lambda branches: tuple(layers[part] for layers in branches), attention)


def join(
    parts: Sequence[Lent],
    joined: Callable[[list[BranchKeyValues]], BranchKeyValues],
    attention: dict[int, RunStates],
) -> Lent:
    """The whole of parts whose keys and values are joined so, and of what is kept of attention."""
    first = parts[0]
    return Lent(
        {
            block: (step, joined([part.for_later[block][1] for part in parts]))
            for block, (step, _) in first.for_later.items()
        },
        joined([part.anchor for part in parts]),
        attention,
        {
            block: (step, {lend: joined([part.last[block][1][lend] for part in parts]) for lend in lends})
            for block, (step, lends) in first.last.items()
        },
    )


def join_layers(parts: list[Lent]) -> Lent:
    """The whole of what stages hold, given in the order of their layers."""
    attention: dict[int, RunStates] = {
        block: tuple(sum(layers, ()) for layers in zip(*(p.attention[block] for p in parts), strict=True))
        for block in parts[0].attention
    }
    return join(
        parts, lambda stages: tuple(sum(layers, ()) for layers in zip(*stages, strict=True)), attention
    )


def _of_branch(branches: BranchKeyValues, branch: int) -> LayerKeyValues:
    return branches[branch if branch < len(branches) else 0]


class Lending:
    """Follows the forwards of one tick after another and hands each what earlier ones lent.

    Every read is checked against the version that the timetable names. With `remembers`, forwards may be
    skipped.
    """

    def __init__(self, lent: Lent, *, remembers: bool = False) -> None:
        self.lent, self.remembers = lent, remembers
        self._is_again = False
        self._last_of_tick: dict[int, tuple[int, Lends]] = {}
        self._forward: Forward | None = None
        self._kept: dict[Lend, list[LayerKeyValues]] = {}
        self._from_next_block: tuple[Read | None, BranchKeyValues] = (None, ())
        self._this_tick: dict[int, tuple[int, BranchKeyValues]] = {}
        self._new_anchor: BranchKeyValues = ()

    def begin(self, forward: Forward) -> None:
        """This forward is next."""
        self._close()
        self._forward = forward
        self._kept = {lend: [] for lend in forward.lends}
        self._is_again = False

    def relend(self, forward: Forward) -> None:
        """This forward, which is next or has just begun, is not run: it lends what its block last lent."""
        if self._forward is not forward:
            self.begin(forward)
        assert self.remembers and len(forward.parts) == 1
        _, lent = self.lent.last[forward.block]
        assert set(forward.lends) <= lent.keys(), "only what was lent before can be lent again"
        self._kept = {lend: list(lent[lend]) for lend in forward.lends}
        self._is_again = True

    @property
    def is_lending(self) -> bool:
        """Whether anybody will read keys and values of this forward."""
        assert self._forward is not None
        return bool(self._forward.lends)

    def context(self, branch: int) -> Context:
        """Keys and values around a window: anchor, cached frames and patches before it; others after it.

        A branch that the lending forward did not have reads those of the prompt's branch.
        """
        forward = self._forward
        assert forward is not None
        anchor = _of_branch(self.lent.anchor, branch) if forward.anchor_kv is not None else ()
        before = after = ()
        if forward.before_kv is not None:
            step, kv = self.lent.for_later[forward.before_kv.block]
            assert step == forward.before_kv.step, "a read names the version at the end of the last tick"
            before = _of_branch(kv, branch)
        if forward.after_kv is not None:
            source, kv = self._from_next_block
            assert source == forward.after_kv, "a read names the version of this very tick"
            after = _of_branch(kv, branch)
        patches = {read.block: self._patch(read, branch) for read in forward.patches_kv}
        earlier = (kv for block, kv in patches.items() if block < forward.block)
        later = (kv for block, kv in patches.items() if block > forward.block)
        return Context(before=concatenate(anchor, before, *earlier), after=concatenate(after, *later))

    def _patch(self, read: Read, branch: int) -> LayerKeyValues:
        """The newest there is of a patch; one that has not run in this tick lent in the last one."""
        step, kv = self._this_tick.get(read.block) or self.lent.for_later[read.block]
        assert step == read.step, "a read names the newest version"
        return _of_branch(kv, branch)

    def keep(self, own: LayerKeyValues, frames_before: int) -> None:
        """Copy what the forward lends of its keys and values; call once per branch, in order."""
        assert self._forward is not None
        for lend in self._forward.lends:
            frames = frames_before + lend.start, frames_before + lend.stop
            self._kept[lend].append(tuple(kv.frames(*frames) for kv in own))

    def end_tick(self, kept: range) -> None:
        """What later ticks may read becomes visible; blocks outside `kept` are forgotten."""
        self._close()
        self._from_next_block = (None, ())  # nobody reads it in another tick
        for_later = self.lent.for_later | self._this_tick
        self.lent.for_later = {block: kv for block, kv in for_later.items() if block in kept}
        self.lent.anchor = self.lent.anchor or self._new_anchor
        self._this_tick = {}
        last = self.lent.last | self._last_of_tick
        self.lent.last = {block: lent for block, lent in last.items() if block in kept}
        self._last_of_tick = {}

    def _close(self) -> None:
        forward, self._forward = self._forward, None
        if forward is None:
            return
        self._from_next_block = (None, ())
        if self.remembers and not self._is_again:
            lent = {lend: tuple(branches) for lend, branches in self._kept.items()}
            self._last_of_tick[forward.block] = forward.step, lent
        for lend, branches in self._kept.items():
            block, step = forward.parts[lend.part]
            if lend.to == Lender.EARLIER_BLOCK:
                self._from_next_block = Read(block, step, lend.start, lend.stop), tuple(branches)
            elif lend.to == Lender.ALL:
                self._new_anchor = tuple(branches)
            else:
                self._this_tick[block] = step, tuple(branches)
