"""Exchanges between ranks of one node through shared memory: a message costs two copies and a word in a pipe.

As in shared_links.py the receiver makes the memory and the pipes and the sender opens them through /proc, so
that nothing has a name that could outlive the processes, and when either end dies the other one knows.
"""

import mmap
import os
import select
import struct
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from vidgen.parallel.shared_links import FREE, PAGE_BYTES, processes_seen, put_word, take_word
from vidgen.parallel.torch_links import word_of
from vidgen.parallel.transport import late

SLOTS = 2  # messages from one rank to another that are sent and not taken
LENGTH = struct.Struct("=q")


class SharedWire:
    """Carries host memory between processes that see each other. See exchange.Wire."""

    def __init__(self, rank: int, ends: Mapping[int, "_End"], timeout_s: float) -> None:
        self.rank, self.timeout_s = rank, timeout_s
        self._ends = dict(ends)  # by member

    def begin(self, outgoing: Mapping[int, Tensor], incoming: Mapping[int, Tensor]) -> Callable[[], None]:
        awaited = [
            (self._ends[member], self._ends[member].post(buffer)) for member, buffer in incoming.items()
        ]
        for member, buffer in outgoing.items():
            end = self._ends[member]
            self._until(lambda end=end: end.num_free > 0, end, "took no message")
            end.put(buffer)

        def wait() -> None:
            for end, number in awaited:
                self._until(lambda end=end, number=number: end.num_taken > number, end, "sent nothing")

        return wait

    def close(self) -> None:
        for end in self._ends.values():
            end.close()

    def _until(self, is_so: Callable[[], bool], end: "_End", what: str) -> None:
        """Take what comes, from whomever, until it is so: a peer may wait for room before it can send."""
        deadline = time.monotonic() + self.timeout_s
        while not is_so():
            watched = {pipe: act for each in self._ends.values() for pipe, act in each.awaited()}
            ready, _, _ = select.select(list(watched), [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise late(self.rank, what, end.peer, self.timeout_s)
            for pipe in ready:
                watched[pipe]()


def open_shared_wire(
    rank: int, ranks: Sequence[int], store: dist.Store, *, tag: int, timeout_s: float
) -> SharedWire | None:
    """A rank's wire to the others of `ranks`; None, for all of them, unless each sees all others' processes.

    TransportError when another one is not there in time.
    """
    group = f"wire/{tag}/{'-'.join(map(str, ranks))}"
    others = [peer for peer in ranks if peer != rank]
    ends = {peer: _End(rank, peer) for peer in others}
    for peer, end in ends.items():
        store.set(f"{group}/{rank}/{peer}", end.offer())
    answer = "shared"
    for peer, end in ends.items():
        offer = word_of(store, f"{group}/{peer}/{rank}", rank, peer, timeout_s)
        try:
            end.open(offer)
        except OSError:  # another node: there is no such process here
            answer = "apart"
    store.set(f"{group}/{rank}", answer)
    answers = {word_of(store, f"{group}/{peer}", rank, peer, timeout_s) for peer in others}
    if answers | {answer} == {"shared"}:
        for end in ends.values():
            end.begin()
        return SharedWire(rank, {ranks.index(peer): end for peer, end in ends.items()}, timeout_s)
    for end in ends.values():
        end.close()
    return None


class _Slot:
    """Memory of one message, which grows with the largest."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self._bytes = torch.empty(0, dtype=torch.uint8)

    def grown(self, num_bytes: int) -> Tensor:
        """The first bytes; for the sender, who has the slot to itself."""
        if num_bytes > len(self._bytes):
            os.ftruncate(self.descriptor, -(-num_bytes // PAGE_BYTES) * PAGE_BYTES)
        return self.seen(num_bytes)

    def seen(self, num_bytes: int) -> Tensor:
        if num_bytes > len(self._bytes):
            memory: Any = mmap.mmap(self.descriptor, os.fstat(self.descriptor).st_size)
            self._bytes = torch.frombuffer(memory, dtype=torch.uint8)
        return self._bytes[:num_bytes]


class _End:
    """One rank's end towards one peer: what it sends there and what it gets."""

    def __init__(self, rank: int, peer: int) -> None:
        self.rank, self.peer = rank, peer
        self._into = [_Slot(os.memfd_create("vidgen-wire", os.MFD_CLOEXEC)) for _ in range(SLOTS)]
        self._out: list[_Slot] = []
        self._ready, self._ready_in = os.pipe()
        self._free_out, self._free = os.pipe()
        self._own: set[int] = {self._ready, self._free}  # open for as long as the wire is
        self._lent: set[int] = {self._ready_in, self._free_out}  # that the peer opens
        self._posted: deque[Tensor] = deque()
        self.num_free, self._num_sent, self.num_taken = SLOTS, 0, 0

    def offer(self) -> str:
        """What the peer needs to send here."""
        memories = " ".join(str(slot.descriptor) for slot in self._into)
        return f"{processes_seen()} {os.getpid()} {self._ready_in} {self._free_out} {memories}"

    def open(self, offer: str) -> None:
        """Be able to send. OSError when the peer's process is not seen here."""
        processes, pid, ready, free, *memories = offer.split()
        if processes != processes_seen():
            raise ProcessLookupError(f"rank {self.peer} runs where rank {self.rank} does not see its process")

        def opened(descriptor: str, how: int) -> int:
            found = os.open(f"/proc/{pid}/fd/{descriptor}", how)
            self._own.add(found)
            return found

        self._out = [_Slot(opened(memory, os.O_RDWR)) for memory in memories]
        self._peer_ready, self._peer_free = opened(ready, os.O_WRONLY), opened(free, os.O_RDONLY)

    def begin(self) -> None:
        """The peer has opened its ends: ours of the same are closed, so that its death is seen."""
        while self._lent:
            os.close(self._lent.pop())

    def post(self, buffer: Tensor) -> int:
        """Have what comes next fill the buffer, after those posted before; its number."""
        self._posted.append(buffer)
        return self.num_taken + len(self._posted) - 1

    def put(self, buffer: Tensor) -> None:
        """Send; there is room."""
        sent = buffer.view(-1).view(torch.uint8)
        self._out[self._num_sent % SLOTS].grown(len(sent)).copy_(sent)
        self._num_sent, self.num_free = self._num_sent + 1, self.num_free - 1
        put_word(self._peer_ready, LENGTH.pack(len(sent)), self.rank, self.peer)

    def awaited(self) -> list[tuple[int, Callable[[], None]]]:
        """Pipes that may say something of use, and what is to be done then."""
        pipes: list[tuple[int, Callable[[], None]]] = []
        if self._posted:
            pipes.append((self._ready, self._take))
        if not self.num_free:
            pipes.append((self._peer_free, self._count_free))
        return pipes

    def close(self) -> None:
        self._posted.clear()
        slots = {slot.descriptor for slot in self._into}
        for descriptor in self._own | self._lent | slots:
            os.close(descriptor)
        self._own, self._lent, self._into, self._out = set(), set(), [], []

    def _take(self) -> None:
        word = take_word(self._ready, LENGTH.size, self.rank, self.peer)
        buffer = self._posted.popleft()
        wanted = buffer.view(-1).view(torch.uint8)
        (length,) = LENGTH.unpack(word)
        if length != len(wanted):
            raise AssertionError(
                f"rank {self.rank}: {length} bytes from rank {self.peer}, expected {len(wanted)}"
            )
        wanted.copy_(self._into[self.num_taken % SLOTS].seen(length))
        self.num_taken += 1
        with suppress(BrokenPipeError):  # a sender that is done wants no room; what it sent is here
            os.write(self._free, FREE)

    def _count_free(self) -> None:
        self.num_free += len(take_word(self._peer_free, SLOTS, self.rank, self.peer))
