"""Which kind of link two ranks get: shared memory on one node, gloo between nodes, NCCL between GPUs."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from vidgen.denoise.lockstep import ClipAttention
from vidgen.denoise.loop import Task
from vidgen.parallel.first import default_in_flight
from vidgen.parallel.lanes.clip import SplitClips
from vidgen.parallel.lanes.exchange import Exchange
from vidgen.parallel.lanes.lane import Lane
from vidgen.parallel.lanes.lead import Follower, Lead, Leader
from vidgen.parallel.lanes.sequence import SplitSequence
from vidgen.parallel.lanes.torch_exchange import LEAD_TAG, TAGS, open_exchange
from vidgen.parallel.pipeline import Links
from vidgen.parallel.shapes import Shapes
from vidgen.parallel.shared_links import SharedIncoming, SharedOutgoing
from vidgen.parallel.topology import Axis, Stage
from vidgen.parallel.torch_links import (
    BACK_TAG,
    FORWARD_TAG,
    GlooIncoming,
    GlooOutgoing,
    Groups,
    NcclIncoming,
    NcclOutgoing,
    word_of,
)
from vidgen.parallel.transport import Incoming, InProcessLink, MessageLayout, Outgoing

DEPTHS = (2, 8)  # fewest and most buffers at either end of a link; more of them even out a busy machine
DEPTH_BYTES = 64 * 2**20  # that one end may take beyond the fewest


@dataclass(frozen=True, kw_only=True)
class Ways:
    """All that connects a rank with others: the stages of its lane, and the same stage of other lanes."""

    shapes: Shapes  # of the lane's messages
    links: Links
    lane: Lane
    exchanges: tuple[Exchange, ...]  # the lane's
    lead: Lead | None = None  # of a first stage

    def close(self) -> None:
        """Give back what the operating system lent."""
        self.links.close()
        for exchange in self.exchanges:
            exchange.close()


def open_ways(
    stage: Stage,
    task: Task,
    groups: Groups,
    device: torch.device,
    timeout_s: float,
    *,
    may_share: bool = True,
) -> Ways:
    """A rank's connections, in the order in which all ranks open theirs.

    TransportError when another one is not there in time.
    """
    whole = Shapes.of(task)
    exchanges: list[Exchange] = []

    def exchange(axis: Axis) -> Exchange:
        opened = open_exchange(
            stage.rank, stage.peers(axis), tag=TAGS[axis], timeout_s=timeout_s, device=device,
            store=groups.store if may_share else None,
        )  # fmt: skip
        exchanges.append(opened)
        return opened

    lane = open_lane(stage, task, whole.tokens_per_frame, exchange)
    tokens = range(whole.tokens_per_frame)
    if lane.sequence is not None:
        tokens = tokens[lane.sequence.tokens]
    shapes = whole.holding(len(tokens))
    layouts = shapes.layouts(task.timetable)
    return Ways(
        shapes=shapes,
        links=open_links(stage, groups, layouts, device, timeout_s, may_share=may_share),
        lane=lane,
        exchanges=tuple(exchanges),
        lead=_lead(stage, default_in_flight(stage.num_stages, link_depth(layouts[0])), timeout_s),
    )


def open_lane(stage: Stage, task: Task, tokens_per_frame: int, exchange: Callable[[Axis], Exchange]) -> Lane:
    """What a rank shares with those that hold the same layers in other lanes."""
    lanes = stage.lanes
    sequence = clips = None
    if task.clips is not None:
        clips = SplitClips(ClipAttention(task.clips, task.model.config, stage.layers), exchange("clip"))
    if lanes.sequence > 1:
        sequence = SplitSequence(tokens_per_frame, exchange("ulysses"), exchange("ring"))
    guidance = exchange("guidance") if lanes.guidance > 1 else None
    return Lane(sequence=sequence, clips=clips, guidance=guidance)


def _lead(stage: Stage, num_ticks_ahead: int, timeout_s: float) -> Lead | None:
    """Who tells a first stage when ticks begin, or whom it tells."""
    if not stage.is_first or stage.lanes.num_lanes == 1:
        return None
    words: dict[str, Any] = {"tag": LEAD_TAG, "depth": num_ticks_ahead + 2, "timeout_s": timeout_s}
    nothing = MessageLayout((), torch.float32)
    leader, *followers = (stage.rank_of(lane) for lane in range(stage.lanes.num_lanes))
    if stage.rank == leader:
        return Leader([GlooOutgoing(nothing, rank=leader, peer=peer, **words) for peer in followers])
    return Follower(GlooIncoming(nothing, rank=stage.rank, peer=leader, **words))


def link_depth(layout: MessageLayout) -> int:
    """Buffers at either end of a link from stage to stage: as many as help and memory allows."""
    fewest, most = DEPTHS
    return max(fewest, min(most, DEPTH_BYTES // layout.num_bytes))


def open_links(
    stage: Stage,
    groups: Groups,
    layouts: tuple[MessageLayout, MessageLayout],
    device: torch.device,
    timeout_s: float,
    *,
    may_share: bool = True,
) -> Links:
    """A stage's two ends, from the layouts (from stage to stage, from the last to the first).

    TransportError when a neighbour is not there in time.
    """
    forward, back = layouts
    depth, back_depth = link_depth(forward), default_in_flight(stage.num_stages, link_depth(forward))
    if stage.num_stages == 1:
        itself = InProcessLink(back, depth=back_depth, timeout_s=timeout_s, ranks=(stage.rank, stage.rank))
        return Links(itself, itself)
    ends: dict[str, Any] = {"rank": stage.rank, "timeout_s": timeout_s}
    into, out = ends | {"peer": stage.before, "depth": depth}, ends | {"peer": stage.after, "depth": depth}
    if stage.is_first:
        into |= {"depth": back_depth}
    if stage.is_last:
        out |= {"depth": back_depth}
    in_layout, out_layout = back if stage.is_first else forward, back if stage.is_last else forward
    in_tag = BACK_TAG if stage.is_first else FORWARD_TAG
    out_tag = BACK_TAG if stage.is_last else FORWARD_TAG
    if device.type == "cuda":
        in_group = groups.back if stage.is_first else groups.forward
        out_group = groups.back if stage.is_last else groups.forward
        return Links(
            NcclIncoming(in_layout, in_group, device, tag=in_tag, **into),
            NcclOutgoing(out_layout, out_group, device, tag=out_tag, **out),
        )
    if not may_share:
        return Links(
            GlooIncoming(in_layout, tag=in_tag, **into), GlooOutgoing(out_layout, tag=out_tag, **out)
        )
    return _on_cpu(groups, in_layout, into, in_tag, out_layout, out, out_tag)


def _on_cpu(
    groups: Groups, in_layout: MessageLayout, into: dict[str, Any], in_tag: int,
    out_layout: MessageLayout, out: dict[str, Any], out_tag: int,
) -> Links:  # fmt: skip
    """Shared memory where the sender can open what the receiver offers, else gloo; both ends agree."""
    rank, timeout_s = into["rank"], into["timeout_s"]
    offered = SharedIncoming(in_layout, **into)
    groups.store.set(f"offer/{rank}", offered.offer())
    outgoing: Outgoing
    try:
        outgoing = SharedOutgoing(
            out_layout, word_of(groups.store, f"offer/{out['peer']}", rank, out["peer"], timeout_s), **out
        )
        groups.store.set(f"answer/{rank}", "shared")
    except OSError:  # another node: there is no such process here
        outgoing = GlooOutgoing(out_layout, tag=out_tag, **out)
        groups.store.set(f"answer/{rank}", "gloo")
    incoming: Incoming = offered
    if word_of(groups.store, f"answer/{into['peer']}", rank, into["peer"], timeout_s) == "shared":
        offered.begin()
    else:
        incoming = GlooIncoming(in_layout, tag=in_tag, **into)
    return Links(incoming, outgoing)
