"""What ranks that share a forward's work say to each other: all-to-all, all-gather, and a ring.

Everyone knows the shapes of what will come, so messages are bare numbers, and what is empty is not sent. All
members make the same calls in the same order.
"""

import math
import queue
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from vidgen.parallel.transport import late

Shape = Sequence[int]


class Wire(Protocol):
    """Carries tensors between members, who are known by their index."""

    def begin(self, outgoing: Mapping[int, Tensor], incoming: Mapping[int, Tensor]) -> Callable[[], None]:
        """Begin to send contiguous tensors to members and to fill others with what they send.

        Calling what comes back waits for both; until then none of them may be touched. TransportError that
        names the member who is late or gone, after the wire's deadline at the latest.
        """
        ...

    def close(self) -> None:
        """Give back what the operating system lent."""
        ...


class Exchange:
    """A member's end. `index` is its own number among `size` members; a size of 1 sends nothing."""

    def __init__(self, index: int, size: int, wire: Wire | None) -> None:
        assert 0 <= index < size and (wire is not None or size == 1)
        self.index, self.size, self.wire = index, size, wire
        self.bytes_sent = 0

    def swap(self, parts: Sequence[Tensor], shapes: Sequence[Shape]) -> list[Tensor]:
        """All-to-all: what each member sent here, of these shapes; part i goes to member i.

        One's own part comes back as it is. All have one dtype and device.
        """
        received = self.swap_groups([[part] for part in parts], [[shape] for shape in shapes])
        return [group[0] for group in received]

    def swap_groups(
        self, groups: Sequence[Sequence[Tensor]], shapes: Sequence[Sequence[Shape]]
    ) -> list[list[Tensor]]:
        """As `swap`, with several tensors for each member, which travel as one message."""
        assert len(groups) == len(shapes) == self.size
        like = groups[self.index][0]
        outgoing = {peer: _packed(groups[peer]) for peer in self._others()}
        incoming = {peer: _room(shapes[peer], like) for peer in self._others()}
        self._begin(outgoing, incoming)()
        return [
            list(groups[peer]) if peer == self.index else _unpacked(incoming[peer], shapes[peer])
            for peer in range(self.size)
        ]

    def gather(self, tensor: Tensor, shapes: Sequence[Shape]) -> list[Tensor]:
        """All-gather: every member's tensor, of these shapes."""
        assert tuple(tensor.shape) == tuple(shapes[self.index])
        whole = tensor.contiguous()  # once, not for each member
        received = self.swap([whole] * self.size, shapes)
        received[self.index] = tensor
        return received

    def turn(self, tensor: Tensor, shape: Shape) -> Callable[[], Tensor]:
        """Begin to hand a tensor to the next member of the ring and to take the previous one's.

        Calling what comes back waits for that, of the shape said; work before the call hides the transfer.
        Sending and taking are one call because neither may wait for the other on a GPU.
        """
        if self.size == 1:
            return lambda: tensor
        after, before = (self.index + 1) % self.size, (self.index - 1) % self.size
        buffer = _room([shape], tensor)
        wait = self._begin({after: _packed([tensor])}, {before: buffer})

        def taken() -> Tensor:
            wait()
            return buffer.view(*shape)

        return taken

    def close(self) -> None:
        """Give back what the operating system lent."""
        if self.wire is not None:
            self.wire.close()

    def _others(self) -> list[int]:
        return [peer for peer in range(self.size) if peer != self.index]

    def _begin(self, outgoing: dict[int, Tensor], incoming: dict[int, Tensor]) -> Callable[[], None]:
        outgoing, incoming = (
            {peer: buffer for peer, buffer in buffers.items() if buffer.numel()}
            for buffers in (outgoing, incoming)
        )
        if self.wire is None or not (outgoing or incoming):
            return lambda: None
        self.bytes_sent += sum(buffer.nbytes for buffer in outgoing.values())
        return self.wire.begin(outgoing, incoming)


class _Queues:
    """A wire between threads."""

    def __init__(
        self, index: int, ranks: Sequence[int], queues: Mapping[tuple[int, int], queue.Queue[Tensor]],
        timeout_s: float,
    ) -> None:  # fmt: skip
        self.index, self.ranks, self.queues, self.timeout_s = index, ranks, queues, timeout_s

    def begin(self, outgoing: Mapping[int, Tensor], incoming: Mapping[int, Tensor]) -> Callable[[], None]:
        for peer, buffer in outgoing.items():
            self.queues[self.index, peer].put(buffer.clone())
        return lambda: self._take(incoming)

    def close(self) -> None:
        """Nothing: threads have lent nothing."""

    def _take(self, incoming: Mapping[int, Tensor]) -> None:
        end = time.monotonic() + self.timeout_s
        for peer, buffer in incoming.items():
            try:
                sent = self.queues[peer, self.index].get(timeout=max(0.0, end - time.monotonic()))
            except queue.Empty as error:
                raise late(
                    self.ranks[self.index], "sent nothing", self.ranks[peer], self.timeout_s
                ) from error
            buffer.copy_(sent)


def in_process(ranks: Sequence[int], *, timeout_s: float = 60.0) -> tuple[Exchange, ...]:
    """The ends of an exchange between threads, one a rank; for tests, and as the plainest statement."""
    size = len(ranks)
    queues = {(a, b): queue.Queue[Tensor]() for a in range(size) for b in range(size)}
    return tuple(
        Exchange(index, size, _Queues(index, ranks, queues, timeout_s) if size > 1 else None)
        for index in range(size)
    )


def _packed(tensors: Sequence[Tensor]) -> Tensor:
    """All numbers of the tensors, one tensor after another. A contiguous one alone is not copied."""
    if len(tensors) == 1:
        return tensors[0].contiguous().view(-1)
    assert len({tensor.dtype for tensor in tensors}) == 1, "a message has one dtype"
    packed = tensors[0].new_empty(sum(tensor.numel() for tensor in tensors))
    for place, tensor in zip(_unpacked(packed, [tensor.shape for tensor in tensors]), tensors, strict=True):
        place.copy_(tensor)
    return packed


def _room(shapes: Sequence[Shape], like: Tensor) -> Tensor:
    return torch.empty(sum(math.prod(shape) for shape in shapes), dtype=like.dtype, device=like.device)


def _unpacked(packed: Tensor, shapes: Sequence[Shape]) -> list[Tensor]:
    """Views of these shapes."""
    sizes = [math.prod(shape) for shape in shapes]
    return [part.view(*shape) for part, shape in zip(packed.split(sizes), shapes, strict=True)]
