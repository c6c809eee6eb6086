"""Which kind of link two ranks get: shared memory on one node, gloo between nodes, NCCL between GPUs."""

from datetime import timedelta
from typing import Any

import torch

from vidgen.parallel.first import default_in_flight
from vidgen.parallel.pipeline import Links
from vidgen.parallel.shared_links import SharedIncoming, SharedOutgoing
from vidgen.parallel.topology import Stage
from vidgen.parallel.torch_links import (
    BACK_TAG,
    FORWARD_TAG,
    GlooIncoming,
    GlooOutgoing,
    Groups,
    NcclIncoming,
    NcclOutgoing,
)
from vidgen.parallel.transport import Incoming, MessageLayout, Outgoing, TransportError

DEPTHS = (2, 8)  # fewest and most buffers at either end of a link; more of them even out a busy machine
DEPTH_BYTES = 64 * 2**20  # that one end may take beyond the fewest


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
    before, after = (stage.index - 1) % stage.num_stages, (stage.index + 1) % stage.num_stages
    ends: dict[str, Any] = {"rank": stage.index, "timeout_s": timeout_s}
    into, out = ends | {"peer": before, "depth": depth}, ends | {"peer": after, "depth": depth}
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
            out_layout, _word(groups, f"offer/{out['peer']}", rank, out["peer"], timeout_s), **out
        )
        groups.store.set(f"answer/{rank}", "shared")
    except OSError:  # another node: there is no such process here
        outgoing = GlooOutgoing(out_layout, tag=out_tag, **out)
        groups.store.set(f"answer/{rank}", "gloo")
    incoming: Incoming = offered
    if _word(groups, f"answer/{into['peer']}", rank, into["peer"], timeout_s) == "shared":
        offered.begin()
    else:
        incoming = GlooIncoming(in_layout, tag=in_tag, **into)
    return Links(incoming, outgoing)


def _word(groups: Groups, key: str, rank: int, peer: int, timeout_s: float) -> str:
    """What another rank has left under the key."""
    try:
        groups.store.wait([key], timedelta(seconds=timeout_s))
        return groups.store.get(key).decode()
    except RuntimeError as error:
        raise TransportError(f"rank {rank}: rank {peer} did not open its links", peer) from error
