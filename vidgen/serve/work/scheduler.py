"""One queue for all workers: which video is made when and where, and what becomes of it.

Everything belongs to the event loop's thread but the store, which is called in others. What viewers are told
is in the store first. A video is in `_running` from when it is taken from the queue until it ends, also while
it waits for another worker because its own died.
"""

import asyncio
import logging
import time

from vidgen.serve.config import ServerConfig
from vidgen.serve.errors import ApiError, conflict, error, not_found, unavailable
from vidgen.serve.records import Kind, Record, Status
from vidgen.serve.store import Store
from vidgen.serve.work import housekeeping, reports
from vidgen.serve.work.feeds import Feeds
from vidgen.serve.work.housekeeping import Ledger, forever
from vidgen.serve.work.messages import Interact, Report
from vidgen.serve.work.replica import Replica, ReplicaFacts
from vidgen.serve.work.running import (
    CANCELLED,
    NO_FRAMES,
    RESTARTED,
    Ending,
    Running,
    ended_fields,
    status_data,
)  # fmt: skip

LOG = logging.getLogger(__name__)
WATCH_EVERY_S = 0.5
LATE_S = 5.0  # this process itself was stopped, or its machine asleep
EXPIRE_EVERY_S = 30.0
MAX_WISHES = 16


class Scheduler:
    """See the module."""

    def __init__(self, config: ServerConfig, store: Store, feeds: Feeds) -> None:
        self.config, self.store, self.feeds = config, store, feeds
        self.ledger = Ledger(store, feeds)
        self._replicas: list[Replica] = []
        self._running: dict[str, Running] = {}
        self._queue = asyncio.Lock()  # held by whoever changes what is queued
        self._inbox: asyncio.Queue[tuple[Replica, Report]] = asyncio.Queue()
        self._work = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._is_stopping = False

    async def start(self) -> None:
        """Start the workers; go on with what a server before has left."""
        swept = await asyncio.to_thread(housekeeping.sweep, self.config, self.store)
        if swept:
            LOG.info("deleted %d leftovers of no video", swept)
        for record in await asyncio.to_thread(lambda: list(housekeeping.queued_sessions(self.store))):
            await self.end(record, RESTARTED)
        for record in await asyncio.to_thread(self.store.running):
            run = Running(feed=self.feeds.of(record.id))
            if record.kind is Kind.SESSION:
                run.only_finish, run.fault = True, RESTARTED
            self._running[record.id] = run

        def tell(replica: Replica, report: Report) -> None:
            self._inbox.put_nowait((replica, report))

        self._replicas = [Replica(index, self.config, tell) for index in range(self.config.replicas)]
        for replica in self._replicas:
            replica.start()
        for work in (self._take_reports, self._hand_out, self._watch):
            self._tasks.append(asyncio.create_task(forever(work)))
        self.wake()

    async def stop(self) -> None:
        """End the workers. Running videos are left to be resumed by the next start."""
        self._is_stopping = True
        runs = [run for run in self._running.values() if run.replica is not None]
        for run in runs:
            run.ask("interrupt")
        if runs:
            ends = [asyncio.create_task(run.ended.wait()) for run in runs]
            _, late = await asyncio.wait(ends, timeout=self.config.timings.drain_s)
            for task in late:
                task.cancel()
        await asyncio.gather(*(replica.close() for replica in self._replicas))
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks.clear()

    def wake(self) -> None:
        """Look whether a free worker can do something."""
        self._work.set()

    async def submit(self, record: Record) -> Record:
        """Put a new video into the queue, durably. ApiError 429, 503 or 507 when it is not taken."""
        async with self._queue:
            await self._check_room()
            await asyncio.to_thread(self.store.add, record)
            record = await self.ledger.write_now(record.id, "status", status_data(record))
        self.wake()
        return record

    async def cancel(self, id: str) -> Record:
        """A video that is given up: when this returns no worker is on it. An ended one stays as it is."""
        async with self._queue:
            run = self._running.get(id)
            if run is None or run.replica is None:
                record = run.record if run else await self._get(id)
                is_open = run is not None or record.status is Status.QUEUED
                return await self.end(record, CANCELLED) if is_open else record
            run.ask("cancel")
        try:
            await asyncio.wait_for(run.ended.wait(), self.config.timings.cancel_grace_s)
        except TimeoutError:
            if run.replica is not None and run.replica.video_id == id:
                grace_s = self.config.timings.cancel_grace_s
                run.replica.replace(f"{run.replica.who} had not let go of {id} after {grace_s:g} s")
            await run.ended.wait()
        return run.record

    async def resume(self, id: str) -> Record:
        """A failed video back in the queue, to go on from its last chunk. Any other stays as it is.

        ApiError 409 for a session: its time has gone by.
        """
        async with self._queue:
            record = await self._get(id)
            if record.status is not Status.FAILED:
                return record
            if record.kind is Kind.SESSION:
                raise conflict("a session that has ended cannot go on; start another")
            await self._check_room()
            fresh = {
                "status": Status.QUEUED, "error_code": None, "error_message": None, "expires_at": None,
                "attempt": 0,
            }  # fmt: skip
            record = await self.ledger.write_now(id, "status", status_data(record, **fresh), **fresh)
        self.wake()
        return record

    async def remove(self, id: str) -> None:
        """Give a video up, if need be, and delete all there is of it. ApiError 404 when there is none."""
        await self.cancel(id)
        async with self._queue:
            if id in self._running:
                raise conflict(f"video {id} was resumed meanwhile; delete it again")
            found = await asyncio.to_thread(housekeeping.delete, self.config, self.store, id)
            if not found:
                raise not_found(id)
            self.feeds.forget(id)

    async def interact(self, id: str, wish_id: str, prompt: str, transition_blocks: int) -> None:
        """Wish for another prompt. What becomes of it is an event: `prompt_applied` or `prompt_refused`.

        ApiError 409 when nobody is on the video, 429 when too many wishes are open.
        """
        run = self._running.get(id)
        if run is None or run.replica is None or run.stop is not None:
            raise conflict(f"video {id} is not being made: its prompt cannot be changed now", "not_running")
        if wish_id in run.wishes:
            raise conflict(f"event_id={wish_id:.100}: is open already; give another", "duplicate")
        if len(run.wishes) >= MAX_WISHES:
            message = f"{MAX_WISHES} changes of the prompt are open; wait until one is applied"
            raise error(429, "too_many_changes", message, headers={"Retry-After": "1"})
        run.wishes.add(wish_id)
        run.replica.send(
            Interact(video_id=id, wish_id=wish_id, prompt=prompt, transition_blocks=transition_blocks)
        )

    async def finish(self, id: str) -> Record:
        """A video that ends with what there is of it, completed; cancelled if that is nothing."""
        async with self._queue:
            run = self._running.get(id)
            if run is None:
                record = await self._get(id)
                return await self.end(record, NO_FRAMES) if record.status is Status.QUEUED else record
            run.ask("finish")
            run.only_finish = run.only_finish or run.replica is None
        self.wake()
        await run.ended.wait()
        return run.record

    def hold(self, id: str, held: bool) -> None:
        """Let a video wait before its next forward, or go on. Nothing when nobody is on it."""
        if run := self._running.get(id):
            run.hold(held, "viewers")

    def replicas(self) -> list[ReplicaFacts]:
        """The workers as they are now."""
        return [replica.facts() for replica in self._replicas]

    @property
    def is_ready(self) -> bool:
        """Whether every worker is loaded and has answered lately."""
        return bool(self._replicas) and all(replica.is_well for replica in self._replicas)

    async def end(self, record: Record, fault: Ending | None, **changes: object) -> Record:
        """Give a video its final status, and let go of it."""
        run = self._running.get(record.id)
        if run is not None:
            await self.refuse_wishes(run, "the video ended before")
        fields = ended_fields(self.config, record, fault) | changes
        record = await self.ledger.write(record.id, "status", status_data(record, **fields), **fields)
        if run is not None:
            self.release(run)
        return record

    async def refuse_wishes(self, run: Running, why: str) -> None:
        """Say of every open wish that it will not be met."""
        while run.wishes:
            data = {"event_id": run.wishes.pop(), "message": why}
            await self.ledger.write(run.id, "prompt_refused", data)

    def release(self, run: Running) -> None:
        """Nobody is on a video any more."""
        self._running.pop(run.id, None)
        run.ended.set()
        self.wake()

    async def _check_room(self) -> None:
        if self._is_stopping:
            raise unavailable("the server is about to stop; ask the next one")
        await asyncio.to_thread(housekeeping.check_room, self.config, self.store)

    async def _get(self, id: str) -> Record:
        record = await asyncio.to_thread(self.store.get, id)
        if record is None:
            raise not_found(id)
        return record

    async def _take_reports(self) -> None:
        replica, report = await self._inbox.get()
        run = self._running.get(replica.video_id or "")
        await reports.take(self, replica, run, report, is_stopping=self._is_stopping)
        self.wake()

    async def _hand_out(self) -> None:
        await self._work.wait()
        self._work.clear()
        try:
            while free := [replica for replica in self._replicas if replica.is_free]:
                if self._is_stopping or not await self._give_next(free[0]):
                    return
        except BaseException:
            self.wake()  # another try, after a moment
            raise

    async def _give_next(self, replica: Replica) -> bool:
        """Give a worker the next video; whether there was one. Those whose worker died come first."""
        async with self._queue:
            run = next((run for run in self._running.values() if run.replica is None), None)
            if run is None:
                most, own = self.config.limits.max_running_per_key, self.config.running_limits()
                record = await asyncio.to_thread(self.store.next_queued, most, own)
                if record is None:
                    return False
                run = Running(feed=self.feeds.of(record.id))
                begun = {"status": Status.IN_PROGRESS, "started_at": int(time.time())}
                await self.ledger.write_now(record.id, "status", status_data(record, **begun), **begun)
                self._running[record.id] = run
            if not replica.is_free or self._is_stopping:
                return True  # it died meanwhile: the video waits for the next
            run.replica, replica.video_id = replica, run.id
            replica.send(run.order(self.config))
            if run.holds:
                run.tell_hold()
        return True

    async def _watch(self) -> None:
        before = last_expiry = time.monotonic()
        while True:
            await asyncio.sleep(WATCH_EVERY_S)
            now = time.monotonic()
            for replica in self._replicas:
                replica.watch(is_late=now - before > LATE_S)
            before = now
            for run in self._running.values():
                run.keep_pace(self.config.timings.session_lead_s)
                if run.is_quiet(now):
                    run.told_at = now
                    self.feeds.publish_progress(run.id, run.progress)
            if now - last_expiry > EXPIRE_EVERY_S:
                last_expiry = now
                await self.expire()

    async def expire(self) -> None:
        """Delete videos whose time is over."""
        for record in await asyncio.to_thread(self.store.expired, int(time.time())):
            try:
                await self.remove(record.id)
            except ApiError:
                LOG.info("%s was deleted or resumed meanwhile", record.id)
