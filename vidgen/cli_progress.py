"""What a render says while it runs: a bar on a terminal, else a line now and then; JSON events if asked."""

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn
from rich.progress import Progress as Bar

from vidgen.cli_exit import write_line
from vidgen.types import Progress

if TYPE_CHECKING:
    from vidgen.config import JobConfig
    from vidgen.run import Rendered

LINE_EVERY_S = 5.0


class RenderView:
    """Shows one render. With `as_json`, stdout gets one event per line and people read stderr.

    Facts are shown when the job begins: only then every setting has been found good. Use as a context
    manager, so that the bar leaves the terminal as it was.
    """

    def __init__(self, as_json: bool) -> None:
        self.as_json = as_json
        self.last: Progress | None = None
        self._console = Console(stderr=as_json, highlight=False, markup=False, emoji=False)
        self._bar: Bar | None = None
        self._task = TaskID(0)
        self._next_line_s = 0.0

    def __enter__(self) -> "RenderView":
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def event(self, name: str, **facts: Any) -> None:
        """One JSON object on stdout, where that was asked for."""
        if self.as_json:
            write_line("stdout", json.dumps({"event": name, **facts}, allow_nan=False))

    def say(self, text: str) -> None:
        """A line for people."""
        write_line("stderr" if self.as_json else "stdout", text)

    def note(self, text: str) -> None:
        """Something went wrong and was mended, or waits for somebody."""
        self.event("note", message=text)
        self.say(f"note    {text}")

    def started(self, job: "JobConfig", folder: Path, progress: Progress) -> None:
        """The facts of a resolved job that is running."""
        self.event(
            "started",
            folder=str(folder),
            num_blocks=progress.num_blocks,
            num_ticks=progress.num_ticks,
            job=job.model_dump(mode="json"),
        )
        for line in _facts(job, folder, progress):
            self.say(line)

    def progress(self, progress: Progress) -> None:
        """Where it stands after a tick."""
        self.event(
            "progress",
            **{name: getattr(progress, name) for name in Progress.__dataclass_fields__},
            eta_s=round(progress.eta_s, 3),
            seconds_per_frame=_seconds_per_frame(progress),
        )
        if self._console.is_terminal:
            self._move_bar(progress)
        elif time.monotonic() >= self._next_line_s or progress.ticks_done == progress.num_ticks:
            self._next_line_s = time.monotonic() + LINE_EVERY_S
            self.say(_state(progress))
        self.last = progress

    def finished(self, rendered: "Rendered") -> None:
        """Where everything is and what it took."""
        self.__exit__()
        seconds_per_frame = None
        if self.last is not None:
            share = self.last.ticks_this_run / self.last.num_ticks
            seconds_per_frame = round(rendered.seconds / share / self.last.num_frames, 5)
        self.event(
            "finished",
            output=str(rendered.output),
            sheet=str(rendered.sheet) if rendered.sheet else None,
            folder=str(rendered.folder),
            num_frames=rendered.job.num_frames,
            seed=rendered.job.seed,
            seconds=round(rendered.seconds, 3),
            seconds_per_frame=seconds_per_frame,
            first_frame_s=rendered.first_frame_s,
            evidence=rendered.evidence,
        )
        took = f"finished in {rendered.seconds:.1f} s"
        if seconds_per_frame is not None:
            took += f", {seconds_per_frame:.4f} s per frame"
        if rendered.first_frame_s is not None:
            took += f", first frame after {rendered.first_frame_s:.2f} s"
        self.say(took)
        if rendered.evidence and rendered.evidence.get("attempts"):
            self.say(f"ranks   {_ranks(rendered.evidence)}")
        if rendered.job.attention.sparsity.policy != "none" and rendered.evidence:
            self.say(f"sparse  {_sparse(rendered.evidence)}")
        if rendered.job.cache.method != "none" and rendered.evidence:
            self.say(f"cache   {_cached(rendered.evidence)}")
        self.say(f"video   {rendered.output}")
        if rendered.sheet:
            self.say(f"sheet   {rendered.sheet}")

    def _move_bar(self, progress: Progress) -> None:
        if self._bar is None:
            columns = (BarColumn(), TextColumn("{task.description}"))
            self._bar = Bar(*columns, console=self._console, auto_refresh=False, transient=True)
            self._task = self._bar.add_task("", total=progress.num_ticks)
            self._bar.start()
        self._bar.update(
            self._task, completed=progress.ticks_done, description=_state(progress), refresh=True
        )


def _ranks(evidence: dict[str, Any]) -> str:
    last = evidence["attempts"][-1]
    layers = " + ".join(str(count) for count in last["layers_per_rank"])
    lanes = " x ".join(f"{axis} {size}" for axis, size in last["lanes"].items() if size > 1)
    held = f"{layers} layers" + (f" in lanes of {lanes}" if lanes else "")
    best = f"{100 * last['utilisation']:.1f} % of the best possible pipelining, "
    if not last["utilisation"]:  # with steps that are skipped nobody knows the best
        best = ""
    return (
        f"{last['num_ranks']} with {held}, {best}bubbles {100 * last['bubble_share']:.1f} %, "
        f"restarts {evidence['restarts']}"
    )


def _sparse(evidence: dict[str, Any]) -> str:
    from vidgen.sparsity.tally import summarise

    rows = evidence.get("attention")
    if rows is None:  # on ranks, each has its layers
        rows = [row for rank in evidence["attempts"][-1]["ranks"] for row in rank.get("attention", ())]
    found = summarise(rows)
    calls = found["dense"] + found["search"] + found["sparse"]
    recall = (
        "" if found["recall"] is None else f", {100 * found['recall']:.1f} % of attention kept by choices"
    )
    return (
        f"{100 * (found['density'] or 1):.1f} % of (query, key) pairs seen on average{recall}; "
        f"{found['sparse']} of {calls} runs of a layer sparse, {found['search']} searches in "
        f"{found['search_s']:.1f} s"
    )


def _cached(evidence: dict[str, Any]) -> str:
    found = evidence.get("cache") or evidence["attempts"][-1].get("cache") or {"forwards": 0, "skipped": 0}
    share = 100 * found["skipped"] / max(1, found["forwards"])
    return f"{found['skipped']} of {found['forwards']} forwards skipped, {share:.1f} %"


def _facts(job: "JobConfig", folder: Path, progress: Progress) -> list[str]:
    assert job.width and job.height and job.num_frames and job.fps
    scale = job.output.upscale
    shown = f", shown as {job.width * scale}x{job.height * scale}" if scale > 1 else ""
    sparsity = job.attention.sparsity
    approximation = [] if sparsity.policy == "none" else [f"sparse  {sparsity.policy}: an approximation"]
    if job.cache.method != "none":
        approximation.append(f"cache   {job.cache.method}: an approximation")
    return [
        *approximation,
        f"frames  {job.num_frames} of {job.width}x{job.height}{shown}, {job.num_frames / job.fps:.1f} s "
        f"at {job.fps} per second",
        f"model   {job.model}, seed {job.seed}, {job.num_inference_steps} steps, "
        f"guidance {job.guidance_scale:g}, {progress.num_blocks} blocks in {progress.num_ticks} ticks",
        f"job     {folder}",
    ]


def _state(progress: Progress) -> str:
    return (
        f"frames {progress.frames_done}/{progress.num_frames}  "
        f"blocks {progress.blocks_done}/{progress.num_blocks}  "
        f"ticks {progress.ticks_done}/{progress.num_ticks}  "
        f"{_seconds_per_frame(progress):.3f} s/frame  {_readable_s(progress.eta_s)} left"
    )


def _seconds_per_frame(progress: Progress) -> float:
    """Mean over the ticks of this run, so that it is known before the first block is clean."""
    share = progress.ticks_this_run / progress.num_ticks
    return round(progress.seconds / share / progress.num_frames, 5)


def _readable_s(seconds: float) -> str:
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {whole % 60:02d} s"
