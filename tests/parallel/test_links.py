"""Laws of links between processes: shared memory tried within one process, gloo between two."""

import multiprocessing
import os
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from vidgen.parallel.shared_links import SharedIncoming, SharedOutgoing
from vidgen.parallel.transport import Header, Kind, MessageLayout, TransportError

LAYOUT = MessageLayout((7, 300), torch.float32)
SHAPES = ((7,), (20, 15))


def parts(seed: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(shape, generator=generator) for shape in SHAPES)


def pair(depth: int = 2, timeout_s: float = 0.2) -> tuple[SharedOutgoing, SharedIncoming]:
    """Both ends of a link from rank 3 to rank 4, as two processes would hold them."""
    incoming = SharedIncoming(LAYOUT, rank=4, peer=3, depth=depth, timeout_s=timeout_s)
    outgoing = SharedOutgoing(LAYOUT, incoming.offer(), rank=3, peer=4, depth=depth, timeout_s=timeout_s)
    incoming.begin()
    return outgoing, incoming


def test_shared_memory_keeps_order_and_bits_round_and_round():
    outgoing, incoming = pair(depth=4)  # one of them is in use while the next three come
    for number in range(0, 30, 3):
        for item in range(number, number + 3):
            outgoing.send(Header(Kind.WORK, item), parts(item))
        for item in range(number, number + 3):
            header, buffer = incoming.receive()
            assert header.tick == item
            for found, sent in zip(LAYOUT.read(buffer, SHAPES), parts(item), strict=True):
                assert torch.equal(found, sent) and found.data_ptr() % 64 == 0
    assert outgoing.bytes_sent == 30 * LAYOUT.num_bytes


def test_a_buffer_in_use_is_not_written_before_the_next_receive():
    outgoing, incoming = pair(depth=2)
    for item in range(2):
        outgoing.send(Header(Kind.WORK, item), parts(item))
    _, buffer = incoming.receive()
    with pytest.raises(TransportError, match="rank 3: rank 4 took no message for 0.2 s"):
        outgoing.send(Header(Kind.WORK, 2), parts(2))
    assert torch.equal(LAYOUT.read(buffer, SHAPES)[1], parts(0)[1])
    incoming.receive()
    outgoing.send(Header(Kind.WORK, 2), parts(2))


def test_waiting_for_a_silent_peer_ends_by_its_deadline():
    _outgoing, incoming = pair(timeout_s=0.1)
    start = time.monotonic()
    with pytest.raises(TransportError, match="rank 4: rank 3 sent nothing for 0.1 s") as caught:
        incoming.receive()
    assert caught.value.peer == 3 and time.monotonic() - start < 5


def test_a_dead_peer_is_known_at_once():
    outgoing, incoming = pair(timeout_s=60)
    os.close(outgoing._ready)
    os.close(outgoing._free)
    with pytest.raises(TransportError, match="rank 4: lost rank 3"):
        incoming.receive()
    outgoing, incoming = pair(timeout_s=60)
    for pipe in (incoming._ready, incoming._free):
        os.close(pipe)
    with pytest.raises(TransportError, match="rank 3: lost rank 4"):
        outgoing.send(Header(Kind.IDLE))


def test_an_offer_from_another_kernel_or_namespace_is_not_opened():
    incoming = SharedIncoming(LAYOUT, rank=1, peer=0, depth=2, timeout_s=1)
    elsewhere = "another-boot-id " + incoming.offer().split(maxsplit=1)[1]
    with pytest.raises(OSError, match="rank 1 runs where rank 0 does not see its process"):
        SharedOutgoing(LAYOUT, elsewhere, rank=0, peer=1, depth=2, timeout_s=1)


def gloo_rank(rank: int, port: Any, results: Any, what: str) -> None:
    from vidgen.parallel.torch_links import GlooIncoming, GlooOutgoing, connect, listen

    door = listen("127.0.0.1") if rank == 0 else None
    if door is not None:
        port.put(door.getsockname()[1])
    meet_at = ("127.0.0.1", port.get(timeout=60) if rank else door.getsockname()[1])  # type: ignore[union-attr]
    connect(rank, 2, meet_at, door, own_host="127.0.0.1", timeout_s=60, device=torch.device("cpu"))
    ends = {"rank": rank, "peer": 1 - rank, "tag": 1, "depth": 2}
    if rank == 0:
        outgoing = GlooOutgoing(LAYOUT, timeout_s=30, **ends)
        for item in range(9):
            outgoing.send(Header(Kind.WORK, item), parts(item))
        outgoing.flush()
        if what == "die":
            os._exit(9)
        time.sleep(60)  # stay, silent
        return
    incoming = GlooIncoming(LAYOUT, timeout_s=2 if what == "silence" else 30, **ends)
    for item in range(9):
        header, buffer = incoming.receive()
        same = all(torch.equal(a, b) for a, b in zip(LAYOUT.read(buffer, SHAPES), parts(item), strict=True))
        results.put((header.tick, same))
    start = time.monotonic()
    try:
        incoming.receive()
    except TransportError as error:
        results.put((str(error), error.peer, time.monotonic() - start))
    results.close()
    results.join_thread()  # a queue writes in a thread of its own
    os._exit(0)


@pytest.mark.parametrize(
    ("what", "says"), [("silence", "rank 0 sent nothing for 2 s"), ("die", "lost rank 0")]
)
def test_gloo_keeps_order_and_bits_and_names_a_peer_that_is_silent_or_dies(what: str, says: str):
    context = multiprocessing.get_context("spawn")
    port, results = context.Queue(), context.Queue()
    target: Callable[..., None] = gloo_rank
    processes = [context.Process(target=target, args=(rank, port, results, what)) for rank in range(2)]
    for process in processes:
        process.start()
    try:
        for item in range(9):
            assert results.get(timeout=120) == (item, True)
        message, peer, seconds = results.get(timeout=60)
        assert says in message and message.startswith("rank 1: ") and peer == 0 and seconds < 20
    finally:
        for process in processes:
            process.kill()
            process.join(30)
