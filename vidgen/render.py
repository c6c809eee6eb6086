"""A job from its settings to a file on disk: each stage a line, every block durable once it is clean."""

import errno
import json
import shutil
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from vidgen.conditioning.prompts import BlockTexts, PromptChange
from vidgen.config import JobConfig, override_parallel
from vidgen.engine import Engine
from vidgen.execute import Executor, InOneProcess, check_parallel, executor
from vidgen.journal import Journal, hold
from vidgen.live import UNATTENDED, Live
from vidgen.media.blocks import WrittenBlock
from vidgen.media.segments import write_atomically
from vidgen.media.sink import Sink, open_sink, upscale
from vidgen.parallel.steps import Decoded, Hooks, Step
from vidgen.places import check_places, first_missing
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


def render(
    config: JobConfig,
    *,
    folder: Path | None = None,
    overwrite: bool = False,
    report: Callable[[Progress], None] = lambda progress: None,
    note: Callable[[str], None] = lambda text: None,
    should_stop: Callable[[], bool] = lambda: False,
    live: Live = UNATTENDED,
) -> Rendered:
    """Render a new job. ValueError in one line, and nothing on disk, for one that cannot be done.

    `folder` is the job's; by default it stands beside the output. `report` is called at the start and after
    every tick, `note` with a line for people when something went wrong and was mended; `should_stop` is asked
    after a tick, and when true the job is left resumable and Interrupted raised. `live` is for those who
    watch and change a render while it runs.
    """
    folder = folder or config.output.path.with_suffix(".job")
    engine = live.engine or load_engine(config)
    check_parallel(config.parallel, engine.config.num_layers)
    plan = engine.plan(config)
    check_places(plan, folder, overwrite)
    with executor(engine, plan, folder) as ticks:
        if overwrite and (folder / "job.yaml").exists():
            with hold(folder):
                shutil.rmtree(folder)
        made = [first_missing(path) for path in (folder, plan.job.output.path)]
        try:
            journal = Journal(folder, create=plan.job)
        except OSError as error:
            raise ValueError(
                f"job={folder}: cannot be written: {error.strerror}; choose another --job"
            ) from error
        with journal, _torch_threads(plan):
            journal.note("model_sha256", engine.sha256())
            journal.save_inputs(plan.inputs)
            try:
                run = _Run(engine, plan, journal, ticks, live)
            except (ValueError, OSError):
                for path in made:
                    if path is not None:
                        shutil.rmtree(path, ignore_errors=True)  # nothing was made in them yet
                raise
            return run.to_the_end(report, note, should_stop)


def resume(
    folder: Path,
    *,
    parallel: dict[str, Any] | None = None,
    report: Callable[[Progress], None] = lambda progress: None,
    note: Callable[[str], None] = lambda text: None,
    should_stop: Callable[[], bool] = lambda: False,
    live: Live = UNATTENDED,
) -> Rendered:
    """Go on with a job where it stopped, to the frames that it would have had. See `render`.

    `parallel` replaces settings of the job's `parallel` section for this run.
    """
    with Journal(folder) as journal:
        job = override_parallel(journal.job, parallel or {})
        engine = live.engine or load_engine(job)
        check_parallel(job.parallel, engine.config.num_layers)
        if journal.fact("model_sha256") not in (None, engine.sha256()):
            raise ValueError(f"{folder}: model={job.model} has changed since; start the job anew")
        plan = engine.plan(job, journal.load_inputs())
        with executor(engine, plan, folder) as ticks, _torch_threads(plan):
            return _Run(engine, plan, journal, ticks, live).to_the_end(report, note, should_stop)


def finish_early(folder: Path, *, live: Live = UNATTENDED) -> Rendered:
    """Make the output of a stopped job from the blocks that it has, and call it finished.

    ValueError when it has none.
    """
    with Journal(folder) as journal:
        engine = live.engine or load_engine(journal.job)
        plan = engine.plan(journal.job, journal.load_inputs())
        return _Run(engine, plan, journal, None, live).finish()


def load_engine(job: JobConfig) -> Engine:
    """The job's model, without its DiT's weights."""
    return Engine.from_pretrained(
        job.model, dtype=job.dtype, loras=job.loras, tile=job.tile, offload=job.offload,
        text_cache=job.text_cache, with_dit=False,
    )  # fmt: skip


class _Run:
    """One process's part of a job: opens the sink, commits what the ticks give, makes the output."""

    def __init__(
        self, engine: Engine, plan: Plan, journal: Journal, ticks: Executor | None, live: Live
    ) -> None:
        self.engine, self.plan, self.journal, self.ticks, self.live = engine, plan, journal, ticks, live
        for change in journal.fact("changes") or []:
            self._change(PromptChange(**change))
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
                self._direct()
        finally:
            self._keep_evidence()
        if self.ticks_done < self.plan.task.timetable.num_ticks:
            raise Interrupted(str(self.journal.folder))
        return self.finish()

    def _direct(self) -> None:
        """Change the prompt of blocks that are not admitted yet, as those wish who watch."""
        timetable = self.plan.task.timetable
        first = -(-self.ticks_done // timetable.stride)
        for wish in self.live.wishes():
            if not isinstance(self.ticks, InOneProcess):
                self.live.refused(wish, "the prompt of a render on ranks cannot be changed")
                continue
            if first >= timetable.num_blocks:
                self.live.refused(wish, "the last block is being made already")
                continue
            change = PromptChange(
                prompt=wish.prompt, first_block=first, transition_blocks=wish.transition_blocks
            )
            try:
                self._change(change)
            except ValueError as error:  # a prompt that the model cannot use
                self.live.refused(wish, str(error))
                continue
            kept = [*(self.journal.fact("changes") or []), asdict(change)]
            self._with_room(lambda kept=kept: self.journal.note("changes", kept))
            self.live.applied(wish, self.plan.first_frame(timetable.block(first)))

    def _change(self, change: PromptChange) -> None:
        texts = self.plan.task.texts
        assert isinstance(texts, BlockTexts)
        if change.prompt not in texts.encoded:
            self.engine.family.warn([change.prompt])
            texts.encoded |= self.engine.family.encode_texts([change.prompt])
        texts.timeline.change(change)

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


@contextmanager
def _torch_threads(plan: Plan) -> Iterator[None]:
    """The job's number of threads, within: sums of floats depend on it."""
    before = torch.get_num_threads()
    torch.set_num_threads(plan.job.threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
