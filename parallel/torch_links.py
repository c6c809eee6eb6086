"""Links over torch.distributed: gloo between CPUs; between GPUs NCCL, with headers by gloo.

Receives are posted ahead, sends are asynchronous, and no handle is dropped: a buffer is used again only after
the operation on it has ended.
"""

import fcntl
import os
import socket
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from vidgen.parallel.transport import (
    HEADER_BYTES,
    Header,
    Kind,
    MessageLayout,
    TransportError,
    late,
    write_message,
)

FORWARD_TAG, BACK_TAG = 1, 2
SIOCGIFADDR = 0x8915  # linux/sockios.h: the address of an interface


@dataclass(frozen=True)
class Groups:
    """A rank's connections. On GPUs the two directions need communicators of their own, or they wait for
    each other."""

    rank: int
    num_ranks: int
    store: dist.Store  # where ranks can leave words for each other
    forward: Any = None  # NCCL groups; None on CPUs
    back: Any = None


def listen(host: str) -> socket.socket:
    """A listening socket on a free port of one address, for the first rank's store."""
    return socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET)


def interface_of(address: str) -> str | None:
    """The name of the network interface that has this IPv4 address; None when it cannot be told."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                found = fcntl.ioctl(probe.fileno(), SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            except OSError:
                continue  # an interface without an IPv4 address
            if socket.inet_ntoa(found[20:24]) == address:
                return name
    return None


def connect(
    rank: int, num_ranks: int, meet_at: tuple[str, int], door: socket.socket | None, *, own_host: str,
    timeout_s: float, device: torch.device,
) -> Groups:  # fmt: skip
    """Meet the other ranks at the first one's address; `door` is its listening socket there.

    `own_host` is the address of this rank's node: gloo listens on its interface only. TransportError when not
    all have come in time.
    """
    timeout = timedelta(seconds=timeout_s)
    host, port = meet_at
    interface = interface_of(own_host)
    if interface is not None:  # else gloo takes what the host name resolves to
        os.environ["GLOO_SOCKET_IFNAME"] = interface
    try:
        # the store takes the descriptor over
        listening: dict[str, Any] = {"master_listen_fd": door.detach()} if door is not None else {}
        store = dist.TCPStore(
            host, port, num_ranks, is_master=rank == 0, timeout=timeout, wait_for_workers=False, **listening
        )
        dist.init_process_group("gloo", store=store, rank=rank, world_size=num_ranks, timeout=timeout)
        if device.type != "cuda":
            return Groups(rank, num_ranks, store)
        forward, back = (dist.new_group(backend="nccl", timeout=timeout) for _ in range(2))
        return Groups(rank, num_ranks, store, forward, back)
    except (RuntimeError, OSError) as error:
        raise TransportError(
            f"rank {rank}: could not meet the others at {host}:{port}: {_brief(error)}", 0
        ) from error


def word_of(store: dist.Store, key: str, rank: int, peer: int, timeout_s: float) -> str:
    """What another rank has left under the key. TransportError when it does not in time."""
    try:
        store.wait([key], timedelta(seconds=timeout_s))
        return store.get(key).decode()
    except RuntimeError as error:
        raise TransportError(f"rank {rank}: rank {peer} did not open its links", peer) from error


def disconnect() -> None:
    """Leave the others."""
    if dist.is_initialized():
        dist.destroy_process_group()


class GlooOutgoing:
    """Sends whole buffers of host memory. See transport.Outgoing."""

    def __init__(
        self, layout: MessageLayout, *, rank: int, peer: int, tag: int, depth: int, timeout_s: float
    ) -> None:
        self.layout, self.rank, self.peer, self.tag, self.timeout_s = layout, rank, peer, tag, timeout_s
        self.bytes_sent = 0
        self._group = world()
        self._buffers = [torch.zeros(layout.num_bytes, dtype=torch.uint8) for _ in range(depth)]
        self._handles: list[dist.Work | None] = [None] * depth
        self._next = 0

    def send(self, header: Header, parts: Sequence[Tensor] = ()) -> None:
        slot, self._next = self._next, (self._next + 1) % len(self._buffers)
        self._wait(slot)
        write_message(self.layout, self._buffers[slot], header, parts)
        with naming(self.rank, self.peer):
            self._handles[slot] = self._group.send([self._buffers[slot]], self.peer, self.tag)
        self.bytes_sent += self.layout.num_bytes

    def flush(self) -> None:
        for slot in range(len(self._handles)):
            self._wait(slot)

    def close(self) -> None:
        pass  # see `disconnect`

    def _wait(self, slot: int) -> None:
        handle, self._handles[slot] = self._handles[slot], None
        if handle is not None:
            _wait(handle, self.rank, self.peer, "took no message", self.timeout_s)


class GlooIncoming:
    """Receives into buffers of host memory, all posted ahead. See transport.Incoming."""

    def __init__(
        self, layout: MessageLayout, *, rank: int, peer: int, tag: int, depth: int, timeout_s: float
    ) -> None:
        self._layout, self.rank, self.peer, self.tag, self.timeout_s = layout, rank, peer, tag, timeout_s
        self._group = world()
        self._buffers = [torch.zeros(layout.num_bytes, dtype=torch.uint8) for _ in range(depth)]
        self._handles = [self._post(buffer) for buffer in self._buffers]
        self._next = 0
        self._in_use: int | None = None

    @property
    def layout(self) -> MessageLayout:
        return self._layout

    def receive(self) -> tuple[Header, Tensor]:
        if self._in_use is not None:
            self._handles[self._in_use] = self._post(self._buffers[self._in_use])
        slot, self._next = self._next, (self._next + 1) % len(self._buffers)
        _wait(self._handles[slot], self.rank, self.peer, "sent nothing", self.timeout_s)
        self._in_use = slot
        return self._layout.read_header(self._buffers[slot]), self._buffers[slot]

    def close(self) -> None:
        pass  # see `disconnect`

    def _post(self, buffer: Tensor) -> dist.Work:
        with naming(self.rank, self.peer):
            return self._group.recv([buffer], self.peer, self.tag)


class NcclOutgoing:
    """Sends parts from device memory by NCCL, and before them the header by gloo.

    Waiting for a send makes the device's stream wait, not the host.
    """

    def __init__(
        self, layout: MessageLayout, group: Any, device: torch.device, *, rank: int, peer: int, tag: int,
        depth: int, timeout_s: float,
    ) -> None:  # fmt: skip
        self.layout, self.group, self.peer = layout, group, peer
        header = MessageLayout((), layout.dtype)
        self._headers = GlooOutgoing(header, rank=rank, peer=peer, tag=tag, depth=depth, timeout_s=timeout_s)
        self._buffers = [
            torch.zeros(layout.num_bytes, dtype=torch.uint8, device=device) for _ in range(depth)
        ]
        self._handles: list[dist.Work | None] = [None] * depth
        self._next = 0
        self.bytes_sent = 0

    def send(self, header: Header, parts: Sequence[Tensor] = ()) -> None:
        self._headers.send(header)
        self.bytes_sent += HEADER_BYTES
        if header.kind != Kind.WORK:
            return
        slot, self._next = self._next, (self._next + 1) % len(self._buffers)
        handle = self._handles[slot]
        if handle is not None:
            handle.wait()
        self.layout.write_parts(self._buffers[slot], parts)
        self._handles[slot] = dist.isend(self._buffers[slot], self.peer, group=self.group)
        self.bytes_sent += self.layout.num_bytes

    def flush(self) -> None:
        self._headers.flush()
        for handle in self._handles:
            if handle is not None:
                handle.wait()

    def close(self) -> None:
        pass  # see `disconnect`


class NcclIncoming:
    """The receiving end of NcclOutgoing: the device receive is posted when its header is here.

    The host runs ahead of the device, so that is early enough to overlap with the item before.
    """

    def __init__(
        self, layout: MessageLayout, group: Any, device: torch.device, *, rank: int, peer: int, tag: int,
        depth: int, timeout_s: float,
    ) -> None:  # fmt: skip
        self._layout, self.group, self.peer = layout, group, peer
        header = MessageLayout((), layout.dtype)
        self._headers = GlooIncoming(header, rank=rank, peer=peer, tag=tag, depth=depth, timeout_s=timeout_s)
        self._buffers = [
            torch.zeros(layout.num_bytes, dtype=torch.uint8, device=device) for _ in range(depth)
        ]
        self._next = 0

    @property
    def layout(self) -> MessageLayout:
        return self._layout

    def receive(self) -> tuple[Header, Tensor]:
        header, _ = self._headers.receive()
        if header.kind != Kind.WORK:
            return header, self._buffers[self._next]
        slot, self._next = self._next, (self._next + 1) % len(self._buffers)
        handle = dist.irecv(self._buffers[slot], self.peer, group=self.group)
        assert handle is not None
        handle.wait()
        return header, self._buffers[slot]

    def close(self) -> None:
        pass  # see `disconnect`


def world() -> dist.ProcessGroup:
    """All ranks. Called directly, it takes half the time of dist.isend and dist.irecv."""
    assert dist.group.WORLD is not None
    return dist.group.WORLD


def _wait(handle: dist.Work, rank: int, peer: int, what: str, timeout_s: float) -> None:
    try:
        handle.wait(timedelta(seconds=timeout_s))
    except RuntimeError as error:
        if "imed out" in str(error):
            raise late(rank, what, peer, timeout_s) from error
        raise lost(rank, peer, error) from error


class naming:
    """Within, gloo's errors become TransportError that names both ranks."""

    def __init__(self, rank: int, peer: int) -> None:
        self.rank, self.peer = rank, peer

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, RuntimeError) and not isinstance(error, TransportError):
            raise lost(self.rank, self.peer, error) from error


def lost(rank: int, peer: int, error: BaseException) -> TransportError:
    return TransportError(f"rank {rank}: lost rank {peer}: {_brief(error)}", peer)


def _brief(error: BaseException) -> str:
    """The last sentence of gloo's message, without the place in its sources."""
    return str(error).splitlines()[0].split("] ")[-1][:200] if str(error) else type(error).__name__
