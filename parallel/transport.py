"""Messages between two stages: one shape per link, preallocated buffers, several in flight, deadlines.

A message is a header of eight integers and the tensors of one item, each at a multiple of 64 bytes. Its size
never changes, so a receiver can post its buffers before it knows what will come; who computes what follows
from the timetable on each rank, and the header only proves that both sides agree.
"""

import math
import queue
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

HEADER_BYTES = 64
ALIGNMENT_BYTES = 64


class TransportError(RuntimeError):
    """A peer is gone or late. `peer` is its rank."""

    def __init__(self, message: str, peer: int) -> None:
        super().__init__(message)
        self.peer = peer


class Kind(IntEnum):
    WORK = 0  # an item
    IDLE = 1  # nothing yet, but I am here: deadlines start anew
    STOP = 2  # no tick from this one on will be run
    SKIP = 3  # in an item's place: none of its forward's runs will come


class Header(NamedTuple):
    """What a message is about. `slot` is a clock of items, see slots.py."""

    kind: Kind
    tick: int = 0
    block: int = 0
    step: int = 0
    run: int = 0
    slot: int = 0

    def same_item(self, other: "Header") -> bool:
        return self[:5] == other[:5]


@dataclass(frozen=True, slots=True)
class Message:
    """A header and its tensors, which are views of a buffer: valid until the next `receive`."""

    header: Header
    parts: tuple[Tensor, ...]


@dataclass(frozen=True)
class MessageLayout:
    """Where the parts of a link's messages lie. Every part has at most this many elements."""

    sizes: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return HEADER_BYTES + sum(self._room(size) for size in self.sizes)

    def write(self, buffer: Tensor, header: Header, parts: Sequence[Tensor]) -> None:
        """Fill a buffer [num_bytes] of uint8."""
        buffer[:HEADER_BYTES].view(torch.int64)[: len(header)] = torch.tensor(header)
        self.write_parts(buffer, parts)

    def write_parts(self, buffer: Tensor, parts: Sequence[Tensor]) -> None:
        """Fill all but the header."""
        for place, part in zip(self._places(buffer), parts, strict=True):
            place[: part.numel()].view(part.shape).copy_(part)

    def read_header(self, buffer: Tensor) -> Header:
        kind, *numbers = buffer[:HEADER_BYTES].view(torch.int64)[: len(Header._fields)].tolist()
        return Header(Kind(kind), *numbers)

    def read(self, buffer: Tensor, shapes: Sequence[Sequence[int]]) -> tuple[Tensor, ...]:
        """The parts as views of the buffer, in these shapes."""
        places = self._places(buffer)
        return tuple(
            place[: math.prod(shape)].view(tuple(shape)) for place, shape in zip(places, shapes, strict=True)
        )

    def _room(self, size: int) -> int:
        return -(-size * self.dtype.itemsize // ALIGNMENT_BYTES) * ALIGNMENT_BYTES

    def _places(self, buffer: Tensor) -> list[Tensor]:
        places, start = [], HEADER_BYTES
        for size in self.sizes:
            places.append(buffer[start : start + size * self.dtype.itemsize].view(self.dtype))
            start += self._room(size)
        return places


class Outgoing(Protocol):
    """The sending end of a link."""

    bytes_sent: int

    def send(self, header: Header, parts: Sequence[Tensor] = ()) -> None:
        """Hand a message over without waiting for the receiver, unless all buffers are in flight.

        TransportError when none gets free within the link's deadline. Only a WORK message has parts.
        """
        ...

    def flush(self) -> None:
        """Wait until everything has been taken. TransportError after the deadline."""
        ...

    def close(self) -> None:
        """Give back what the operating system lent."""
        ...


class Incoming(Protocol):
    """The receiving end of a link."""

    def receive(self) -> tuple[Header, Tensor]:
        """The next message's header and buffer, which stays valid until the next call.

        TransportError after the link's deadline.
        """
        ...

    @property
    def layout(self) -> MessageLayout: ...

    def close(self) -> None:
        """Give back what the operating system lent."""
        ...


class InProcessLink:
    """Both ends of a link between two threads; for tests, and as the plainest statement of what a link is."""

    def __init__(
        self,
        layout: MessageLayout,
        *,
        depth: int = 2,
        timeout_s: float = 60.0,
        ranks: tuple[int, int] = (0, 1),
    ) -> None:
        self._layout, self.timeout_s, self.ranks = layout, timeout_s, ranks
        self._queue: queue.Queue[Tensor] = queue.Queue(depth)
        self.bytes_sent = 0

    @property
    def layout(self) -> MessageLayout:
        return self._layout

    def send(self, header: Header, parts: Sequence[Tensor] = ()) -> None:
        buffer = torch.empty(self._layout.num_bytes, dtype=torch.uint8)
        write_message(self._layout, buffer, header, parts)
        try:
            self._queue.put(buffer, timeout=self.timeout_s)
        except queue.Full as error:
            raise late(self.ranks[0], "took no message", self.ranks[1], self.timeout_s) from error
        self.bytes_sent += self._layout.num_bytes

    def receive(self) -> tuple[Header, Tensor]:
        try:
            buffer = self._queue.get(timeout=self.timeout_s)
        except queue.Empty as error:
            raise late(self.ranks[1], "sent nothing", self.ranks[0], self.timeout_s) from error
        return self._layout.read_header(buffer), buffer

    def flush(self) -> None:
        pass  # a queue holds what was put into it

    def close(self) -> None:
        pass


def write_message(layout: MessageLayout, buffer: Tensor, header: Header, parts: Sequence[Tensor]) -> None:
    """Fill a buffer; a message that is no work has a header only."""
    if header.kind == Kind.WORK:
        layout.write(buffer, header, parts)
    else:
        assert not parts, "only work has parts"
        MessageLayout((), layout.dtype).write(buffer, header, ())


def late(rank: int, what: str, peer: int, timeout_s: float) -> TransportError:
    """The error of a rank that waited in vain."""
    return TransportError(f"rank {rank}: rank {peer} {what} for {timeout_s:g} s", peer)
