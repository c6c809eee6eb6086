"""Messages between two processes of one machine, and what one holds of a GPU."""

import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist

from vidgen.parallel.lanes.exchange import Exchange
from vidgen.parallel.lanes.shared_exchange import open_shared_wire
from vidgen.parallel.planner.hardware import LinkRate
from vidgen.parallel.shared_links import SharedIncoming, SharedOutgoing
from vidgen.parallel.transport import Header, Kind, MessageLayout

SMALL, LARGE = 64, 2**20  # numbers of a message
EXCHANGED, ROW = 2**18, 32  # of a layer's exchange, and of what lies together in it
ROUNDS = 40
DEADLINE_S = 120.0
ENDS = {"rank": 0, "peer": 1, "depth": 2, "timeout_s": DEADLINE_S}


def link_rates() -> tuple[LinkRate, LinkRate, LinkRate]:
    """Between two processes of this machine: (of a link in shared memory, of an exchange there, of gloo)."""
    shared = _together(_shared_end, 2)[0]
    with tempfile.TemporaryDirectory() as folder:
        swapped = _together(_swapping_end, 2, f"{folder}/swapped")[0]
        gloo = _together(_gloo_end, 2, f"file://{folder}/store")[0]
    return _as_rate(shared, LARGE), _as_rate(swapped, EXCHANGED), _as_rate(gloo, LARGE)


def gpu_process_bytes() -> int:
    """What a process holds of the GPU's memory before anything of a model, on a card of its own."""
    factor = torch.ones(64, 64, device="cuda", dtype=torch.bfloat16)
    torch.nn.functional.linear(factor, factor)  # buffers that a first product brings
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    return total - free


def _as_rate(taken: tuple[float, float], large: int) -> LinkRate:
    small_s, large_s = taken
    return LinkRate(small_s, 4 * (large - SMALL) / max(large_s - small_s, 1e-9))


def _together(action: Callable[..., Any], count: int, *given: Any) -> list[Any]:
    """What each of `count` processes gives back; they begin at about the same time."""
    context = multiprocessing.get_context("spawn")
    pipes = [context.Pipe() for _ in range(count)]
    processes = [
        context.Process(target=_in_process, args=(action, index, pipe[1], *given), daemon=True)
        for index, pipe in enumerate(pipes)
    ]
    try:
        for process, (_, theirs) in zip(processes, pipes, strict=True):
            process.start()
            theirs.close()  # else its death would not be seen
        ends = [pipe[0] for pipe in pipes]
        for name in ("ready", "begin"):
            said = [_receive(end) for end in ends]
            for index, end in enumerate(ends):
                end.send(said[(index + 1) % count])  # what its peer said
            assert all(word is not None for word in said), name
        return [_receive(end) for end in ends]
    finally:
        for process in processes:
            process.kill()
            process.join()


def _receive(end: Connection) -> Any:
    if not end.poll(DEADLINE_S):
        raise TimeoutError(f"a process of the bench gave no answer for {DEADLINE_S:g} s")
    try:
        return end.recv()
    except EOFError as error:
        raise RuntimeError("a process of the bench died; what it said is above") from error


def _in_process(action: Callable[..., Any], index: int, pipe: Connection, *given: Any) -> None:
    torch.set_num_threads(1)

    def swap(word: Any) -> Any:
        """The peer's word for ours."""
        pipe.send(word)
        return _receive(pipe)

    pipe.send(action(index, swap, *given))
    pipe.poll(DEADLINE_S)  # until killed: the peer may still need this process


def _in_order(index: int, swap: Callable[[Any], Any]) -> tuple[int, int]:
    """(own number, the peer's)."""
    peer = swap(index)
    swap(0)
    return index, peer


def _shared_end(index: int, swap: Callable[[Any], Any]) -> tuple[float, float]:
    layout = MessageLayout((LARGE,), torch.float32)
    incoming = SharedIncoming(layout, **ENDS)
    outgoing = SharedOutgoing(layout, swap(incoming.offer()), **ENDS)
    swap(0)
    incoming.begin()
    taken = []
    for size in (SMALL, LARGE):
        tensor = torch.zeros(size)
        with _rounds(taken) as rounds:
            for _ in rounds:
                if index == 0:
                    outgoing.send(Header(Kind.WORK), (tensor,))
                _, buffer = incoming.receive()
                layout.read(buffer, ((size,),))[0].sum() if size == SMALL else None
                if index == 1:
                    outgoing.send(Header(Kind.WORK), (tensor,))
    return taken[0], taken[1]


def _swapping_end(index: int, swap: Callable[[Any], Any], place: str) -> tuple[float, float]:
    """Both send and take at once, what lies in parts of a tensor, as lanes that share heads do."""
    swap(0)
    swap(0)
    store = dist.FileStore(place, 2)
    wire = open_shared_wire(index, (0, 1), store, tag=0, timeout_s=DEADLINE_S)
    assert wire is not None, "two processes of one machine"
    exchange, taken = Exchange(index, 2, wire), []
    for size in (SMALL, EXCHANGED):
        tensor = torch.zeros(size // ROW, 2, ROW)
        with _rounds(taken, messages=1) as rounds:
            for _ in rounds:
                parts = [tensor[:, member] for member in range(2)]
                torch.cat(exchange.swap(parts, [parts[0].shape] * 2))
    wire.close()
    return taken[0], taken[1]


def _gloo_end(index: int, swap: Callable[[Any], Any], store: str) -> tuple[float, float]:
    swap(0)
    swap(0)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "gloo", init_method=store, rank=index, world_size=2, timeout=timedelta(seconds=DEADLINE_S)
    )
    taken = []
    for size in (SMALL, LARGE):
        tensor = torch.zeros(size)
        with _rounds(taken) as rounds:
            for _ in rounds:
                for turn in (0, 1):
                    (dist.send if turn == index else dist.recv)(tensor, 1 - index)
    return taken[0], taken[1]


@contextmanager
def _rounds(taken: list[float], messages: int = 2) -> Iterator[Iterator[int]]:
    """Rounds of there and back; the seconds of a message, in the middle one, are added to `taken`."""
    stamps = []

    def rounds() -> Iterator[int]:
        for number in range(ROUNDS):
            stamps.append(time.perf_counter())
            yield number
        stamps.append(time.perf_counter())

    yield rounds()
    trips = [after - before for before, after in zip(stamps, stamps[1:], strict=False)]
    taken.append(statistics.median(trips) / messages)
