"""A job from its settings to a file on disk: each stage a line, every block durable once it is clean."""

import json
import shutil
import tempfile
import time
from collections.abc import Callable
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
from vidgen.limits import disk_bytes, free_disk_bytes, readable
from vidgen.media.blocks import WrittenBlock
from vidgen.media.segments import replacing
from vidgen.media.sheet import save_sheet
from vidgen.media.sink import Sink, open_sink, upscale
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
    _check_places(plan, folder, overwrite)
    if overwrite and (folder / "job.yaml").exists():
        with hold(folder):
            shutil.rmtree(folder)
    made = [_first_missing(path) for path in (folder, plan.job.output.path)]
    try:
        journal = Journal(folder, create=plan.job)
    except OSError as error:
        raise ValueError(
            f"job={folder}: cannot be written: {error.strerror}; choose another --job"
        ) from error
    with journal:
        journal.note("model_sha256", engine.sha256())
        try:
            sink, _ = _open(engine, plan, journal)
        except (ValueError, OSError):
            for path in made:
                if path is not None:
                    shutil.rmtree(path, ignore_errors=True)  # nothing was made in them yet
            raise
        return _run(engine, plan, journal, sink, 0, report, should_stop)


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
        return _run(engine, plan, journal, *_open(engine, plan, journal), report, should_stop)


def _run(
    engine: Engine,
    plan: Plan,
    journal: Journal,
    sink: Sink,
    num_committed: int,
    report: Callable[[Progress], None],
    should_stop: Callable[[], bool],
) -> Rendered:
    job, timetable = plan.job, plan.task.timetable
    assert job.threads and job.num_frames
    torch.set_num_threads(job.threads)
    started, first_frame_s = time.monotonic(), None
    state = journal.load_state()
    first_tick = state.next_tick

    def progress() -> Progress:
        assert job.num_frames
        return Progress(
            ticks_done=state.next_tick,
            num_ticks=timetable.num_ticks,
            blocks_done=num_committed,
            num_blocks=timetable.num_blocks,
            frames_done=min(num_committed * timetable.block_frames * plan.strides[0], job.num_frames),
            num_frames=job.num_frames,
            seconds=time.monotonic() - started,
            ticks_this_run=state.next_tick - first_tick,
            first_frame_s=first_frame_s,
        )

    report(progress())
    while state.next_tick < timetable.num_ticks:
        for finished in run_tick(plan.task, state):
            if finished.block.index >= num_committed:
                _commit(engine, plan, journal, sink, finished)
                num_committed += 1
            first_frame_s = first_frame_s or time.monotonic() - started
        stop = should_stop()
        if stop or state.next_tick % job.state_every == 0:
            journal.save_state(state)
        report(progress())
        if stop and state.next_tick < timetable.num_ticks:
            raise Interrupted(str(journal.folder))
    output = sink.finish()
    if job.output.save_latents:
        _join_latents(journal, job.output.save_latents)
    sheet = _make_sheet(engine, plan, journal)
    journal.note("finished", True)
    seconds = time.monotonic() - started
    return Rendered(
        output=output,
        sheet=sheet,
        folder=journal.folder,
        job=job,
        seconds=seconds,
        first_frame_s=first_frame_s,
    )


def _open(engine: Engine, plan: Plan, journal: Journal) -> tuple[Sink, int]:
    """(the sink, how many blocks it holds). Damaged files of blocks are made again from their latents."""
    records = journal.written()
    try:
        return _sink(engine, plan, journal, records), len(records)
    except (ValueError, FileNotFoundError):
        if not records:
            raise
    sink = _sink(engine, plan, journal, [])
    for record in records:
        block = plan.task.timetable.block(record.block)
        _commit(engine, plan, journal, sink, FinishedBlock(block, journal.load_latents(record.block)))
    return sink, len(records)


def _sink(engine: Engine, plan: Plan, journal: Journal, done: list[WrittenBlock]) -> Sink:
    job, scale = plan.job, plan.job.output.upscale
    assert job.width and job.height and job.fps
    return open_sink(
        job.output.path,
        journal.folder,
        job.width * scale,
        job.height * scale,
        Fraction(job.fps),
        {"title": job.timeline()[0].prompt, "comment": _metadata(engine, job)},
        crf=job.output.crf,
        done=done,
    )


def _commit(engine: Engine, plan: Plan, journal: Journal, sink: Sink, finished: FinishedBlock) -> None:
    """Make a block durable: latents, frames, then the journal's row."""
    digest = journal.save_latents(finished.block.index, finished.latents_BCFYX)
    frames = upscale(engine.frames(finished, plan), plan.job.output.upscale)
    record = sink.write(frames, first_frame=engine.first_frame(finished), block=finished.block.index)
    journal.commit(record, digest)


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


def _check_places(plan: Plan, folder: Path, overwrite: bool) -> None:
    """ValueError unless everything the job writes can be written and nothing is lost by it."""
    job, output = plan.job, plan.job.output
    outputs = {"output": output.path, "save_latents": output.save_latents, "sheet": output.sheet_path}
    taken: dict[Path, str] = {}
    for name, path in outputs.items():
        if path is None:
            continue
        if path.absolute() in taken:
            raise ValueError(f"{name}={path}: is also the {taken[path.absolute()]}; give it another name")
        taken[path.absolute()] = name
        _check_writable(name, path)
        if not path.exists() or overwrite:
            continue
        if path.is_file() or any(path.iterdir()):
            raise ValueError(f"{name}={path}: exists; give another name or --overwrite")
    _check_writable("job", folder)
    if (folder / "job.yaml").exists() and not overwrite:
        raise ValueError(
            f"job={folder}: exists; `vidgen resume {folder}` goes on with it, --overwrite starts anew"
        )
    if folder.exists() and any(folder.iterdir()) and not (folder / "job.yaml").exists():
        raise ValueError(f"job={folder}: is not a job's folder and not empty; choose another --job")
    assert job.height and job.width
    needed = disk_bytes(job, plan.task.model.config.latent_channels, plan.strides)
    free = free_disk_bytes(folder)
    if needed > free:
        raise ValueError(
            f"{job.num_frames} frames need about {readable(needed)} of disk, {readable(free)} are free at "
            f"{folder.absolute().parent}; free some or choose another --job and --output"
        )


def _first_missing(path: Path) -> Path | None:
    """The topmost folder that making this path would make; None when it is there."""
    missing = None
    for place in (path.absolute(), *path.absolute().parents):
        if place.exists():
            break
        missing = place
    return missing


def _check_writable(name: str, path: Path) -> None:
    """ValueError unless a file can be made at the nearest folder that is there."""
    there = path.absolute().parent
    while not there.exists():
        there = there.parent
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise ValueError(f"{name}={path}: {there} cannot be written: {error.strerror}") from error
