"""Links between two ranks of one node through shared memory: a message costs a copy and a byte in a pipe.

The receiver makes the memory and two pipes; the sender opens them through /proc, so that nothing has a name
that could outlive the processes. When either end dies the kernel closes its pipes and the other knows.
"""

import mmap
import os
import select
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vidgen.parallel.transport import (
    Header,
    MessageLayout,
    TransportError,
    late,
    write_message,
)

PAGE_BYTES = 4096
READY, FREE = b"r", b"f"


class SharedIncoming:
    """The receiving end; made before the sending one. See transport.Incoming."""

    def __init__(self, layout: MessageLayout, *, rank: int, peer: int, depth: int, timeout_s: float) -> None:
        self._layout, self.rank, self.peer, self.timeout_s = layout, rank, peer, timeout_s
        self._memory = os.memfd_create("vidgen-link", os.MFD_CLOEXEC)
        self._buffers = _map(self._memory, layout, depth)
        self._ready, self._ready_in = os.pipe()
        self._free_out, self._free = os.pipe()
        self._next, self._is_in_use = 0, False

    @property
    def layout(self) -> MessageLayout:
        return self._layout

    def offer(self) -> str:
        """What the sender needs to open its end."""
        return f"{processes_seen()} {os.getpid()} {self._memory} {self._ready_in} {self._free_out}"

    def begin(self) -> None:
        """The sender has opened its ends: ours of the same are closed, so that its death is seen."""
        os.close(self._ready_in)
        os.close(self._free_out)

    def receive(self) -> tuple[Header, Tensor]:
        if self._is_in_use:
            with suppress(BrokenPipeError):  # a sender that is done wants no room; what it sent is here
                os.write(self._free, FREE)
        _take(self._ready, 1, self.rank, self.peer, "sent nothing", self.timeout_s)
        slot, self._next = self._next, (self._next + 1) % len(self._buffers)
        self._is_in_use = True
        return self._layout.read_header(self._buffers[slot]), self._buffers[slot]

    def close(self) -> None:
        self._buffers = []
        for descriptor in (self._memory, self._ready, self._free):
            os.close(descriptor)


class SharedOutgoing:
    """The sending end, opened from a receiver's offer. See transport.Outgoing.

    OSError when the receiver is not on this node.
    """

    def __init__(
        self, layout: MessageLayout, offer: str, *, rank: int, peer: int, depth: int, timeout_s: float
    ) -> None:
        self.layout, self.rank, self.peer, self.timeout_s = layout, rank, peer, timeout_s
        processes, pid, memory, ready, free = offer.split()
        if processes != processes_seen():
            raise ProcessLookupError(f"rank {peer} runs where rank {rank} does not see its process")
        descriptor = os.open(f"/proc/{pid}/fd/{memory}", os.O_RDWR)
        self._buffers = _map(descriptor, layout, depth)
        os.close(descriptor)
        self._ready = os.open(f"/proc/{pid}/fd/{ready}", os.O_WRONLY)
        self._free = os.open(f"/proc/{pid}/fd/{free}", os.O_RDONLY)
        self._num_free, self._next = depth, 0
        self.bytes_sent = 0

    def send(self, header: Header, parts: Sequence[Tensor] = ()) -> None:
        self._wait_for_free(1)
        slot, self._next = self._next, (self._next + 1) % len(self._buffers)
        write_message(self.layout, self._buffers[slot], header, parts)
        self._num_free -= 1
        put_word(self._ready, READY, self.rank, self.peer)
        self.bytes_sent += self.layout.num_bytes

    def flush(self) -> None:
        """Everything sent lies in memory that the receiver holds: there is nothing to wait for."""

    def close(self) -> None:
        self._buffers = []
        os.close(self._ready)
        os.close(self._free)

    def _wait_for_free(self, least: int) -> None:
        while self._num_free < least:
            self._num_free += _take(
                self._free, len(self._buffers), self.rank, self.peer, "took no message", self.timeout_s
            )


def processes_seen() -> str:
    """What tells whose process numbers these are: the running kernel and the namespace."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")


def _map(descriptor: int, layout: MessageLayout, depth: int) -> list[Tensor]:
    """The link's buffers, each at a page of its own."""
    stride = -(-layout.num_bytes // PAGE_BYTES) * PAGE_BYTES
    if os.fstat(descriptor).st_size < stride * depth:
        os.ftruncate(descriptor, stride * depth)
    memory: Any = mmap.mmap(descriptor, stride * depth)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    return [whole[slot * stride : slot * stride + layout.num_bytes] for slot in range(depth)]


def put_word(pipe: int, word: bytes, rank: int, peer: int) -> None:
    """Never blocks: a pipe holds far more bytes than a link has buffers. TransportError when nobody reads."""
    try:
        os.write(pipe, word)
    except OSError as error:
        raise TransportError(f"rank {rank}: lost rank {peer}: {error.strerror}", peer) from error


def take_word(pipe: int, most: int, rank: int, peer: int) -> bytes:
    """What there is, which is something. TransportError when the peer is gone."""
    word = os.read(pipe, most)
    if not word:
        raise TransportError(f"rank {rank}: lost rank {peer}: it closed the link", peer)
    return word


def _take(pipe: int, most: int, rank: int, peer: int, what: str, timeout_s: float) -> int:
    """How many bytes there are, at least one."""
    if not select.select([pipe], [], [], timeout_s)[0]:
        raise late(rank, what, peer, timeout_s)
    return len(take_word(pipe, most, rank, peer))
