"""A server of live sockets alone for tests: real sockets, files, store, feeds; chunks come when told to."""

import asyncio
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any, cast

import numpy as np
import uvicorn
from fastapi import FastAPI
from websockets.sync.client import ClientConnection

from tests.serve.sockets import DEADLINE_S, connected, resume, wait_until
from vidgen.media.segments import SegmentEncoder
from vidgen.serve.config import ServerConfig
from vidgen.serve.http.security import Keys, Origins, Tickets
from vidgen.serve.http.state import Server
from vidgen.serve.live.audience import Audience, Patience
from vidgen.serve.live.realtime import router
from vidgen.serve.records import Kind, Record, Status, make_id
from vidgen.serve.store import Store
from vidgen.serve.work.feeds import Feeds
from vidgen.serve.work.scheduler import Scheduler

MEBIBYTE = 2**20
FPS, FRAMES = 16, 16
EAGER = Patience(
    start_s=10, idle_s=60, socket_s=1.0, stall_s=60, load_s=60, grace_s=0.3, close_s=0.4, max_lag_chunks=4
)


class Orders:
    """What the sockets ask of a scheduler, written down."""

    def __init__(self) -> None:
        self.held: list[bool] = []
        self.ended: list[str] = []

    def hold(self, id: str, held: bool) -> None:
        self.held.append(held)

    async def finish(self, id: str) -> None:
        self.ended.append(id)


class Stage:
    """A server of sockets alone, in a thread. Chunks are links to one file of a chosen size."""

    def __init__(self, data: Path, chunk_bytes: int, patience: Patience) -> None:
        self.config = ServerConfig(data=data)
        self.store = Store(data / "queue.sqlite")
        self.feeds, self.orders = Feeds(self.store), Orders()
        self.record = make_session()
        self.store.add(self.record)
        self.server = Server(
            config=self.config,
            store=self.store,
            feeds=self.feeds,
            scheduler=cast(Scheduler, self.orders),
            keys=Keys(()),
            tickets=Tickets(),
            origins=Origins(host="127.0.0.1"),
            metrics=cast(Any, None),
        )
        self.audience = Audience(self.server, patience)
        self.app = FastAPI()
        self.app.include_router(router)
        self.app.state.server, self.app.state.audience = self.server, self.audience
        self.segments = self.server.segments(self.record)
        self.segments.mkdir(parents=True)
        self.init = SegmentEncoder(32, 32, Fraction(FPS)).init_segment()
        (self.segments / "init.mp4").write_bytes(self.init)
        self.chunk = np.random.default_rng(7).bytes(chunk_bytes)
        (self.segments / "chunk").write_bytes(self.chunk)
        self.num_chunks = 0
        self.loop: asyncio.AbstractEventLoop
        self.feed = self.feeds.of(self.record.id)  # held: it is forgotten else

    def call(self, act: Callable[[], Any]) -> Any:
        """What `act` gives, done in the server's thread."""

        async def do() -> Any:
            return act()

        return asyncio.run_coroutine_threadsafe(do(), self.loop).result(DEADLINE_S)

    def add_chunks(self, count: int) -> None:
        for _ in range(count):
            index, self.num_chunks = self.num_chunks, self.num_chunks + 1
            os.link(self.segments / "chunk", self.segments / f"{index:06d}.m4s")
            facts = {"index": index, "first_frame": index * FRAMES, "num_frames": FRAMES}
            self.tell("chunk", {**facts, "num_bytes": len(self.chunk)})

    def tell(self, name: str, data: dict[str, Any]) -> None:
        def publish() -> None:
            number = self.store.add_event(self.record.id, name, data)
            event = next(e for e in self.store.events(self.record.id, number - 1) if e.number == number)
            self.feeds.publish(self.record, event)

        self.call(publish)

    def become(self, status: Status, **changes: Any) -> None:
        self.record = replace(self.record, status=status, **changes)
        self.store.update(self.record.id, status=status, **changes)
        self.call(lambda: self.feeds.publish(self.record))

    @contextmanager
    def running(self) -> Iterator["Stage"]:
        listener = socket.create_server(("127.0.0.1", 0))
        self.port = listener.getsockname()[1]
        settings = uvicorn.Config(self.app, log_level="error", ws="websockets-sansio", lifespan="off")
        runner = uvicorn.Server(settings)

        async def run() -> None:
            self.loop = asyncio.get_running_loop()
            await runner.serve(sockets=[listener])

        thread = threading.Thread(target=lambda: asyncio.run(run()))
        thread.start()
        wait_until(lambda: runner.started)
        try:
            yield self
        finally:
            self.call(self.server.draining.set)
            runner.should_exit = True
            thread.join(DEADLINE_S)
            listener.close()
            self.store.close()
        assert not thread.is_alive()

    def watch(
        self, last_seq: int | str = -1, policy: str = "drop"
    ) -> AbstractContextManager[ClientConnection]:
        """A client that has asked for the session."""
        return connected(self.port, resume(self.record.id, last_seq, policy))


def make_session() -> Record:
    return Record(
        id=make_id(Kind.SESSION),
        kind=Kind.SESSION,
        owner="local",
        model="builtin",
        status=Status.IN_PROGRESS,
        created_at=int(time.time()),
        prompt="a ball",
        request={},
        job={},
        width=32,
        height=32,
        num_frames=100_000,
        fps=FPS,
        seed=1,
        chunks_total=6250,
    )
