"""The parts of a running server, as routes find them at `request.app.state.server`."""

import asyncio
from collections.abc import Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from starlette.requests import HTTPConnection

from vidgen.serve.config import ServerConfig, video_folder
from vidgen.serve.errors import not_found
from vidgen.serve.http.metrics import Metrics
from vidgen.serve.http.security import Keys, Origins, Tickets, only_video, require
from vidgen.serve.records import Record, is_id
from vidgen.serve.store import Store
from vidgen.serve.work.feeds import Feeds
from vidgen.serve.work.scheduler import Scheduler

Found = TypeVar("Found")


@dataclass(kw_only=True)
class Server:
    """Everything that one server process has, made once by `make_app`."""

    config: ServerConfig
    store: Store
    feeds: Feeds
    scheduler: Scheduler
    keys: Keys
    tickets: Tickets
    origins: Origins
    metrics: Metrics
    draining: asyncio.Event = field(default_factory=asyncio.Event)  # set when the server is to end
    failure: ValueError | None = None  # why it could not start

    def folder(self, record: Record) -> Path:
        """Where a video's files are."""
        return video_folder(self.config.data, record.id)

    def segments(self, record: Record) -> Path:
        """Where a video's chunks are: init.mp4, 000000.m4s and on."""
        return self.folder(record) / "job" / "segments"


def server_of(connection: HTTPConnection) -> Server:
    """The server that a request or a WebSocket came to."""
    return connection.app.state.server


async def find(connection: HTTPConnection, video_id: str) -> Record:
    """A video of whoever asks. ApiError 404 for all others, whether they exist or not."""
    owner, only = require(connection), only_video(connection)
    if not is_id(video_id) or only not in (None, video_id):
        raise not_found(video_id)
    record = await asyncio.to_thread(server_of(connection).store.get, video_id)
    if record is None or record.owner != owner:
        raise not_found(video_id)
    return record


async def unless_draining(server: Server, coming: Coroutine[Any, Any, Found]) -> Found | None:
    """What is waited for, or None when the server is to end before."""
    if server.draining.is_set():
        coming.close()
        return None
    work = asyncio.ensure_future(coming)
    end = asyncio.ensure_future(server.draining.wait())
    try:
        await asyncio.wait((work, end), return_when=asyncio.FIRST_COMPLETED)
        return work.result() if work.done() else None
    finally:
        end.cancel()
        work.cancel()
