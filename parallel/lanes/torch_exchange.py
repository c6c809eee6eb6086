"""Exchanges: shared memory on one node, gloo between CPUs; between GPUs NCCL, after a word by gloo."""

import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from vidgen.parallel.lanes.exchange import Exchange
from vidgen.parallel.lanes.shared_exchange import open_shared_wire
from vidgen.parallel.topology import AXES, Axis
from vidgen.parallel.torch_links import BACK_TAG, FORWARD_TAG, lost, naming, world
from vidgen.parallel.transport import late

FIRST_TAG = max(FORWARD_TAG, BACK_TAG) + 1
TAGS: dict[Axis, int] = {axis: FIRST_TAG + place for place, axis in enumerate(AXES)}  # gloo matches by them
LEAD_TAG = FIRST_TAG + len(AXES)  # of what lead.py says
LEAST_WAIT_S = 0.001  # gloo takes 0 for no limit


def open_exchange(
    rank: int, ranks: Sequence[int], *, tag: int, timeout_s: float, device: torch.device,
    store: dist.Store | None = None,
) -> Exchange:  # fmt: skip
    """A rank's end of an exchange between `ranks`, in the order of these; `connect` comes before.

    Between two ranks no two exchanges may have one tag. On GPUs all of them must call this at the same time.
    Without a store to find each other by, memory is not shared.
    """
    index = ranks.index(rank)
    if len(ranks) == 1:
        return Exchange(index, 1, None)
    if device.type != "cuda" and store is not None:
        shared = open_shared_wire(rank, ranks, store, tag=tag, timeout_s=timeout_s)
        if shared is not None:
            return Exchange(index, len(ranks), shared)
    wire = GlooWire(rank, ranks, tag=tag, timeout_s=timeout_s)
    if device.type != "cuda":
        return Exchange(index, len(ranks), wire)
    return Exchange(index, len(ranks), NcclWire(wire, device))


class GlooWire:
    """Carries host memory. See exchange.Wire."""

    def __init__(self, rank: int, ranks: Sequence[int], *, tag: int, timeout_s: float) -> None:
        self.rank, self.ranks, self.tag, self.timeout_s = rank, tuple(ranks), tag, timeout_s
        self._group = world()

    def begin(self, outgoing: Mapping[int, Tensor], incoming: Mapping[int, Tensor]) -> Callable[[], None]:
        # receives first: what comes for one that is posted need not be kept elsewhere
        posted: list[tuple[dist.Work, int, str]] = []
        for member, buffer in incoming.items():
            peer = self.ranks[member]
            with naming(self.rank, peer):
                posted.append((self._group.recv([buffer], peer, self.tag), peer, "sent nothing"))
        for member, buffer in outgoing.items():
            peer = self.ranks[member]
            with naming(self.rank, peer):
                posted.append((self._group.send([buffer], peer, self.tag), peer, "took no message"))

        def wait() -> None:
            end = time.monotonic() + self.timeout_s
            for handle, peer, what in posted:
                self._wait(handle, peer, what, end - time.monotonic())

        return wait

    def close(self) -> None:
        """Nothing: torch_links.disconnect ends it with all others."""

    def _wait(self, handle: dist.Work, peer: int, what: str, left_s: float) -> None:
        try:
            handle.wait(timedelta(seconds=max(LEAST_WAIT_S, left_s)))
        except RuntimeError as error:
            if "imed out" in str(error):
                raise late(self.rank, what, peer, self.timeout_s) from error
            raise lost(self.rank, peer, error) from error


class NcclWire:
    """Carries device memory. Waiting makes the device's stream wait, not the host.

    NCCL cannot say who is missing, so everyone first says by gloo that it has come this far. The host runs
    ahead of the device, so that this costs no time of the device's.
    """

    def __init__(self, words: GlooWire, device: torch.device) -> None:
        self.words = words
        self._group: Any = dist.new_group(
            list(words.ranks), backend="nccl", timeout=timedelta(seconds=words.timeout_s),
            use_local_synchronization=True,
        )  # fmt: skip
        # the communicator is made by the first call, in which all must take part
        dist.all_reduce(torch.zeros(1, device=device), group=self._group)

    def begin(self, outgoing: Mapping[int, Tensor], incoming: Mapping[int, Tensor]) -> Callable[[], None]:
        word = torch.zeros(1, dtype=torch.uint8)
        self.words.begin(
            dict.fromkeys(outgoing, word), {member: torch.empty_like(word) for member in incoming}
        )()
        ranks = self.words.ranks
        operations = [dist.P2POp(dist.irecv, incoming[peer], ranks[peer], self._group) for peer in incoming]
        operations += [dist.P2POp(dist.isend, outgoing[peer], ranks[peer], self._group) for peer in outgoing]
        handles = dist.batch_isend_irecv(operations)

        def wait() -> None:
            for handle in handles:
                handle.wait()
            operations.clear()  # which hold the memory that was in use until now

        return wait

    def close(self) -> None:
        """Nothing: torch_links.disconnect ends it with all others."""
