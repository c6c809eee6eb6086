"""Exchanges and attention between processes: as between threads, and who is dead or silent is named.

By gloo, and through shared memory where the processes see each other.
"""

import multiprocessing
import os
import time
from typing import Any

import pytest
import torch
from torch import Tensor

from vidgen.kernels.attention.api import attention
from vidgen.parallel.lanes import shared_exchange
from vidgen.parallel.lanes.exchange import Exchange
from vidgen.parallel.lanes.sequence import SplitSequence
from vidgen.parallel.lanes.shared_exchange import SharedWire
from vidgen.parallel.lanes.torch_exchange import TAGS, open_exchange
from vidgen.parallel.topology import Lanes
from vidgen.parallel.torch_links import connect, listen
from vidgen.parallel.transport import TransportError

ALL_TAG, LAST_TAG = 30, 31
SHORT_S, LONG_S = 2, 60
CPU = torch.device("cpu")


def numbers(shape: tuple[int, ...], *seeds: int) -> Tensor:
    """What a rank sends to another: known to both."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(hash(seeds) % (1 << 31)))


def exchanges_right(everyone: Exchange) -> bool:
    """Whether all that is sent, gathered and handed round arrives bit for bit; rank 0 holds nothing."""
    rank, size = everyone.index, everyone.size
    held = [(peer, 1000) for peer in range(size)]
    before = (rank - 1) % size
    for length in (3, 5000, 4):  # of what is swapped: memory that is shared grows with it
        taken = everyone.turn(numbers(held[rank], rank), held[before])
        received = everyone.swap(
            [numbers((peer + 1, length), rank, peer) for peer in range(size)],
            [(rank + 1, length)] * size,
        )
        gathered = everyone.gather(numbers(held[rank], rank), held)
        if not torch.equal(taken(), numbers(held[before], before)):
            return False
        for peer in range(size):
            if not torch.equal(received[peer], numbers((rank + 1, length), peer, rank)):
                return False
            if not torch.equal(gathered[peer], numbers(held[peer], peer)):
                return False
    return True


def error_of_attention(part: SplitSequence) -> float:
    """Relative, of all tokens' results gathered, against one process; 7 tokens a frame and 5 heads."""
    query, key, value = (numbers((1, 3, 7, 5, 8), number) for number in range(3))
    mine = [tensor[:, :, part.tokens].flatten(1, 2) for tensor in (query, key, value)]
    out = part.around(attention, 3, query_frames=3)(mine[0], mine[1], mine[2])
    gathered = part.gather(out.flatten(2).unflatten(1, (3, -1))).flatten(1, 2)
    wanted = attention(query.flatten(1, 2), key.flatten(1, 2), value.flatten(1, 2)).flatten(2)
    return ((gathered - wanted).norm() / wanted.norm()).item()


def work(rank: int, lanes: Lanes, port: Any, results: Any, what: str, wire: str) -> None:
    torch.set_num_threads(1)
    if wire == "apart" and rank == 1:
        shared_exchange.processes_seen = lambda: "those of another node"
    size = lanes.num_lanes
    door = listen("127.0.0.1") if rank == 0 else None
    if door is not None:
        for _ in range(size - 1):
            port.put(door.getsockname()[1])
    meet_at = ("127.0.0.1", door.getsockname()[1] if door is not None else port.get(timeout=LONG_S))
    groups = connect(rank, size, meet_at, door, own_host="127.0.0.1", timeout_s=LONG_S, device=CPU)
    options: dict[str, Any] = {"device": CPU, "store": None if wire == "gloo" else groups.store}
    everyone = open_exchange(rank, range(size), tag=ALL_TAG, timeout_s=LONG_S, **options)
    limit_s = SHORT_S if what == "silence" else LONG_S
    last = open_exchange(rank, range(size), tag=LAST_TAG, timeout_s=limit_s, **options)
    ulysses, ring = (
        open_exchange(rank, lanes.peers(rank, axis), tag=TAGS[axis], timeout_s=LONG_S, **options)
        for axis in ("ulysses", "ring")
    )
    is_as_asked = isinstance(everyone.wire, SharedWire) == (wire == "shared")
    results.put(
        (rank, is_as_asked and exchanges_right(everyone), error_of_attention(SplitSequence(7, ulysses, ring)))
    )
    if rank in (0, 2):  # rank 1 is the next one of 0, and the one before 2
        start = time.monotonic()
        try:
            if rank == 0:
                last.swap([torch.ones(2)] * size, [(2,)] * size)
            else:
                last.turn(torch.ones(2), (2,))()
        except TransportError as error:
            results.put((rank, str(error), error.peer, time.monotonic() - start))
    results.close()
    results.join_thread()  # a queue writes in a thread of its own
    if rank == 1 and what == "die":
        time.sleep(0.5)  # so that the others are waiting
        os._exit(9)
    time.sleep(60)  # stay, silent


@pytest.mark.parametrize("wire", ["gloo", "shared"])
@pytest.mark.parametrize(
    ("lanes", "what", "says"),
    [
        (Lanes(ring=2), "silence", "rank {}: rank 1 sent nothing for 2 s"),
        (Lanes(ring=2, ulysses=2), "die", "rank {}: lost rank 1: "),
    ],
    ids=["2 ranks", "4 ranks"],
)
def test_it_is_all_as_in_one_process_until_a_rank_is_silent_or_dies_and_is_named(
    lanes: Lanes, what: str, says: str, wire: str
):
    all_as_in_one_process(lanes, what, says, wire)


def test_ranks_that_do_not_see_each_others_processes_all_take_gloo():
    all_as_in_one_process(Lanes(ring=2), "silence", "rank {}: rank 1 sent nothing for 2 s", "apart")


def all_as_in_one_process(lanes: Lanes, what: str, says: str, wire: str) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])  # imported once for all
    port, results = context.Queue(), context.Queue()
    processes = [
        context.Process(target=work, args=(rank, lanes, port, results, what, wire))
        for rank in range(lanes.num_lanes)
    ]
    for process in processes:
        process.start()
    try:
        num_blaming = 1 if lanes.num_lanes == 2 else 2
        found = [results.get(timeout=120) for _ in range(lanes.num_lanes + num_blaming)]
        right = sorted(each for each in found if len(each) == 3)
        assert [each[:2] for each in right] == [(rank, True) for rank in range(lanes.num_lanes)]
        assert max(error for _, _, error in right) <= 1e-5
        for rank, message, peer, seconds in (each for each in found if len(each) == 4):
            assert message.startswith(says.format(rank)) and peer == 1 and seconds < 20
    finally:
        for process in processes:
            process.kill()
            process.join(30)
