"""Load on a server: clients that poll, viewers that watch, jobs that render, `python tools/load.py`.

For a bounded time it keeps --jobs jobs in flight, --viewers WebSockets on them and --pollers clients asking;
then it cancels what still runs. Prints what clients saw; the exit code is 1 after any error.
"""

import argparse
import asyncio
import contextlib
import json
import os
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import httpx

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools.load_server import own_server, usage  # noqa: E402
from vidgen.cli_asking import read_key  # noqa: E402
from vidgen.serve.client import AsyncClient, Chunk, ServerError, Video, VideoFailed  # noqa: E402

PROMPTS = (
    "a red circle moving right over a gray background",
    "a blue square moving up over a white background",
)
POLL_EVERY_S = 1.0
START_BUFFER_S = 1.0  # of a player, as the web page's
END_WITHIN_S = 60.0
MOST_ERRORS_SHOWN = 10


@dataclass(kw_only=True)
class Seen:
    """What all clients together saw. Milliseconds and seconds as the names say."""

    latency_ms: dict[str, list[float]] = field(default_factory=dict)
    first_after_submit_s: list[float] = field(default_factory=list)
    first_after_start_s: list[float] = field(default_factory=list)  # since the job had its turn
    gap_s: list[float] = field(default_factory=list)
    stall_s: list[float] = field(default_factory=list)  # of each viewing, in a player
    own_delay_ms: list[float] = field(default_factory=list)  # of this program's event loop
    counts: Counter[str] = field(default_factory=Counter)
    errors: list[str] = field(default_factory=list)

    def rows(self) -> list[dict[str, Any]]:
        """A row of figures each, with how many readings they are of."""
        named = {f"API {name}, ms": readings for name, readings in sorted(self.latency_ms.items())}
        named["API all, ms"] = [ms for readings in self.latency_ms.values() for ms in readings]
        named["first frame after submit, s"] = self.first_after_submit_s
        named["first frame after start, s"] = self.first_after_start_s
        named["gap between chunks, s"] = self.gap_s
        named["stalls of a viewing, s"] = self.stall_s
        named["delay of this program, ms"] = self.own_delay_ms
        return [{"what": name, "n": len(values), **_percentiles(values)} for name, values in named.items()]


def _percentiles(values: list[float]) -> dict[str, float | None]:
    if not values:
        return {"p50": None, "p95": None, "max": None}
    cuts = statistics.quantiles(values, n=20, method="inclusive") if len(values) > 1 else values * 19
    return {
        "p50": round(statistics.median(values), 3),
        "p95": round(cuts[-1], 3),
        "max": round(max(values), 3),
    }


@dataclass(kw_only=True)
class Slot:
    """Where one job after another runs; times by the monotonic clock."""

    video_id: str | None = None
    submitted_s: float = 0.0
    started_s: float | None = None


class Load:
    """One run against a server."""

    def __init__(self, url: str, api_key: str | None, given: argparse.Namespace) -> None:
        self.seen = Seen()
        self._url, self._key, self._given = url, api_key, given
        self._slots = [Slot() for _ in range(given.jobs)]
        self._end_s = 0.0
        self._random = random.Random(given.seed)

    async def run(self) -> None:
        """Hold the load for the given time, then leave the server without work."""
        given = self._given
        self._end_s = time.monotonic() + given.seconds
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        async with (
            asyncio.timeout(given.seconds + END_WITHIN_S),
            AsyncClient(self._url, api_key=self._key) as client,
            httpx.AsyncClient(
                base_url=self._url, headers=headers, limits=limits, timeout=30, trust_env=False
            ) as http,
            asyncio.TaskGroup() as tasks,
        ):
            tasks.create_task(self._measure_itself())
            for slot in self._slots:
                tasks.create_task(self._submit(client, slot))
            for index in range(given.viewers):
                tasks.create_task(self._watch(client, self._slots[index % len(self._slots)]))
            for _ in range(given.pollers):
                tasks.create_task(self._poll(http))

    @property
    def _is_over(self) -> bool:
        return time.monotonic() >= self._end_s

    async def _submit(self, client: AsyncClient, slot: Slot) -> None:
        while not self._is_over:
            try:
                slot.started_s, slot.submitted_s = None, time.monotonic()
                fields = {"num_frames": self._given.frames, "seed": self._random.randrange(1000)}
                fields["num_inference_steps"] = self._given.steps
                video = await client.create(self._random.choice(PROMPTS), **fields)
                slot.video_id = video.id
                self.seen.counts["jobs submitted"] += 1
                await self._see_through(client, slot, video)
            except (ServerError, httpx.HTTPError) as error:
                self._error("job", error)
                await asyncio.sleep(POLL_EVERY_S)
        slot.video_id = None

    async def _see_through(self, client: AsyncClient, slot: Slot, video: Video) -> None:
        """Follow a job by its events; cancel it when the time is over."""
        follower = asyncio.create_task(self._follow(client, slot, video.id))
        await asyncio.wait([follower], timeout=max(0.0, self._end_s - time.monotonic()))
        if not follower.done():
            await client.cancel(video.id)
            self.seen.counts["jobs cancelled at the end"] += 1
        await follower
        found = await client.get(video.id)
        if found.status == "failed" and found.error_code != "cancelled":
            self._error("job", VideoFailed(found))
        self.seen.counts["jobs completed"] += found.status == "completed"

    async def _follow(self, client: AsyncClient, slot: Slot, video_id: str) -> None:
        async for event in client.events(video_id):
            if event.name == "status" and event.data.get("status") == "in_progress":
                slot.started_s = slot.started_s or time.monotonic()

    async def _watch(self, client: AsyncClient, slot: Slot) -> None:
        last = None
        while not self._is_over:
            if slot.video_id is None or slot.video_id == last:
                await asyncio.sleep(0.02)
                continue
            last = slot.video_id
            arrivals: list[tuple[float, Chunk]] = []
            try:
                async for chunk in client.watch(last, policy="drop", report=self._note_drop):
                    if not arrivals:
                        self._first_frame(slot)
                    arrivals.append((time.monotonic(), chunk))
            except VideoFailed as error:
                if error.code != "cancelled":
                    self._error("viewer", error)
            except (ServerError, httpx.HTTPError) as error:
                self._error("viewer", error)
            self._viewing(arrivals)

    def _first_frame(self, slot: Slot) -> None:
        now_s = time.monotonic()
        self.seen.first_after_submit_s.append(now_s - slot.submitted_s)
        if slot.started_s is not None:
            self.seen.first_after_start_s.append(now_s - slot.started_s)

    def _note_drop(self, message: dict[str, Any]) -> None:
        if message.get("type") == "video.dropped":
            self.seen.counts["chunks dropped"] += message["to_seq"] - message["from_seq"] + 1

    def _viewing(self, arrivals: list[tuple[float, Chunk]]) -> None:
        """What a player with a start buffer would have made of these chunks."""
        self.seen.counts["chunks seen"] += len(arrivals)
        if len(arrivals) < 2:
            return
        times = [at_s for at_s, _ in arrivals]
        self.seen.gap_s += [later - earlier for earlier, later in zip(times, times[1:], strict=False)]
        buffered_s, stalled_s, is_playing = 0.0, 0.0, False
        for (at_s, chunk), next_s in zip(arrivals, [*times[1:], times[-1]], strict=True):
            buffered_s += chunk.duration_s
            is_playing = is_playing or buffered_s >= START_BUFFER_S
            if is_playing:
                stalled_s += max(0.0, next_s - at_s - buffered_s)
                buffered_s = max(0.0, buffered_s - (next_s - at_s))
        self.seen.stall_s.append(stalled_s)

    async def _poll(self, http: httpx.AsyncClient) -> None:
        await asyncio.sleep(self._random.random() * POLL_EVERY_S)
        while not self._is_over:
            name, path = self._pick()
            begin_s = time.perf_counter()
            try:
                response = await http.get(path)
                response.raise_for_status().json()
            except (httpx.HTTPError, ValueError) as error:
                self._error(name, error)
            else:
                readings = self.seen.latency_ms.setdefault(name, [])
                readings.append(1000 * (time.perf_counter() - begin_s))
            await asyncio.sleep(POLL_EVERY_S * (0.5 + self._random.random()))

    def _pick(self) -> tuple[str, str]:
        video_id = self._random.choice(self._slots).video_id
        draw = self._random.random()
        if video_id is None or draw > 0.9:
            return "models", "/v1/models"
        return ("list", "/v1/videos?limit=20") if draw > 0.7 else ("video", f"/v1/videos/{video_id}")

    async def _measure_itself(self) -> None:
        while not self._is_over:
            begin_s = time.perf_counter()
            await asyncio.sleep(0.02)
            self.seen.own_delay_ms.append(1000 * (time.perf_counter() - begin_s - 0.02))

    def _error(self, who: str, error: Exception) -> None:
        self.seen.errors.append(f"{who}: {type(error).__name__}: {error}")


def main(words: list[str] | None = None) -> int:
    """The exit code: 0, or 1 after any error."""
    given = _arguments(words)
    key = None if given.api_key_file is None else read_key(given.api_key_file)
    measure: Callable[[], dict[str, float]] = dict
    with contextlib.ExitStack() as stack:
        url = given.server
        if url is None:
            url, pid = stack.enter_context(own_server(given.replicas, given.jobs))
            measure = partial(usage, pid)
        load = Load(url, key, given)
        before = measure()
        asyncio.run(load.run())
        after = measure()
    report = {
        "settings": {key: value for key, value in vars(given).items() if key != "api_key_file"},
        "figures": load.seen.rows(),
        "counts": dict(load.seen.counts),
        "server": [before, after],
        "load_average": os.getloadavg(),
        "errors": load.seen.errors,
    }
    show(report, given.json)
    return 1 if load.seen.errors else 0


def show(report: dict[str, Any], as_json: bool) -> None:
    """The report, as JSON or for people."""
    from vidgen.bench.machine import machine_facts, table

    report = {"machine": machine_facts(), **report}
    if as_json:
        print(json.dumps(report, indent=2))
        return
    print(", ".join(f"{name} {value}" for name, value in report["machine"].items()))
    print(table(report["figures"]))
    print(", ".join(f"{name}: {count}" for name, count in sorted(report["counts"].items())))
    print(f"server process before and after: {report['server']}; load average {report['load_average']}")
    print(f"errors: {len(report['errors'])}")
    for line in report["errors"][:MOST_ERRORS_SHOWN]:
        print(f"  {line}")


def _arguments(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--pollers", type=int, default=50)
    parser.add_argument("--viewers", type=int, default=8)
    parser.add_argument("--jobs", type=int, default=4, help="in flight at once")
    parser.add_argument("--frames", type=int, default=321, help="of a job")
    parser.add_argument("--steps", type=int, default=8, help="of denoising")
    parser.add_argument("--replicas", type=int, default=2, help="of the own server")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--server", metavar="URL", help="instead of an own one")
    parser.add_argument("--api-key-file", type=Path, metavar="FILE")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args(words)
    if given.jobs < 1 or given.seconds <= 0 or given.pollers < 0 or given.viewers < 0:
        parser.error("need --jobs 1 or more, and no negative number")
    return given


if __name__ == "__main__":
    sys.exit(main())
