"""A scheduler with real workers on an event loop of its own, for tests that speak no HTTP.

`python -m tests.serve.workshop 200` starts and cancels so many videos; prints what is held before and after.
"""

import asyncio
import gc
import hashlib
import json
import sys
import threading
import time
from collections.abc import Callable, Coroutine
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import psutil

from vidgen.serve.config import ServerConfig, load_server_config, store_file, video_folder
from vidgen.serve.records import Kind, Record, Status, make_id
from vidgen.serve.store import Event, Store
from vidgen.serve.work.feeds import Feeds
from vidgen.serve.work.scheduler import Scheduler

PROMPT = "a red circle moving left over a gray background"
OTHER_PROMPT = "a blue square moving up over a white background"
BLOCK_FRAMES = 16
STEPS = 4
LONG = 600  # blocks: longer than any test waits
PATIENCE_S = 120.0
Got = TypeVar("Got")


def record(
    num_blocks: int = 3, *, kind: Kind = Kind.VIDEO, owner: str = "local", priority: int = 0, **job: Any
) -> Record:
    """A video of the built-in model, block by block: the first is there after STEPS forwards."""
    num_frames = num_blocks * BLOCK_FRAMES
    queue = {"stride": STEPS, "timetable": "dualparal", "block_frames": 4, "context_frames": 2}
    settings = {
        "model": "builtin",
        "prompt": PROMPT,
        "num_frames": num_frames,
        "num_inference_steps": STEPS,
        "state_every": 2,
        "queue": queue,
        "output": {"sheet": False, "upscale": 2},
    }
    return Record(
        id=make_id(kind), kind=kind, owner=owner, model="builtin", priority=priority, prompt=PROMPT,
        created_at=int(time.time()), request={}, job=settings | job, width=64, height=64,
        num_frames=num_frames, fps=16, seed=0, chunks_total=num_blocks,
    )  # fmt: skip


def settings(data: Path, **changes: Any) -> ServerConfig:
    return load_server_config(None, {"data": str(data), **changes})


class Workshop:
    """Store, feeds and scheduler; the test's thread asks, a loop's thread answers."""

    def __init__(self, config: ServerConfig) -> None:
        self.config = config
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.store = Store(store_file(config.data))
        self.feeds, self.scheduler = self.do(self._make())

    async def _make(self) -> tuple[Feeds, Scheduler]:
        feeds = Feeds(self.store)
        return feeds, Scheduler(self.config, self.store, feeds)

    def do(self, work: Coroutine[Any, Any, Got]) -> Got:
        """The result of work on the loop."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(PATIENCE_S)

    def start(self) -> None:
        self.do(self.scheduler.start())
        self.until(lambda: self.scheduler.is_ready)

    def close(self) -> None:
        self.do(self.scheduler.stop())
        self.store.close()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(PATIENCE_S)
        with suppress(RuntimeError):
            self._loop.run_until_complete(self._loop.shutdown_default_executor())
        self._loop.close()

    def until(self, holds: Callable[[], Any], patience_s: float = PATIENCE_S) -> Any:
        """What `holds` gives once that is true. AssertionError when it takes too long."""
        deadline = time.monotonic() + patience_s
        while not (found := holds()):
            assert time.monotonic() < deadline, f"not within {patience_s:g} s; {self.scheduler.replicas()}"
            time.sleep(0.005)
        return found

    def submit(self, wanted: Record) -> str:
        return self.do(self.scheduler.submit(wanted)).id

    def get(self, id: str) -> Record:
        found = self.store.get(id)
        assert found is not None
        return found

    def until_ended(self, id: str) -> Record:
        self.until(lambda: self.get(id).has_ended)
        self.until(lambda: all(facts.video_id != id for facts in self.scheduler.replicas()))
        return self.get(id)

    def until_chunks(self, id: str, number: int) -> None:
        self.until(lambda: self.get(id).chunks_done >= number)

    def until_busy(self, id: str) -> int:
        """The process id of the worker that is on it."""
        is_on = lambda: [f.pid for f in self.scheduler.replicas() if f.video_id == id and f.pid]  # noqa: E731
        return self.until(is_on)[0]

    def folder(self, id: str) -> Path:
        return video_folder(self.config.data, id)

    def events(self, id: str, name: str | None = None) -> list[Event]:
        return [event for event in self.store.events(id) if name in (None, event.name)]


async def ask(question: Callable[[], Got]) -> Got:
    """What a plain call gives on the loop's thread."""
    return question()


def cycles(workshop: Workshop, number: int) -> dict[str, float]:
    """What this process and the worker hold after so many videos begun, watched, cancelled and deleted."""
    for _ in range(number):
        id = workshop.submit(record(LONG))
        feed = workshop.do(ask(lambda id=id: workshop.feeds.of(id)))
        assert workshop.do(feed.next_chunk(-1)) is not None
        del feed
        workshop.do(workshop.scheduler.remove(id))
    gc.collect()
    assert not len(workshop.feeds._feeds), "a feed that nobody holds is gone"
    ours, (facts,) = psutil.Process(), workshop.scheduler.replicas()
    worker = psutil.Process(facts.pid)
    return {
        "files": ours.num_fds(),
        "threads": ours.num_threads(),
        "children": len(ours.children(recursive=True)),
        "MiB": ours.memory_info().rss / 2**20,
        "worker files": worker.num_fds(),
        "worker threads": worker.num_threads(),
        "worker MiB": worker.memory_info().rss / 2**20,
    }


def main(number: int) -> None:
    with TemporaryDirectory() as data:
        workshop = Workshop(settings(Path(data)))
        workshop.start()
        for count in (5, number):
            began = time.monotonic()
            held = cycles(workshop, count)
            print(json.dumps({"cycles": count, "seconds": time.monotonic() - began, **held}), flush=True)
        workshop.close()


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every segment and of every block's final latents of a video."""
    paths = [*(folder / "job/segments").iterdir(), *(folder / "job/latents").iterdir()]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def statuses(events: list[Event]) -> list[Status]:
    return [Status(event.data["status"]) for event in events if event.name == "status"]


if __name__ == "__main__":
    main(int(sys.argv[1]))
