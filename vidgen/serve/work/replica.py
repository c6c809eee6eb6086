"""The server's half of a worker: starts its process, hears it, replaces it when it dies or goes silent.

A thread per process starts it, reads what it says and hands that to the event loop; a second one writes, so
that a worker that does not read never blocks the loop. All else belongs to the loop's thread.
"""

import asyncio
import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from queue import SimpleQueue
from typing import Literal

from vidgen.serve.config import ServerConfig
from vidgen.serve.work import body
from vidgen.serve.work.messages import Beat, CannotStart, Lost, Order, Ready, Report

LOG = logging.getLogger(__name__)
State = Literal["starting", "idle", "busy", "lost"]
FIRST_BACKOFF_S, MAX_BACKOFF_S = 0.5, 30.0
STEADY_S = 60.0  # a process that lived so long did not fail for its start
BLOCKED = {signal.SIGINT}


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplicaFacts:
    """A worker as others see it."""

    index: int
    state: State
    beat_age_s: float  # since it was last heard
    video_id: str | None
    device: str | None
    ranks: int
    rank_ages_s: tuple[float, ...]  # since each of them was heard, and last the decoder; none of a single one
    pid: int | None
    restarts: int
    start_s: float | None  # that loading and warming up took
    fault: str | None  # why the last process was lost


class Process:
    """One process and its two threads."""

    def __init__(self, index: int, config: ServerConfig, hear: Callable[["Process", Report], None]) -> None:
        self._index, self._config, self._hear = index, config, hear
        self._loop = asyncio.get_running_loop()
        self._orders: SimpleQueue[Order | None] = SimpleQueue()
        self._process: SpawnProcess | None = None
        self._is_ending = False
        # the process dies with the thread that started it, so this one stays until it is gone
        threading.Thread(target=self._follow, name=f"worker-{index}", daemon=True).start()

    @property
    def pid(self) -> int | None:
        with suppress(ValueError):  # it is gone
            return self._process.pid if self._process else None
        return None

    def send(self, order: Order) -> None:
        self._orders.put(order)

    def kill(self) -> None:
        """End it now, also one that is stopped; `Lost` follows."""
        self._is_ending = True
        if self._process is not None:
            with suppress(ValueError, OSError):  # it is gone
                self._process.kill()

    def _follow(self) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, BLOCKED)  # inherited: Ctrl-C is for the server alone
        context = get_context("spawn")
        ours, theirs = context.Pipe()
        code = None
        try:
            process = context.Process(
                target=body.main,
                args=(self._index, self._config, theirs, os.getpid()),
                name=f"vidgen-worker-{self._index}",
                daemon=True,
            )
            process.start()
            self._process = process
            if self._is_ending:
                process.kill()
            theirs.close()
            writer = threading.Thread(target=self._write, args=(ours,), daemon=True)
            writer.start()
            self._read(ours)
            self._orders.put(None)
            writer.join()
            process.join()
            code = process.exitcode
            process.close()
        except OSError:
            LOG.exception("worker %d cannot be started", self._index)
        finally:
            theirs.close()
            ours.close()
            self._tell(Lost(exit_code=code))

    def _read(self, pipe: Connection) -> None:
        with suppress(EOFError, OSError):
            while True:
                self._tell(pipe.recv())

    def _write(self, pipe: Connection) -> None:
        with suppress(OSError):
            while (order := self._orders.get()) is not None:
                pipe.send(order)

    def _tell(self, report: Report) -> None:
        with suppress(RuntimeError):  # the loop is closed: nobody is left to be told
            self._loop.call_soon_threadsafe(self._hear, self, report)


class Replica:
    """A worker that is always there: one process after another. `tell` gets what they say but beats."""

    def __init__(self, index: int, config: ServerConfig, tell: Callable[["Replica", Report], None]) -> None:
        self.index = index
        self.video_id: str | None = None  # what it is on; whoever gives it work sets this
        self._config, self._tell = config, tell
        self._process: Process | None = None
        self._again: asyncio.TimerHandle | None = None
        self._gone = asyncio.Event()
        self._is_ready = self._is_closing = self._is_replaced = False
        self._device: str | None = None
        self._reason: str | None = None  # why this process is about to end
        self._fault: str | None = None
        self._start_s: float | None = None
        self._num_failures = self._num_starts = 0
        self._started_at = self._heard_at = self._moved_at = time.monotonic()
        self._seen = Beat(video_id=None, num_forwards=0, is_held=False)

    @property
    def is_free(self) -> bool:
        """Whether it can be given a video."""
        return self._is_ready and self.video_id is None and not self._is_closing

    @property
    def is_well(self) -> bool:
        """Whether it is loaded and was heard lately, each of its ranks too."""
        age_s, longest_s = time.monotonic() - self._heard_at, self._config.timings.heartbeat_timeout_s
        ages_s = () if self._seen.is_held else self._seen.rank_ages_s  # who is held asks nobody
        are_there = self._num_ranks == 1 or self._seen.is_held or len(ages_s) == self._num_ranks + 1
        return self._is_ready and are_there and all(age + age_s < longest_s for age in (0.0, *ages_s))

    @property
    def _num_ranks(self) -> int:
        """Of the default model's jobs; 1 where that is not known before they run."""
        model = self._config.models[self._config.default_model]
        ranks = (model.job.get("parallel") or {}).get("ranks", 1)
        return ranks if isinstance(ranks, int) else 1

    @property
    def who(self) -> str:
        """It, in a message."""
        return f"worker {self.index} (pid {self._process.pid if self._process else None})"

    def start(self) -> None:
        """Start a process."""
        self._again = None
        self._gone.clear()
        self._num_starts += 1
        self._is_replaced, self._reason = False, None
        self._started_at = self._heard_at = self._moved_at = time.monotonic()
        self._process = Process(self.index, self._config, self._hear)

    def send(self, order: Order) -> None:
        """Tell the process something; never waits. What a process that dies did not hear is lost."""
        if self._process is not None:
            self._moved_at = time.monotonic()
            self._process.send(order)

    def replace(self, fault: str | None) -> None:
        """Kill the process and start another, at once if it is no fault of its own."""
        if self._process is None or self._is_replaced:
            return
        self._is_replaced = True
        if fault is not None:
            self._reason = fault
            LOG.warning("%s", fault)
        self._process.kill()

    def watch(self, *, is_late: bool = False) -> None:
        """Replace a process that is silent or stuck. `is_late`: we were, so that no clock counts."""
        now, timings = time.monotonic(), self._config.timings
        if self._process is None:
            return
        if is_late or not self.video_id:
            self._moved_at = now
        if is_late:
            self._heard_at = self._started_at = now
        if now - self._heard_at > timings.heartbeat_timeout_s:
            self.replace(f"{self.who} did not answer for {timings.heartbeat_timeout_s:g} s")
        elif not self._is_ready and now - self._started_at > timings.start_timeout_s:
            self.replace(f"{self.who} did not start within {timings.start_timeout_s:g} s")
        elif now - self._moved_at > timings.stall_timeout_s:
            self.replace(f"{self.who} got nowhere for {timings.stall_timeout_s:g} s")

    async def close(self) -> None:
        """Kill the process, and start no other. What it was on can be resumed."""
        self._is_closing = True
        if self._again is not None:
            self._again.cancel()
        if self._process is not None:
            self._process.kill()
            await self._gone.wait()

    def facts(self) -> ReplicaFacts:
        """See ReplicaFacts; ranks are those of the default model's jobs."""
        state: State = "busy" if self.video_id else "idle"
        if not self._is_ready:
            state = "lost" if self._process is None else "starting"
        return ReplicaFacts(
            index=self.index,
            state=state,
            beat_age_s=time.monotonic() - self._heard_at,
            video_id=self.video_id,
            device=self._device,
            ranks=self._num_ranks,
            rank_ages_s=tuple(age + time.monotonic() - self._heard_at for age in self._seen.rank_ages_s),
            pid=self._process.pid if self._process else None,
            restarts=max(0, self._num_starts - 1),
            start_s=self._start_s,
            fault=self._fault,
        )

    def _hear(self, process: Process, report: Report) -> None:
        if process is not self._process:
            return
        now = time.monotonic()
        self._heard_at = now
        if isinstance(report, Beat):
            if report.is_held or replace(report, rank_ages_s=self._seen.rank_ages_s) != self._seen:
                self._moved_at = now
            self._seen = report
            return
        self._moved_at = now
        if isinstance(report, Ready):
            self._is_ready, self._device, self._start_s = True, report.device, now - self._started_at
        elif isinstance(report, CannotStart):
            self._reason = f"{self.who} cannot start: {report.message}"
            LOG.error("%s", self._reason)
        elif isinstance(report, Lost):
            self._lost(report)
        self._tell(self, report)

    def _lost(self, report: Lost) -> None:
        has_lived_s = time.monotonic() - self._started_at
        was_well, self._is_ready, self._process = self._is_ready, False, None
        self._gone.set()
        if self._is_closing:
            return
        if self._reason is None and not self._is_replaced:
            self._reason = f"worker {self.index} ended by itself (exit code {report.exit_code})"
            LOG.warning("%s", self._reason)
        self._fault = self._reason or self._fault
        is_fault = not (self._is_replaced and was_well)
        if has_lived_s > STEADY_S or not is_fault:
            self._num_failures = 0
        wait_s = min(MAX_BACKOFF_S, FIRST_BACKOFF_S * 2**self._num_failures) if is_fault else 0.0
        self._num_failures += is_fault
        self._again = asyncio.get_running_loop().call_later(wait_s, self.start)
