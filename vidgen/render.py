"""A job from its settings to a file on disk: each stage a line, every block durable once it is clean."""

import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import torch
from safetensors.torch import save_file

from vidgen import __version__
from vidgen.config import JobConfig
from vidgen.denoise.loop import FinishedBlock, run_tick
from vidgen.engine import Engine, Plan
from vidgen.journal import Journal, hold
from vidgen.media.blocks import WrittenBlock
from vidgen.media.segments import replacing
from vidgen.media.sheet import save_sheet
from vidgen.media.sink import Sink, open_sink, upscale
from vidgen.places import check_places, first_missing
from vidgen.types import Progress


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


def render(
    config: JobConfig,
    *,
    folder: Path | None = None,
    overwrite: bool = False,
    report: Callable[[Progress], None] = lambda progress: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Rendered:
    """Render a new job. ValueError in one line, and nothing on disk, for one that cannot be done.

    `folder` is the job's; by default it stands beside the output. `report` is called at the start and after
    every tick; `should_stop` is asked after a tick, and when true the job is left resumable and Interrupted
    raised.
    """
    folder = folder or config.output.path.with_suffix(".job")
    engine = Engine.from_pretrained(config.model)
    plan = engine.plan(config)
    check_places(plan, folder, overwrite)
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
        try:
            run = _Run(engine, plan, journal)
        except (ValueError, OSError):
            for path in made:
                if path is not None:
                    shutil.rmtree(path, ignore_errors=True)  # nothing was made in them yet
            raise
        return run.to_the_end(report, should_stop)


def resume(
    folder: Path,
    *,
    report: Callable[[Progress], None] = lambda progress: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Rendered:
    """Go on with a job where it stopped, to the frames that it would have had. See `render`."""
    with Journal(folder) as journal:
        engine = Engine.from_pretrained(journal.job.model)
        if journal.fact("model_sha256") not in (None, engine.sha256()):
            raise ValueError(f"{folder}: model={journal.job.model} has changed since; start the job anew")
        plan = engine.plan(journal.job)
        with _torch_threads(plan):
            return _Run(engine, plan, journal).to_the_end(report, should_stop)


class _Run:
    """One process's part of a job: opens the sink, runs the ticks that are left, makes the output."""

    def __init__(self, engine: Engine, plan: Plan, journal: Journal) -> None:
        self.engine, self.plan, self.journal = engine, plan, journal
        self.started = time.monotonic()
        self.first_frame_s: float | None = None
        records = journal.written()
        self.num_committed = len(records)
        try:
            self.sink = self._open_sink(records)
        except (ValueError, FileNotFoundError):
            if not records:
                raise
            self.sink = self._open_sink([])
            for record in records:  # a damaged file: make all again from the latents
                block = plan.task.timetable.block(record.block)
                self._commit(FinishedBlock(block, journal.load_latents(record.block)))
        self.state = journal.load_state()
        self.first_tick = self.state.next_tick

    def to_the_end(self, report: Callable[[Progress], None], should_stop: Callable[[], bool]) -> Rendered:
        """Run the ticks that are left. Interrupted when asked to stop before the last."""
        state, num_ticks = self.state, self.plan.task.timetable.num_ticks
        report(self._progress())
        while state.next_tick < num_ticks:
            for finished in run_tick(self.plan.task, state):
                if finished.block.index >= self.num_committed:
                    self._commit(finished)
                    self.num_committed += 1
                self.first_frame_s = self.first_frame_s or time.monotonic() - self.started
            stop = should_stop()
            if stop or state.next_tick % self.plan.job.state_every == 0:
                self.journal.save_state(state)
            report(self._progress())
            if stop and state.next_tick < num_ticks:
                raise Interrupted(str(self.journal.folder))
        return self._finish()

    def _finish(self) -> Rendered:
        job = self.plan.job
        output = self.sink.finish()
        if job.output.save_latents:
            _join_latents(self.journal, job.output.save_latents)
        sheet = _make_sheet(self.engine, self.plan, self.journal)
        self.journal.note("finished", True)
        return Rendered(
            output=output,
            sheet=sheet,
            folder=self.journal.folder,
            job=job,
            seconds=time.monotonic() - self.started,
            first_frame_s=self.first_frame_s,
        )

    def _open_sink(self, done: list[WrittenBlock]) -> Sink:
        job = self.plan.job
        assert job.width and job.height and job.fps
        return open_sink(
            job.output.path,
            self.journal.folder,
            job.width * job.output.upscale,
            job.height * job.output.upscale,
            Fraction(job.fps),
            {"title": job.timeline()[0].prompt, "comment": _metadata(self.engine, job)},
            crf=job.output.crf,
            done=done,
        )

    def _commit(self, finished: FinishedBlock) -> None:
        """Make a block durable: latents, frames, then the journal's row."""
        digest = self.journal.save_latents(finished.block.index, finished.latents_BCFYX)
        frames = upscale(self.engine.frames(finished, self.plan), self.plan.job.output.upscale)
        first_frame = self.engine.first_frame(finished)
        record = self.sink.write(frames, first_frame=first_frame, block=finished.block.index)
        self.journal.commit(record, digest)

    def _progress(self) -> Progress:
        timetable, num_frames = self.plan.task.timetable, self.plan.job.num_frames
        assert num_frames
        return Progress(
            ticks_done=self.state.next_tick,
            num_ticks=timetable.num_ticks,
            blocks_done=self.num_committed,
            num_blocks=timetable.num_blocks,
            frames_done=min(self.num_committed * timetable.block_frames * self.plan.strides[0], num_frames),
            num_frames=num_frames,
            seconds=time.monotonic() - self.started,
            ticks_this_run=self.state.next_tick - self.first_tick,
            first_frame_s=self.first_frame_s,
        )


@contextmanager
def _torch_threads(plan: Plan) -> Iterator[None]:
    """The job's number of threads, within: sums of floats depend on it."""
    before = torch.get_num_threads()
    torch.set_num_threads(plan.job.threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _metadata(engine: Engine, job: JobConfig) -> str:
    """All that is needed to repeat the render, as JSON."""
    facts = {"vidgen": __version__, "torch": torch.__version__, "model_sha256": engine.sha256()}
    return json.dumps({**facts, "job": job.model_dump(mode="json")})


def _join_latents(journal: Journal, target: Path) -> None:
    latents = [journal.load_latents(record.block) for record in journal.written()]
    target.parent.mkdir(parents=True, exist_ok=True)
    with replacing(target) as temporary:
        save_file({"latents": torch.cat(latents, dim=2)}, temporary)


def _make_sheet(engine: Engine, plan: Plan, journal: Journal) -> Path | None:
    """The contact sheet beside the output, each tile over its prompt."""
    job = plan.job
    target = job.output.sheet_path
    if target is None:
        return None
    assert job.num_frames
    segments = plan.timeline.segments
    labels = [segment.prompt for segment in segments for _ in range(segment.num_frames)][: job.num_frames]
    labels += [segments[-1].prompt] * (job.num_frames - len(labels))
    blocks = (
        engine.frames(FinishedBlock(plan.task.timetable.block(r.block), journal.load_latents(r.block)), plan)
        for r in journal.written()
    )
    return save_sheet(blocks, job.num_frames, target, labels=labels)
