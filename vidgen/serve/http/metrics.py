"""What the server measures of itself, in Prometheus' text format."""

import asyncio
import time
from contextlib import suppress
from itertools import zip_longest
from math import inf
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from vidgen.serve.errors import ApiError
from vidgen.serve.work.feeds import Feed, Feeds
from vidgen.serve.work.replica import ReplicaFacts
from vidgen.serve.work.scheduler import Scheduler

if TYPE_CHECKING:
    from vidgen.serve.http.state import Server

LOOK_EVERY_S = 0.1
REQUEST_BUCKETS_S = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 30)
CHUNK_BUCKETS_S = (0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 1.5, 2, 3, 5, 10, 30, 60, 300)
REPLICA_STATES = ("starting", "idle", "busy", "lost")


class Metrics:
    """Counts while the server runs; what merely is (queue, replicas) is read when somebody asks."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._requests = self._histogram(
            "vidgen_request_seconds", "Time to answer, streams until they end", REQUEST_BUCKETS_S,
            ["method", "route", "status"],
        )  # fmt: skip
        self._first = self._histogram(
            "vidgen_first_frame_seconds", "From a replica taking a video to its first chunk", CHUNK_BUCKETS_S,
            ["kind"],
        )  # fmt: skip
        self._gaps = self._histogram(
            "vidgen_chunk_gap_seconds", "Between two chunks of one video", CHUNK_BUCKETS_S, ["kind"]
        )
        self._stalls = self._counter(
            "vidgen_stalls", "Chunks later than a viewer from the start would need them", ["kind"]
        )
        self._stall_s = self._counter(
            "vidgen_stall_seconds", "How long such viewers would have waited in all", ["kind"]
        )
        self._videos = self._gauge("vidgen_videos", "Videos by status", ["status"])
        self._queue = self._gauge("vidgen_queue_depth", "Videos that wait for a replica")
        self._viewers = self._gauge("vidgen_viewers", "Streams and sockets that are open")
        self._ready = self._gauge("vidgen_ready", "1 when every replica has answered lately")
        self._disk = self._gauge("vidgen_disk_bytes", "What videos take on disk")
        self._states = self._gauge(
            "vidgen_replica_state", "1 for the state a replica is in", ["replica", "state"]
        )
        self._beats = self._gauge(
            "vidgen_replica_beat_age_seconds", "Since a replica's last answer", ["replica"]
        )
        self._ranks = self._gauge("vidgen_replica_ranks", "Ranks that a replica renders on", ["replica"])
        self._rank_ages = self._gauge(
            "vidgen_rank_answer_age_seconds", "Since a rank's last answer", ["replica", "rank"]
        )
        self._rank_states = self._gauge(
            "vidgen_rank_up", "1 when a rank, or its decoder, has answered lately", ["replica", "rank"]
        )

    def answered(self, scope: Any, status: int, took_s: float) -> None:
        """Count a request; unknown paths count as one, so that nobody can make up new series."""
        route = getattr(scope.get("route"), "path", None) or "unknown"
        method = scope["method"] if scope["method"] in ("GET", "HEAD", "POST", "DELETE") else "other"
        self._requests.labels(method, route, str(status)).observe(took_s)

    def text(self, server: "Server", num_viewers: int) -> bytes:
        """Everything as it is now. Reads the store: not for the event loop's thread."""
        counts = server.store.counts()
        for status, count in counts.items():
            self._videos.labels(status.value).set(count)
        self._queue.set(sum(count for status, count in counts.items() if status.value == "queued"))
        self._viewers.set(num_viewers)
        self._ready.set(server.scheduler.is_ready)
        self._disk.set(server.store.disk_bytes())
        for facts in server.scheduler.replicas():
            for state in REPLICA_STATES:
                self._states.labels(str(facts.index), state).set(facts.state == state)
            self._beats.labels(str(facts.index)).set(facts.beat_age_s)
            self._ranks.labels(str(facts.index)).set(facts.ranks)
            self._tell_ranks(facts, server.config.timings.heartbeat_timeout_s)
        return generate_latest(self.registry)

    def _tell_ranks(self, facts: ReplicaFacts, longest_s: float) -> None:
        """Each rank by its number, the decoder by its name; those that are not there are down."""
        names = [*map(str, range(facts.ranks)), "decoder"] if facts.ranks > 1 else []
        for name, age_s in zip_longest(names, facts.rank_ages_s[: len(names)]):
            labels = str(facts.index), name
            self._rank_ages.labels(*labels).set(inf if age_s is None else age_s)
            self._rank_states.labels(*labels).set(age_s is not None and age_s < longest_s)

    async def follow_all(self, scheduler: Scheduler, feeds: Feeds) -> None:
        """Measure every video that a replica takes, until cancelled."""
        tasks: dict[str, asyncio.Task[None]] = {}
        async with asyncio.TaskGroup() as group:
            while True:
                busy = {facts.video_id for facts in scheduler.replicas() if facts.video_id is not None}
                tasks = {video_id: task for video_id, task in tasks.items() if not task.done()}
                for video_id in busy - tasks.keys():
                    with suppress(ApiError):  # deleted this moment
                        tasks[video_id] = group.create_task(self._follow(feeds.of(video_id)))
                await asyncio.sleep(LOOK_EVERY_S)

    async def _follow(self, feed: Feed) -> None:
        """Time a video's chunks against a viewer who plays each as soon as it may."""
        kind, fps = feed.record.kind.value, feed.record.fps
        last = feed.chunks[-1].index if feed.chunks else -1
        is_new = last < 0
        before = time.monotonic()
        plays_until: float | None = None
        while (chunk := await feed.next_chunk(last)) is not None:
            now, last = time.monotonic(), chunk.index
            duration_s = chunk.num_frames / fps
            if plays_until is None:
                if is_new:
                    self._first.labels(kind).observe(now - before)
                plays_until = now + duration_s
            else:
                self._gaps.labels(kind).observe(now - before)
                late_s = now - plays_until
                if late_s > 0:
                    self._stalls.labels(kind).inc()
                    self._stall_s.labels(kind).inc(late_s)
                plays_until = max(now, plays_until) + duration_s
            before = now

    def _histogram(self, name: str, about: str, buckets: tuple[float, ...], labels: list[str]) -> Histogram:
        return Histogram(name, about, labels, registry=self.registry, buckets=buckets)

    def _counter(self, name: str, about: str, labels: list[str]) -> Counter:
        return Counter(name, about, labels, registry=self.registry)

    def _gauge(self, name: str, about: str, labels: list[str] | None = None) -> Gauge:
        return Gauge(name, about, labels or [], registry=self.registry)
