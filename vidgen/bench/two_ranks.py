"""What processes of one machine do to each other: messages between two, and cores that several share."""

import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist

from vidgen.parallel.memory import peak_memory_bytes
from vidgen.parallel.planner.hardware import LinkRate
from vidgen.parallel.shared_links import SharedIncoming, SharedOutgoing
from vidgen.parallel.transport import Header, Kind, MessageLayout

SMALL, LARGE = 16, 2**20  # numbers of a message
ROUNDS = 40
DEADLINE_S = 120.0
TURNS, TURN_S = 10, 0.4
FRAMES_OF_WORK, NUM_LAYERS = 16, 8  # a round's tokens and weights are more than a core's own cache
ENDS = {"rank": 0, "peer": 1, "depth": 2, "timeout_s": DEADLINE_S}


def link_rates() -> tuple[LinkRate, LinkRate]:
    """(through shared memory, through gloo) between two processes of this machine."""
    shared = _together(_shared_end, 2)[0]
    with tempfile.TemporaryDirectory() as folder:
        gloo = _together(_gloo_end, 2, f"file://{folder}/store")[0]
    return _as_rate(*shared), _as_rate(*gloo)


def process_bytes() -> int:
    """What a rank's process holds before it has loaded anything of a model."""
    return _together(_memory, 1)[0]


def measured_busy(cores: int, width: int, hidden: int, tokens: int) -> tuple[tuple[float, float], ...]:
    """(processes at work, how much slower each is): by the clock up to the number of cores, shared beyond.

    The work is what a model's layers are made of, at their sizes. Numbers of processes take turns, many
    times: which cores share what may change from one second to the next where a machine is a virtual one.
    """
    counts = sorted({1, min(2, cores), cores})
    found = _together(_work, cores, counts, width, hidden, tokens)
    taken = [max(of_process[turn] for of_process in found) for turn in range(len(counts))]
    rising: list[tuple[float, float]] = []
    for count, seconds in zip(counts, taken, strict=True):
        least = rising[-1][1] if rising else 1.0
        rising.append((float(count), max(least, seconds / taken[0])))
    count, factor = rising[-1]
    return (*rising, (2 * count, 2 * factor))


def _as_rate(small_s: float, large_s: float) -> LinkRate:
    return LinkRate(small_s, 4 * (LARGE - SMALL) / max(large_s - small_s, 1e-9))


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


def _memory(_: int, swap: Callable[[Any], Any]) -> int:
    import vidgen.parallel.actors  # noqa: F401 - what a rank's process imports

    torch.nn.functional.linear(torch.ones(64, 64), torch.ones(64, 64))  # buffers that a first product brings
    swap(0)
    swap(0)
    return peak_memory_bytes()


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
def _rounds(taken: list[float]) -> Iterator[Iterator[int]]:
    """Rounds of there and back; the seconds of a message, of the quickest fourth, are added to `taken`."""
    stamps = []

    def rounds() -> Iterator[int]:
        for number in range(ROUNDS):
            stamps.append(time.perf_counter())
            yield number
        stamps.append(time.perf_counter())

    yield rounds()
    trips = sorted(after - before for before, after in zip(stamps, stamps[1:], strict=False))
    quick = trips[: len(trips) // 4]
    taken.append(sum(quick) / len(quick) / 2)


def _work(
    index: int, swap: Callable[[Any], Any], counts: Sequence[int], width: int, hidden: int, tokens: int
) -> list[float]:
    """Seconds of a round of what ranks do most: products of matrices and passes over memory.

    For each number of processes at work; 0 where this one is not among them.
    """
    x = torch.randn(FRAMES_OF_WORK * tokens, width)
    layers = [
        (torch.randn(hidden, width) / width, torch.randn(width, hidden) / hidden) for _ in range(NUM_LAYERS)
    ]
    swap(0)
    swap(0)
    began, rounds, taken = time.monotonic(), [0] * len(counts), [0.0] * len(counts)
    for slot in range(TURNS * len(counts)):
        turn, end = slot % len(counts), began + (slot + 1) * TURN_S
        before = time.monotonic()
        if index >= counts[turn]:
            time.sleep(max(0.0, end - before))
            continue
        while time.monotonic() < end:
            for up, down in layers:
                y = torch.nn.functional.layer_norm(x, (width,))
                y = torch.nn.functional.gelu(y @ up.T, approximate="tanh") @ down.T
                x = (x + y) * 0.999
            rounds[turn] += 1
        taken[turn] += time.monotonic() - before
    return [seconds / max(number, 1) for seconds, number in zip(taken, rounds, strict=True)]
