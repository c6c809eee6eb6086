"""What a worker does with an order: a render from its beginning, or on from where it was, with a kept model.

Imports torch: only worker processes import this.
"""

import gc
import json
import logging
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch

from vidgen.config import JobConfig, parse_job
from vidgen.denoise.loop import LoopState, run_tick
from vidgen.engine import Engine
from vidgen.execute import choose_device, executor
from vidgen.parallel.cluster import connected, wanted_address
from vidgen.parallel.steps import Hooks
from vidgen.render import finish_early, load_engine, render, resume
from vidgen.run import is_disk_full
from vidgen.serve.config import ServerConfig, merged
from vidgen.serve.work.attempt import Attempt
from vidgen.serve.work.messages import Beat, Ended, Order, Report, Run

if TYPE_CHECKING:
    from vidgen.parallel.standing import Gangs

LOG = logging.getLogger(__name__)
DECIDE_ENGINE = {"model", "dtype", "loras", "tile", "offload", "text_cache", "compile"}
WARM_UP_PROMPT = "a red circle moving left over a gray background"
CANNOT_ALLOCATE = ("out of memory", "can't allocate memory", "not enough memory")
MAX_MESSAGE_CHARACTERS = 500


class Engines:
    """Loaded models: those that the server offers, and one more for a job with settings of its own."""

    def __init__(self) -> None:
        self._kept: dict[str, Engine] = {}
        self._other: tuple[str, Engine] | None = None

    def keep(self, job: JobConfig) -> Engine:
        """Load the model of a job for good."""
        return self._kept.setdefault(_key(job), load_engine(job))

    def of(self, job: JobConfig) -> Engine:
        """The model for a job."""
        key = _key(job)
        if key in self._kept:
            return self._kept[key]
        if self._other is None or self._other[0] != key:
            self.drop_other()  # before the next is loaded: there may be no room for two
            self._other = key, load_engine(job)
        return self._other[1]

    def drop_other(self) -> None:
        self._other = None
        free_memory()


class Worker:
    """Makes one video at a time. A job that fails is told of and leaves the next one untouched."""

    def __init__(self, config: ServerConfig, send: Callable[[Report], None]) -> None:
        self._config, self._send = config, send
        self._engines = Engines()
        self._attempt: Attempt | None = None
        self.device = choose_device("auto")
        self._threads = torch.get_num_threads()  # this worker's share
        self._gangs: Gangs | None = None  # where jobs run on ranks
        self._cluster = ExitStack()

    def warm_up(self) -> None:
        """Load every model and run it once, at the sizes of its default job."""
        for model in self._config.models.values():
            values = merged(merged(model.job, model.session), {"model": model.model})
            if not (values.get("prompt") or values.get("segments")):
                values["prompt"] = WARM_UP_PROMPT
            job = parse_job(values, "warm-up")
            engine = self._engines.keep(job)
            with warnings.catch_warnings(action="ignore"):
                if job.parallel.ranks == 1:
                    run_once(engine, job)
                else:
                    self._warm_ranks(engine, job)

    def _warm_ranks(self, engine: Engine, job: JobConfig) -> None:
        """Join the cluster, which is kept from now on, and have ranks read their layers."""
        from vidgen.parallel.standing import Gangs

        if self._gangs is None:
            address = wanted_address(job.parallel.address)
            ranks = None if job.parallel.ranks == "auto" else job.parallel.ranks
            self._cluster.enter_context(connected(address, ranks))
            self._gangs = Gangs(keeps=True)
        start_ranks(engine, job, self._gangs)

    def tend(self) -> None:
        """While there is nothing to do: see that the ranks are there, and start others if not."""
        if self._gangs is None:
            return
        from vidgen.parallel.gang import GangFailed

        try:
            self._gangs.ping()
            if not self._gangs.is_kept:
                self.warm_up()
        except (GangFailed, RuntimeError) as error:
            LOG.warning("ranks are lost: %s", error)

    def begin(self, run: Run) -> None:
        """Take an order in, so that others about it have somewhere to go."""
        self._attempt = Attempt(run, self._send)

    def hear(self, order: Order) -> None:
        """Hand an order on to the video that it is about, if that is still being made."""
        attempt = self._attempt
        if attempt is not None and getattr(order, "video_id", None) == attempt.run.video_id:
            attempt.hear(order)

    def beat(self) -> Beat:
        attempt = self._attempt
        beat = attempt.beat() if attempt else Beat(video_id=None, num_forwards=0, is_held=False)
        return replace(beat, rank_ages_s=self._gangs.ages_s()) if self._gangs is not None else beat

    def work(self) -> None:
        """Carry out the order that was taken in, and say how it ended."""
        attempt = self._attempt
        assert attempt is not None
        outcome: dict[str, Any]
        try:
            with _notes(attempt):
                outcome = {"outcome": self._make(attempt)}
        except Exception as error:
            outcome = self._failed(attempt, error)
        frames_done, disk_bytes = attempt.frames_done, attempt.weigh(now=True)
        self._attempt = None
        self._send(
            Ended(video_id=attempt.run.video_id, frames_done=frames_done, disk_bytes=disk_bytes, **outcome)
        )
        free_memory()

    def _make(self, attempt: Attempt) -> str:
        """Render to whatever end the parent wishes; the outcome, see Ended."""
        job, folder = _job(attempt), attempt.job_folder
        engine = self._engines.of(job)
        if job.threads is None and not engine.family.recommended.threads:
            job = job.model_copy(update={"threads": self._threads})
        live = replace(attempt.live(engine), gangs=self._gangs)
        is_begun = (folder / "job.yaml").exists()
        if is_begun:
            attempt.tell_committed()
        elif folder.exists():
            shutil.rmtree(folder)  # killed before there was a job
        hooks: dict[str, Any] = {
            "report": attempt.report, "note": attempt.note, "should_stop": attempt.should_stop, "live": live,
        }  # fmt: skip
        try:
            if attempt.stop is None:
                _ = resume(folder, **hooks) if is_begun else render(job, folder=folder, **hooks)
                return self._finished(attempt)
        except Exception:  # whatever it was: the parent wanted an end of it
            if attempt.stop is None:
                raise
        if attempt.stop == "finish" and attempt.frames_done:
            attempt.is_finishing = True
            finish_early(folder, live=live)
            return self._finished(attempt)
        return "interrupted" if attempt.stop == "interrupt" else "cancelled"

    def _finished(self, attempt: Attempt) -> str:
        with suppress(FileNotFoundError):  # the job wants none
            os.replace(attempt.folder / "video.png", attempt.folder / "spritesheet.png")
        return "completed"

    def _failed(self, attempt: Attempt, error: Exception) -> dict[str, Any]:
        code, message = explain(error)
        if code in ("out_of_memory", "render_failed"):
            LOG.error("%s failed", attempt.run.video_id, exc_info=error)
        if code == "out_of_memory":
            self._engines.drop_other()
        if attempt.stop == "cancel":
            return {"outcome": "cancelled"}
        return {
            "outcome": "failed", "code": code, "message": attempt.shown(message)[:MAX_MESSAGE_CHARACTERS],
        }  # fmt: skip


def explain(error: Exception) -> tuple[str, str]:
    """(error code, what to tell) of what ended a render."""
    text = str(error)
    is_memory = isinstance(error, MemoryError | torch.OutOfMemoryError)
    if is_memory or (isinstance(error, RuntimeError) and any(sign in text for sign in CANNOT_ALLOCATE)):
        return "out_of_memory", "not enough memory for this video; choose a smaller size or fewer frames"
    if isinstance(error, OSError) and is_disk_full(error):
        return "disk_full", "no space left on the server's disk; delete videos, then resume it"
    if isinstance(error, ValueError):
        return "invalid_request", text
    return "render_failed", f"{type(error).__name__}: {text.splitlines()[0] if text else ''}"


def run_once(engine: Engine, job: JobConfig) -> None:
    """One tick and the decoding of one block, so that the first video finds everything loaded and chosen."""
    import av  # noqa: F401  its libraries

    plan = engine.plan(job)
    torch.set_num_threads(plan.job.threads or 1)
    engine.load_dit(choose_device(job.device))
    if job.compile:
        engine.compile()
    list(run_tick(plan.task, LoopState()))
    shape = (*plan.latents_shape[:2], plan.task.timetable.block(0).num_frames, *plan.latents_shape[3:])
    engine.decoder()(torch.zeros(shape, device=choose_device(job.device)))


def start_ranks(engine: Engine, job: JobConfig, gangs: "Gangs") -> None:
    """Ranks that wait for such jobs, their weights read. RuntimeError when they cannot be had."""
    plan = engine.plan(job)
    hooks = Hooks(
        load_state=LoopState, latents_before=lambda block: None, committed_blocks=lambda: 0,
        should_stop=lambda: True, note=LOG.warning, placed=lambda places: None,
    )  # fmt: skip
    with TemporaryDirectory() as folder, executor(engine, plan, Path(folder), gangs) as ticks:
        for _ in ticks.steps(hooks):
            pass


def free_memory() -> None:
    """Give back what nobody holds."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _job(attempt: Attempt) -> JobConfig:
    """The job with the places of its files."""
    run = attempt.run
    places: dict[str, Any] = {"output": {"path": str(attempt.folder / "video.mp4")}}
    if run.image is not None:
        places["input"] = {"image": str(run.image)}
    return parse_job(merged(run.job, places), "job")


def _key(job: JobConfig) -> str:
    decided = job.model_dump(mode="json", include=DECIDE_ENGINE)
    return json.dumps([choose_device(job.device), decided], sort_keys=True)


@contextmanager
def _notes(attempt: Attempt) -> Iterator[None]:
    """Within, a warning is a note for whoever watches."""

    def show(message: Warning | str, category: type[Warning], *place: Any) -> None:
        if category is UserWarning:
            attempt.note(str(message))

    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = show
        yield
