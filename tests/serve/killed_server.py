"""A server without HTTP, killed at one point of a chunk's way to its viewers: `killed_server.py DATA POINT`.

It finishes what a server before left, then makes one more video, and is killed by SIGKILL at POINT of that
video's second chunk, in the worker or in the server itself. Without a POINT it makes one video undisturbed.
With `session` it starts a live session and waits to be killed. Prints JSON lines.
"""

import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vidgen.serve.config import load_server_config, store_file
from vidgen.serve.records import Kind, Record, Status, make_id
from vidgen.serve.store import Store
from vidgen.serve.work import body, replica
from vidgen.serve.work.feeds import Feeds
from vidgen.serve.work.scheduler import Scheduler

FATAL_BLOCK = 1
SEGMENT = f"{FATAL_BLOCK:06d}.m4s"
IN_WORKER = ("temporary written", "renamed", "appended", "in the journal", "output written")
POINTS = (*IN_WORKER, "before the event", "before the row", "before completed")
PATIENCE_S = 120.0
work = body.main


def record(kind: Kind = Kind.VIDEO, num_blocks: int = 3) -> Record:
    job = {
        "model": "builtin",
        "prompt": "a red circle moving left over a gray background",
        "num_frames": num_blocks * 16,
        "num_inference_steps": 3,
        "state_every": 2,
        "queue": {"stride": 2, "timetable": "dualparal", "context_mode": "cache", "anchor_frames": 1},
        "output": {"sheet": False, "upscale": 2},
    }
    return Record(
        id=make_id(kind), kind=kind, owner="local", model="builtin", prompt="p", created_at=int(time.time()),
        request={}, job=job, width=64, height=64, num_frames=num_blocks * 16, fps=16, seed=0,
        chunks_total=num_blocks,
    )  # fmt: skip


def armed(data: Path) -> str:
    """The video over which there is to be a kill."""
    file = data / "armed"
    return file.read_text() if file.exists() else "none"


def kill_after(data: Path, point: str, owner: Any, name: str, is_it: Callable[..., bool], *, before: bool):
    """Have a function of somebody's kill the server once, at a call that is it."""
    whole = getattr(owner, name)

    def deadly(*given: Any, **named: Any) -> Any:
        if not is_it(*given, **named):
            return whole(*given, **named)
        made = None if before else whole(*given, **named)
        server = os.getppid() if point in IN_WORKER else os.getpid()
        os.kill(server, signal.SIGKILL)
        time.sleep(60)  # the worker dies with it
        return made

    setattr(owner, name, deadly)


def main_of_worker(index: int, config: Any, pipe: Any, parent: int) -> None:
    """The real worker, but for the call that kills its server."""
    from vidgen.journal import Journal
    from vidgen.media import segments, sink

    data, point = config.data, (config.data / "point").read_text()

    def is_fatal(path: Any) -> bool:
        return armed(data) in str(path)

    if point in ("temporary written", "renamed"):
        kill_after(
            data, point, segments.os, "replace",
            lambda _, target: is_fatal(target) and Path(target).name == SEGMENT,
            before=point == "temporary written",
        )  # fmt: skip
    elif point == "appended":
        appended = [0]

        def is_it(path: Path, _: bytes) -> bool:
            appended[0] += is_fatal(path)
            return is_fatal(path) and appended[0] == FATAL_BLOCK + 1

        kill_after(data, point, sink, "append_segment", is_it, before=False)
    elif point == "in the journal":
        kill_after(
            data, point, Journal, "commit",
            lambda journal, block, _: is_fatal(journal.folder) and block.block == FATAL_BLOCK, before=False,
        )  # fmt: skip
    elif point == "output written":
        kill_after(data, point, sink.Mp4Sink, "finish", lambda self: is_fatal(self.output), before=False)
    work(index, config, pipe, parent)


def arm_server(data: Path, point: str) -> None:
    if point == "before the event":
        kill_after(
            data, point, Store, "add_event",
            lambda _, id, name, event: id == armed(data) and event.get("index") == FATAL_BLOCK,
            before=True,
        )  # fmt: skip
    elif point == "before the row":
        kill_after(
            data, point, Store, "update",
            lambda _, id, **new: id == armed(data) and new.get("chunks_done") == FATAL_BLOCK + 1, before=True,
        )  # fmt: skip
    elif point == "before completed":
        kill_after(
            data, point, Store, "update",
            lambda _, id, **new: id == armed(data) and new.get("status") == Status.COMPLETED, before=True,
        )  # fmt: skip


async def serve(data: Path, point: str) -> None:
    config = load_server_config(None, {"data": str(data)})
    store = Store(store_file(data))
    feeds = Feeds(store)
    scheduler = Scheduler(config, store, feeds)
    await scheduler.start()
    try:
        async with asyncio.timeout(PATIENCE_S):
            while not scheduler.is_ready or store.running() or store.next_queued():
                await asyncio.sleep(0.01)
            say(pid=scheduler.replicas()[0].pid, torch="torch" in sys.modules)
            wanted = record() if point != "session" else record(Kind.SESSION, 600)
            (data / "armed").write_text(wanted.id)
            say(submitted=wanted.id)
            await scheduler.submit(wanted)
            queued = record(num_blocks=1) if point else None
            if queued is not None:  # waits behind it, and through the kill
                await scheduler.submit(queued)
                say(queued=queued.id)
            feed, index = feeds.of(wanted.id), -1
            while (chunk := await feed.next_chunk(index)) is not None:
                index = chunk.index
                say(chunk=index)
            say(ended=wanted.id)
    finally:
        await scheduler.stop()
        store.close()


def say(**words: Any) -> None:
    print(json.dumps(words), flush=True)


def main(data: Path, point: str) -> None:
    data.mkdir(parents=True, exist_ok=True)
    (data / "point").write_text(point)
    (data / "armed").unlink(missing_ok=True)
    replica.body.main = main_of_worker
    arm_server(data, point)
    asyncio.run(serve(data, point))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else "")
