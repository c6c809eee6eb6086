"""Keys and values that forwards lend to one another: within a tick, to the next tick, and to all that follow.

The layers are those at hand: all of them in one process, a stage's own on a rank. None of this is ever sent.
"""

from dataclasses import dataclass, field

import torch

from vidgen.denoise.forwards import Forward, Lend, Lender, Read
from vidgen.model.context import Context, LayerKeyValues, concatenate
from vidgen.sparsity.policy import State

BranchKeyValues = tuple[LayerKeyValues, ...]  # one per guidance branch
RunStates = tuple[tuple[State, ...], ...]  # of a sparsity policy: per run of the model, per layer


@dataclass
class Lent:
    """What outlives a tick, and travels in checkpoints."""

    for_later: dict[int, tuple[int, BranchKeyValues]] = field(default_factory=dict)  # block -> (step, K,V)
    anchor: BranchKeyValues = ()
    attention: dict[int, RunStates] = field(
        default_factory=dict
    )  # block -> what a sparsity policy keeps of it

    def copy(self) -> "Lent":
        """The same tensors in a record of their own, for a checkpoint while the loop goes on."""
        return Lent(dict(self.for_later), self.anchor, dict(self.attention))

    def to(self, device: torch.device) -> "Lent":
        """The same on a device."""

        def moved(branches: BranchKeyValues) -> BranchKeyValues:
            return tuple(tuple(kv.to(device) for kv in layers) for layers in branches)

        later = {block: (step, moved(kv)) for block, (step, kv) in self.for_later.items()}
        attention: dict[int, RunStates] = {
            block: tuple(
                tuple({name: tensor.to(device) for name, tensor in state.items()} for state in layers)
                for layers in runs
            )
            for block, runs in self.attention.items()
        }
        return Lent(later, moved(self.anchor), attention)

    def layers(self, layers: range) -> "Lent":
        """The part of some layers."""
        part = slice(layers.start, layers.stop)
        return Lent(
            {block: (step, _each(kv, part)) for block, (step, kv) in self.for_later.items()},
            _each(self.anchor, part),
            {block: tuple(layers[part] for layers in runs) for block, runs in self.attention.items()},
        )


def join_layers(parts: list[Lent]) -> Lent:
    """The whole of what stages hold, given in the order of their layers."""
    first = parts[0]
    later = {
        block: (step, tuple(sum(layers, ()) for layers in _zip([p.for_later[block][1] for p in parts])))
        for block, (step, _) in first.for_later.items()
    }
    attention = {
        block: tuple(sum(layers, ()) for layers in zip(*(p.attention[block] for p in parts), strict=True))
        for block in first.attention
    }
    return Lent(later, tuple(sum(layers, ()) for layers in _zip([p.anchor for p in parts])), attention)


def _of_branch(branches: BranchKeyValues, branch: int) -> LayerKeyValues:
    return branches[branch if branch < len(branches) else 0]


def _each(branches: BranchKeyValues, part: slice) -> BranchKeyValues:
    return tuple(layers[part] for layers in branches)


def _zip(stages: list[BranchKeyValues]) -> list[tuple[LayerKeyValues, ...]]:
    """Per branch, every stage's layers."""
    return list(zip(*stages, strict=True))


class Lending:
    """Follows the forwards of one tick after another and hands each what earlier ones lent.

    Every read is checked against the version that the timetable names.
    """

    def __init__(self, lent: Lent) -> None:
        self.lent = lent
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

    def _close(self) -> None:
        forward, self._forward = self._forward, None
        if forward is None:
            return
        self._from_next_block = (None, ())
        for lend, branches in self._kept.items():
            block, step = forward.parts[lend.part]
            if lend.to == Lender.EARLIER_BLOCK:
                self._from_next_block = Read(block, step, lend.start, lend.stop), tuple(branches)
            elif lend.to == Lender.ALL:
                self._new_anchor = tuple(branches)
            else:
                self._this_tick[block] = step, tuple(branches)
