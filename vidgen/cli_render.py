"""`vidgen render` and `vidgen resume`: argv to a job, signals to a stop, failures to an exit code."""

import os
import shlex
import signal
import sqlite3
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vidgen.cli_exit import BAD_INPUT, INTERRUPTED, OK, PARTIAL_KEPT, Ended
from vidgen.cli_flags import (
    build_job,
    parallel_changes,
    parse_size,
    takes_job_flags,
    takes_parallel_flags,
)
from vidgen.cli_progress import RenderView
from vidgen.types import Progress

if TYPE_CHECKING:
    from vidgen.run import Rendered

# what a machine does to a good program; anything else is a fault of ours, and its trace is shown
OUTSIDE_CAUSES = (ValueError, OSError, MemoryError, RuntimeError, sqlite3.Error)
Report = Callable[[Progress], None]
Note = Callable[[str], None]
ShouldStop = Callable[[], bool]
Run = Callable[[Report, Note, ShouldStop], "Rendered"]
SHOW_CURSOR = b"\x1b[?25h"
Json = Annotated[bool, typer.Option("--json", help="events on stdout, one JSON object per line")]


@takes_job_flags
def render(
    prompt: Annotated[
        str | None,
        typer.Argument(
            metavar="PROMPT",
            help="What the video is of. Replaces the segments of a config file, as --segments replaces its "
            "prompt (and frame count).",
            show_default=False,
        ),
    ] = None,
    *,
    config: Annotated[
        Path | None, typer.Option("--config", metavar="FILE", help="YAML of a job; flags win over it")
    ] = None,
    segments: Annotated[
        Path | None, typer.Option("--segments", metavar="FILE", help="YAML list of {prompt, num_frames}")
    ] = None,
    size: Annotated[
        str | None, typer.Option("--size", metavar="WxH", help="width and height: 832x480 or 832*480")
    ] = None,
    video_size: Annotated[
        tuple[str, str] | None, typer.Option("--video-size", metavar="H W", help="height and width")
    ] = None,
    job: Annotated[
        Path | None, typer.Option("--job", metavar="DIR", help="of the job (default: beside the output)")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace an earlier job and output")] = False,
    as_json: Json = False,
    **flags: Any,
) -> int:
    """Render a video from a prompt, or from prompts over time.

    Flags win over --config, which wins over the defaults. Ctrl-C once stops after the tick and leaves a job
    that `vidgen resume` goes on with; twice stops at once.
    """
    sizes = parse_size(size) if size is not None else {}
    if video_size is not None:
        if sizes:
            raise ValueError(f"--size {size} and --video-size {' '.join(video_size)}: give one of them")
        sizes = {"height": video_size[0], "width": video_size[1]}
    wanted = build_job({"prompt": prompt, **flags}, config=config, segments=segments, size=sizes)
    output = wanted.output.path
    if not output.name:
        raise ValueError(f"output={str(output)!r}: need the name of a file or folder, for example out.mp4")
    folder = job or output.with_suffix(".job")

    def run(report: Report, note: Note, should_stop: ShouldStop) -> "Rendered":
        from vidgen.render import render
        from vidgen.speeds import LEVELS, describe

        if wanted.speed in LEVELS:
            note(describe(wanted.speed))
        return render(
            wanted, folder=folder, overwrite=overwrite, report=report, note=note, should_stop=should_stop
        )

    return _watch(folder, as_json, run)


@takes_parallel_flags
def resume(
    folder: Annotated[Path, typer.Argument(metavar="JOB", help="The folder of a job.", show_default=False)],
    *,
    as_json: Json = False,
    **flags: Any,
) -> int:
    """Go on with a render that was stopped, to the frames that it would have had, on any number of ranks."""
    changes = parallel_changes(flags)
    from vidgen.journal import Journal

    with Journal(folder) as journal:
        output = journal.job.output.path
        is_finished = journal.fact("finished") and output.exists()
    if is_finished:
        with RenderView(as_json) as view:
            view.event("finished", output=str(output), folder=str(folder), already=True)
            view.say(f"already finished: {output}")
        return OK

    def run(report: Report, note: Note, should_stop: ShouldStop) -> "Rendered":
        from vidgen.render import resume

        return resume(folder, parallel=changes, report=report, note=note, should_stop=should_stop)

    return _watch(folder, as_json, run)


def _watch(folder: Path, as_json: bool, run: Run) -> int:
    """Run a job, show it, and turn the ways in which it can end early into Ended."""
    # signals first: what is imported below takes seconds
    with RenderView(as_json) as view, stop_signals() as should_stop:
        from vidgen.config import parse_job, read_yaml
        from vidgen.run import Interrupted

        def report(progress: Progress) -> None:
            if progress.ticks_this_run:
                view.progress(progress)
            else:
                file = folder / "job.yaml"
                view.started(parse_job(read_yaml(file), str(file)), folder, progress)

        try:
            view.finished(run(report, view.note, should_stop))
        except Interrupted as error:
            view.event("interrupted", folder=str(folder))
            raise Ended(INTERRUPTED, f"interrupted; {_how_to_resume(folder)}") from error
        except Exception as error:
            ended = _ended_by(error, folder, view)
            if ended is None:
                raise
            raise ended from error
    return OK


def _ended_by(error: Exception, folder: Path, view: RenderView) -> Ended | None:
    """What a broken render ends with; None when the error speaks for itself."""
    has_job = os.path.exists(folder / "job.yaml")  # Path.exists raises when the name is too long
    is_fault = not isinstance(error, OUTSIDE_CAUSES)
    if (isinstance(error, ValueError) and view.last is None) or (is_fault and not has_job):
        return None
    what = str(error) if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
    if not has_job:
        return Ended(BAD_INPUT, what)
    if is_fault:
        traceback.print_exception(error)
    last = view.last
    kept = f"{last.frames_done} of {last.num_frames} frames are" if last else "what was finished is"
    view.event("failed", folder=str(folder), message=what)
    return Ended(PARTIAL_KEPT, f"{what}; {kept} kept; {_how_to_resume(folder)}")


def _how_to_resume(folder: Path) -> str:
    return f"go on with: vidgen resume {shlex.quote(str(folder))}"


@contextmanager
def stop_signals() -> Iterator[ShouldStop]:
    """Within, the first SIGINT or SIGTERM makes the yielded function true, the second ends the process."""
    received: list[int] = []

    def handle(number: int, _: object) -> None:
        if received:
            if os.isatty(2):
                os.write(2, SHOW_CURSOR)
            os._exit(INTERRUPTED)  # nothing to tidy: what is on disk is durable, the rest is made again
        received.append(number)
        # not print: the signal may have come in the middle of one
        os.write(2, b"\nvidgen: finishing this tick; once more to abort at once\n")

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
