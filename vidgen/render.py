"""A job from its settings to a file on disk: each stage a line, every block durable once it is clean."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from vidgen.config import JobConfig, override_parallel
from vidgen.engine import Engine
from vidgen.execute import executor
from vidgen.journal import Journal, hold
from vidgen.live import UNATTENDED, Live
from vidgen.places import check_places, first_missing
from vidgen.planning import Plan
from vidgen.run import Rendered, Run
from vidgen.sharing import check_parallel
from vidgen.types import Progress


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
    with executor(engine, plan, folder, live.gangs) as ticks:
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
                run = Run(engine, plan, journal, ticks, live)
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
        with executor(engine, plan, folder, live.gangs) as ticks, _torch_threads(plan):
            return Run(engine, plan, journal, ticks, live).to_the_end(report, note, should_stop)


def finish_early(folder: Path, *, live: Live = UNATTENDED) -> Rendered:
    """Make the output of a stopped job from the blocks that it has, and call it finished.

    ValueError when it has none.
    """
    with Journal(folder) as journal:
        engine = live.engine or load_engine(journal.job)
        plan = engine.plan(journal.job, journal.load_inputs())
        return Run(engine, plan, journal, None, live).finish()


def load_engine(job: JobConfig) -> Engine:
    """The job's model, without its DiT's weights."""
    return Engine.from_pretrained(
        job.model, dtype=job.dtype, loras=job.loras, tile=job.tile, offload=job.offload,
        text_cache=job.text_cache, with_dit=False,
    )  # fmt: skip


@contextmanager
def _torch_threads(plan: Plan) -> Iterator[None]:
    """The job's number of threads, within: sums of floats depend on it."""
    before = torch.get_num_threads()
    torch.set_num_threads(plan.job.threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
