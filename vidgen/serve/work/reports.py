"""What the server makes of a worker's words: rows, events, and what comes next for the video."""

import logging
import time
from dataclasses import replace
from typing import TYPE_CHECKING

from vidgen.serve.errors import ApiError
from vidgen.serve.work.housekeeping import is_full
from vidgen.serve.work.messages import (
    Committed,
    Ended,
    Lost,
    Noted,
    Progressed,
    PromptApplied,
    PromptRefused,
    Report,
)  # fmt: skip
from vidgen.serve.work.replica import Replica
from vidgen.serve.work.running import CANCELLED, Running

if TYPE_CHECKING:
    from vidgen.serve.work.scheduler import Scheduler

LOG = logging.getLogger(__name__)
KEEP_EVERY_S = 5.0


async def take(
    scheduler: "Scheduler", replica: Replica, run: Running | None, report: Report, *, is_stopping: bool
) -> None:
    """Take in one report of a worker; `run` is the video that it is on."""
    if isinstance(report, Lost):
        if run is not None:
            await _lost(scheduler, replica, run, is_stopping)
        replica.video_id = None
    elif run is None or getattr(report, "video_id", None) != run.id:
        return  # Ready, or about a video that is no more
    elif isinstance(report, Ended):
        await _ended(scheduler, replica, run, report)
    elif isinstance(report, Progressed):
        await _progressed(scheduler, run, report)
    elif isinstance(report, Committed):
        await _committed(scheduler, run, report)
    elif isinstance(report, PromptApplied):
        run.wishes.discard(report.wish_id)
        data = {
            "event_id": report.wish_id, "frame": report.frame, "seq": report.block, "prompt": report.prompt,
        }  # fmt: skip
        await scheduler.ledger.write(run.id, "prompt_applied", data)
    elif isinstance(report, PromptRefused):
        run.wishes.discard(report.wish_id)
        data = {"event_id": report.wish_id, "message": report.why}
        await scheduler.ledger.write(run.id, "prompt_refused", data)
    elif isinstance(report, Noted):
        await _noted(scheduler, run, report)


async def _noted(scheduler: "Scheduler", run: Running, report: Noted) -> None:
    """Tell it, also when it is about the disk that is full, so that it cannot be kept."""
    data = {"message": report.text}
    try:
        await scheduler.ledger.write_now(run.id, "note", data)
    except ApiError as error:
        if not is_full(error):
            raise
        scheduler.feeds.publish_progress(run.id, run.progress | {"note": report.text})


async def _progressed(scheduler: "Scheduler", run: Running, report: Progressed) -> None:
    """Tell it; keep it now and then, for those who ask by polling."""
    run.feed.record = replace(run.record, eta_s=report.eta_s, disk_bytes=report.disk_bytes)
    scheduler.feeds.publish_progress(run.id, run.progressed(report))
    if time.monotonic() - run.kept_at > KEEP_EVERY_S:
        run.kept_at = time.monotonic()
        await scheduler.ledger.write(run.id, eta_s=report.eta_s, disk_bytes=report.disk_bytes)


async def _committed(scheduler: "Scheduler", run: Running, report: Committed) -> None:
    if report.index < len(run.feed.chunks):
        return  # told again, because the job goes on
    run.num_deaths = 0
    run.plays(report.num_frames)
    data = {
        "index": report.index, "first_frame": report.first_frame, "num_frames": report.num_frames,
        "num_bytes": report.num_bytes,
    }  # fmt: skip
    await scheduler.ledger.write(
        run.id, "chunk", data, chunks_done=report.index + 1, eta_s=run.record.eta_s,
        frames_done=report.first_frame + report.num_frames, disk_bytes=run.record.disk_bytes,
    )  # fmt: skip
    run.keep_pace(scheduler.config.timings.session_lead_s)


async def _ended(scheduler: "Scheduler", replica: Replica, run: Running, report: Ended) -> None:
    """The worker has let go of the video."""
    try:
        if report.outcome == "interrupted":
            await scheduler.ledger.write(run.id, disk_bytes=report.disk_bytes)
            scheduler.release(run)  # in progress still: the next server resumes it
            return
        chunks_done = len(run.feed.chunks)
        record = await scheduler.ledger.write(
            run.id, chunks_done=chunks_done, frames_done=report.frames_done, disk_bytes=report.disk_bytes
        )
        await scheduler.end(record, run.ending(report))
    finally:
        replica.video_id = None


async def _lost(scheduler: "Scheduler", replica: Replica, run: Running, is_stopping: bool) -> None:
    """A worker died over a video: another goes on with it, unless that has happened too often.

    Until all that is said, the video counts as the dead worker's, so that nobody takes it.
    """
    limit = scheduler.config.limits.max_attempts
    run.num_deaths += 1
    await scheduler.refuse_wishes(run, "the worker was lost before it was applied; ask again")
    if run.num_deaths < limit and not is_stopping and run.stop != "cancel":
        why = replica.facts().fault or f"worker {replica.index} was lost"
        LOG.warning("%s: %s; another goes on with it", run.id, why)
        data = {"message": f"{why}; it goes on from its last chunk"}
        await scheduler.ledger.write(run.id, "note", data, attempt=run.record.attempt + 1)
    if run.stop == "cancel":
        await scheduler.end(run.record, CANCELLED)
    elif is_stopping:
        scheduler.release(run)
    elif run.num_deaths >= limit:
        message = f"its worker died {limit} times over the same chunk; see the server's log"
        await scheduler.end(run.record, ("worker_died", message))
    else:
        run.only_finish = run.only_finish or run.stop == "finish"
        run.replica = None
