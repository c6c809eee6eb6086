"""A state cut into what each rank needs of it, and put together again from what each has left."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch

from vidgen.denoise.lending import BranchKeyValues, Lent, join_layers
from vidgen.denoise.lending import join as join_lent
from vidgen.denoise.loop import LoopState
from vidgen.model.context import KeyValue
from vidgen.parallel.topology import Stage, Topology, parts


def share(state: LoopState, stage: Stage, tokens_per_frame: int) -> LoopState:
    """A rank's part: blocks if it holds them; its layers, branches and tokens of what has been lent."""
    lanes, lent = stage.lanes, state.lent.layers(stage.layers)
    if lanes.guidance > 1:
        lent = _of_branches(lent, slice(lanes.coordinate(stage.lane, "guidance"), None, lanes.guidance))
    if lanes.sequence > 1:
        tokens = parts(tokens_per_frame, lanes.sequence)[sequence_index(stage)]
        part = slice(tokens.start, tokens.stop)
        lent = _each(
            lent, lambda kv: KeyValue(kv.key_BFSHD[:, :, part].clone(), kv.value_BFSHD[:, :, part].clone())
        )
    return LoopState(state.next_tick, state.blocks if stage.is_first else {}, lent)


def join(shares: Mapping[int, LoopState], topology: Topology) -> LoopState:
    """The whole of what all ranks hold after the same tick."""
    lanes = topology.lanes
    lent: list[Lent] = []
    for index in range(topology.num_stages):
        held = {stage.lane: shares[stage.rank].lent for stage in topology.stages() if stage.index == index}
        branches = [
            _join_tokens([held[lane] for lane in lanes.peers(first, "ring", "ulysses")])
            for first in lanes.peers(0, "guidance")
        ]
        lent.append(_join_branches(branches))
    return replace(shares[0], lent=join_layers(lent))


def sequence_index(stage: Stage) -> int:
    """Which part of each frame's tokens a rank's lane holds."""
    ring, ulysses = (stage.lanes.coordinate(stage.lane, axis) for axis in ("ring", "ulysses"))
    return ring * stage.lanes.ulysses + ulysses


def _each(lent: Lent, change: Callable[[KeyValue], KeyValue]) -> Lent:
    return lent.each(
        lambda branches: tuple(tuple(change(kv) for kv in layers) for layers in branches), lent.attention
    )


def _of_branches(lent: Lent, part: slice) -> Lent:
    attention = {block: runs[part] for block, runs in lent.attention.items()}
    return lent.each(lambda branches: branches[part], attention)


def _join_tokens(lanes: Sequence[Lent]) -> Lent:
    """Of lanes that share the tokens of each frame."""
    if len(lanes) == 1:
        return lanes[0]

    def joined(held: Sequence[BranchKeyValues]) -> BranchKeyValues:
        return tuple(
            tuple(
                KeyValue(
                    torch.cat([kv.key_BFSHD for kv in kvs], dim=2),
                    torch.cat([kv.value_BFSHD for kv in kvs], dim=2),
                )
                for kvs in zip(*layers, strict=True)
            )
            for layers in zip(*held, strict=True)
        )

    return join_lent(lanes, joined, lanes[0].attention)


def _join_branches(lanes: Sequence[Lent]) -> Lent:
    """Of lanes that have a branch of guidance each."""
    if len(lanes) == 1:
        return lanes[0]
    attention = {
        block: tuple(run for lane in lanes for run in lane.attention[block]) for block in lanes[0].attention
    }
    return join_lent(lanes, lambda held: tuple(branch for lane in held for branch in lane), attention)
