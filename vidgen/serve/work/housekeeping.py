"""The server's folder kept in order, and words kept durable: nothing here knows of workers."""

import asyncio
import logging
import shutil
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from vidgen.serve.config import ServerConfig, input_file, video_folder
from vidgen.serve.errors import ApiError, disk_full, queue_full
from vidgen.serve.records import Kind, Record, Status, is_id
from vidgen.serve.store import Event, Store
from vidgen.serve.work.feeds import Feeds

LOG = logging.getLogger(__name__)
RETRY_EVERY_S = 1.0
RETRY_AFTER_S = 10  # for clients, when the queue is full
AGAIN_AFTER_S = 0.5
SPARE_BYTES = 64 * 2**20  # a file system with less takes no new video
PAGE = 500


class Ledger:
    """What happens to videos: first in the store, then told to who watches. One word after the other."""

    def __init__(self, store: Store, feeds: Feeds) -> None:
        self._store, self._feeds = store, feeds
        self._turn = asyncio.Lock()  # events are told in the order of their numbers

    async def write(
        self, id: str, name: str | None = None, data: dict[str, Any] | None = None, **changes: Any
    ) -> Record:
        """The record with these changes, after an event. Waits while the disk is full."""
        is_told = False
        while True:
            try:
                return await self.write_now(id, name, data, **changes)
            except ApiError as error:
                if not is_full(error):
                    raise
                if not is_told:
                    LOG.warning("no space left for the queue; free some and it goes on")
                is_told = True
                await asyncio.sleep(RETRY_EVERY_S)

    async def write_now(
        self, id: str, name: str | None = None, data: dict[str, Any] | None = None, **changes: Any
    ) -> Record:
        """The same; ApiError 507 when the disk is full. KeyError when there is no such video."""

        def keep() -> tuple[Record, Event | None]:
            event = None
            if name is not None:
                event = Event(self._store.add_event(id, name, data or {}), name, data or {})
            return self._store.update(id, **changes), event

        async with self._turn:
            record, event = await asyncio.to_thread(keep)
            self._feeds.publish(record, event)
        return record


def is_full(error: ApiError) -> bool:
    """Whether the store had no space left for a write."""
    return error.status == 507


def check_room(config: ServerConfig, store: Store) -> None:
    """ApiError 429 or 507 when another video cannot be taken."""
    limits = config.limits
    if store.counts()[Status.QUEUED] >= limits.max_queue:
        raise queue_full(RETRY_AFTER_S, limits.max_queue)
    used = store.disk_bytes()
    if used >= limits.disk_quota_bytes:
        raise disk_full(used, limits.disk_quota_bytes)
    if shutil.disk_usage(config.data).free < SPARE_BYTES:
        raise disk_full()


def delete(config: ServerConfig, store: Store, id: str) -> bool:
    """Delete all there is of a video; whether there was one. Its files make room for that on a full disk."""
    try:
        found = store.delete(id)
    except ApiError as error:
        if not is_full(error):
            raise
        delete_files(config, id)
        return store.delete(id)
    delete_files(config, id)
    return found


def sweep(config: ServerConfig, store: Store) -> int:
    """Delete what belongs to no video, left by a kill between two steps; how much that was."""
    swept = 0
    for path in [*_entries(config.data / "videos"), *_entries(config.data / "inputs")]:
        id = path.name.partition(".")[0]
        if is_id(id) and store.get(id) is None:
            delete_files(config, id)
            swept += 1
    return swept


def delete_files(config: ServerConfig, id: str) -> None:
    """Delete all files of a video."""
    shutil.rmtree(video_folder(config.data, id), ignore_errors=True)
    for suffix in (".png", ".jpg", ".webp"):
        with suppress(OSError):
            input_file(config.data, id, suffix).unlink()


def queued_sessions(store: Store) -> Iterator[Record]:
    """Live sessions that wait for a worker."""
    after, has_more = None, True
    while has_more:
        records, has_more = store.page(after=after, limit=PAGE)
        for record in records:
            if record.kind is Kind.SESSION and record.status is Status.QUEUED:
                yield record
        after = records[-1].id if records else None


def _entries(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []


async def forever(work: Callable[[], Awaitable[None]]) -> None:
    """Do it again and again; an error is logged, and hurts nobody else."""
    while True:
        try:
            await work()
        except Exception:
            LOG.exception("%s failed", work.__name__)
            await asyncio.sleep(AGAIN_AFTER_S)
