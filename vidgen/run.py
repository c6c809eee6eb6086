"""One process's part of a job: what the ticks give becomes durable, and at last the output."""

import errno
import json
import sqlite3
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from vidgen.conditioning.prompts import BlockTexts, PromptChange
from vidgen.config import JobConfig
from vidgen.engine import Engine
from vidgen.execute import Executor
from vidgen.journal import Journal
from vidgen.live import Live, Wish
from vidgen.media.blocks import WrittenBlock
from vidgen.media.segments import write_atomically
from vidgen.media.sink import Sink, open_sink, upscale
from vidgen.parallel.steps import Decoded, Hooks, Step
from vidgen.planning import Plan
from vidgen.products import join_latents, make_sheet, metadata
from vidgen.types import Progress

RETRY_EVERY_S = 1.0
Made = TypeVar("Made")


class Interrupted(Exception):
    """A render was asked to stop and left a resumable job."""


@dataclass(frozen=True, kw_only=True)
class Rendered:
    """What a finished job made."""

    output: Path
    sheet: Path | None
    folder: Path
    job: JobConfig
    seconds: float
    first_frame_s: float | None
    evidence: dict[str, Any] | None  # of ranks: slots, bubbles, bytes, memory, restarts


class Run:
    """One process's part of a job: opens the sink, commits what the ticks give, makes the output."""

    def __init__(
        self, engine: Engine, plan: Plan, journal: Journal, ticks: Executor | None, live: Live
    ) -> None:
        self.engine, self.plan, self.journal, self.ticks, self.live = engine, plan, journal, ticks, live
        for change in journal.fact("changes") or []:
            self._hold(PromptChange(**change))
        self._offered: deque[Wish] = deque()
        self.started = time.monotonic()
        self.first_frame_s: float | None = None
        self.note: Callable[[str], None] = lambda text: None
        self.should_stop: Callable[[], bool] = lambda: False
        records = journal.written()
        self.num_committed = len(records)
        try:
            self.sink = self._open_sink(records)
        except (ValueError, FileNotFoundError):
            if not records:
                raise
            self.sink = self._open_sink([])
            decode = self.engine.decoder()
            for record in records:  # a damaged file: make all again from the latents
                latents = journal.load_latents(record.block)
                self._commit(Decoded(block=record.block, latents=latents, frames=decode(latents)))
        self.first_tick = self.ticks_done = journal.load_state().next_tick

    def to_the_end(
        self,
        report: Callable[[Progress], None],
        note: Callable[[str], None],
        should_stop: Callable[[], bool],
    ) -> Rendered:
        """Run the ticks that are left. Interrupted when asked to stop before the last."""
        assert self.ticks is not None

        def log(text: str) -> None:
            self.journal.log(text)
            note(text)

        self.note, self.should_stop = log, should_stop
        self._compare_device()
        report(self._progress())
        hooks = Hooks(
            load_state=self.journal.load_state,
            latents_before=self._latents_before,
            committed_blocks=lambda: self.num_committed,
            should_stop=should_stop,
            note=log,
            placed=self.journal.place,
            check=self.live.check,
        )
        try:
            for step in self.ticks.steps(hooks):
                if self._take(step):
                    report(self._progress())
                self._offer()
            while self._offered:  # nobody took them up
                self._change(None)
        finally:
            self._keep_evidence()
        if self.ticks_done < self.plan.task.timetable.num_ticks:
            raise Interrupted(str(self.journal.folder))
        return self.finish()

    def _offer(self) -> None:
        """Have the prompt changed for blocks that are not admitted yet, as those wish who watch."""
        assert self.ticks is not None
        for wish in self.live.wishes():
            try:
                self._encode(wish.prompt)
            except ValueError as error:  # a prompt that the model cannot use
                self.live.refused(wish, str(error))
                continue
            self._offered.append(wish)
            self.ticks.offer(wish.prompt, wish.transition_blocks)

    def _change(self, first_block: int | None) -> None:
        """The oldest wish that was offered holds from this block on, in a resumed job too."""
        wish = self._offered.popleft()
        if first_block is None:
            self.live.refused(wish, "the last block is being made already")
            return
        change = PromptChange(
            prompt=wish.prompt, first_block=first_block, transition_blocks=wish.transition_blocks
        )
        self._hold(change)
        kept = [*(self.journal.fact("changes") or []), asdict(change)]
        self._with_room(lambda: self.journal.note("changes", kept))
        first_frame = self.plan.first_frame(self.plan.task.timetable.block(first_block))
        self.live.applied(wish, first_block, first_frame)

    def _encode(self, prompt: str) -> Tensor:
        texts = self.plan.task.texts
        assert isinstance(texts, BlockTexts)
        if prompt not in texts.encoded:
            self.engine.family.warn([prompt])
            texts.encoded |= self.engine.family.encode_texts([prompt])
        return texts.encoded[prompt]

    def _hold(self, change: PromptChange) -> None:
        texts = self.plan.task.texts
        assert isinstance(texts, BlockTexts)
        texts.change(change, self._encode(change.prompt))

    def _latents_before(self, block: int) -> Tensor | None:
        """As many latents before a block as a decoder needs to go on with it exactly; None for none."""
        found: list[Tensor] = []
        needed = self.engine.family.warm_up_frames
        while block > 0 and sum(latents.shape[2] for latents in found) < needed:
            block -= 1
            found.insert(0, self.journal.load_latents(block))
        return torch.cat(found, dim=2) if found else None

    def _compare_device(self) -> None:
        """Remember the device of a new job; say so when a job goes on on another one."""
        assert self.ticks is not None
        device, before = self.ticks.device, self.journal.fact("device")
        if before is None:
            self.journal.note("device", device)
        elif before != device:
            self.note(f"begun on {before}, goes on on {device}: frames may differ from here on in last bits")

    def _take(self, step: Step) -> bool:
        """Commit what a step brings; whether it moved the render on."""
        for first_block in step.taken_up:
            self._change(first_block)
        for decoded in step.decoded:
            if decoded.block >= self.num_committed:  # else it was, before a state that is being repeated
                self._commit(decoded)
                self.num_committed += 1
            self.first_frame_s = self.first_frame_s or time.monotonic() - self.started
        if step.state is not None:
            state = step.state
            self._with_room(lambda: self.journal.save_state(state))
        has_moved = bool(step.decoded) or step.ticks_done > self.ticks_done
        self.ticks_done = max(self.ticks_done, step.ticks_done)
        return has_moved

    def _with_room(self, write: Callable[[], Made]) -> Made:
        """What `write` makes; while the disk is full it waits and tries again, until asked to stop."""
        is_waiting = False
        while True:
            try:
                made = write()
            except (OSError, sqlite3.OperationalError) as error:
                if not is_disk_full(error) or self.should_stop():
                    raise
                if not is_waiting:
                    self.note(
                        f"paused: no space left for {self.journal.folder}; free some and it goes on, or stop "
                        f"it and go on later with: vidgen resume {self.journal.folder}"
                    )
                is_waiting = True
                self.live.check()
                time.sleep(RETRY_EVERY_S)
                continue
            if is_waiting:
                self.note("there is room again, going on")
            return made

    def finish(self) -> Rendered:
        """Make the output from the blocks that there are."""
        job = self.plan.job
        output = self._with_room(self.sink.finish)
        latents = job.output.save_latents
        if latents:
            self._with_room(lambda: join_latents(self.journal, latents))
        sheet = self._with_room(lambda: make_sheet(self.plan))
        self._with_room(lambda: self.journal.note("finished", True))
        return Rendered(
            output=output,
            sheet=sheet,
            folder=self.journal.folder,
            job=job,
            seconds=time.monotonic() - self.started,
            first_frame_s=self.first_frame_s,
            evidence=None if self.ticks is None else self.ticks.evidence(),
        )

    def _keep_evidence(self) -> None:
        """Add what running took to JOB/evidence.json, a list with an entry per process."""
        assert self.ticks is not None
        evidence, path = self.ticks.evidence(), self.journal.folder / "evidence.json"
        if evidence is None:
            return
        earlier = json.loads(path.read_text()) if path.exists() else []
        with suppress(OSError):  # a full disk: the render is worth more
            write_atomically(path, json.dumps([*earlier, evidence], indent=1).encode())

    def _open_sink(self, done: list[WrittenBlock]) -> Sink:
        job = self.plan.job
        assert job.width and job.height and job.fps
        return open_sink(
            job.output.path,
            self.journal.folder,
            job.width * job.output.upscale,
            job.height * job.output.upscale,
            Fraction(job.fps),
            {"title": job.timeline()[0].prompt, "comment": metadata(self.engine, job)},
            crf=job.output.crf,
            done=done,
        )

    def _commit(self, decoded: Decoded) -> None:
        """Make a block durable: latents, frames, then the journal's row."""
        block = self.plan.task.timetable.block(decoded.block)
        digest = self._with_room(lambda: self.journal.save_latents(block.index, decoded.latents))
        frames = upscale(self.plan.cut(decoded.frames, block), self.plan.job.output.upscale)
        first_frame = self.plan.first_frame(block)
        record = self._with_room(lambda: self.sink.write(frames, first_frame=first_frame, block=block.index))
        self._with_room(lambda: self.journal.commit(record, digest))
        self.live.committed(record)

    def _progress(self) -> Progress:
        timetable, num_frames = self.plan.task.timetable, self.plan.job.num_frames
        assert num_frames
        return Progress(
            ticks_done=self.ticks_done,
            num_ticks=timetable.num_ticks,
            blocks_done=self.num_committed,
            num_blocks=timetable.num_blocks,
            frames_done=min(
                self.plan.sizes.num_pixel_frames(self.num_committed * timetable.block_frames), num_frames
            ),
            num_frames=num_frames,
            seconds=time.monotonic() - self.started,
            ticks_this_run=self.ticks_done - self.first_tick,
            first_frame_s=self.first_frame_s,
        )


def is_disk_full(error: OSError | sqlite3.OperationalError) -> bool:
    """Whether a write failed for want of space or quota."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return error.sqlite_errorcode == sqlite3.SQLITE_FULL
