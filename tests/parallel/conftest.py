"""Small random models and tasks, and pipelines of threads that run them."""

import importlib.util
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from vidgen.denoise.lending import Lent
from vidgen.denoise.loop import FinishedBlock, LoopState, Task
from vidgen.model.dit import DiT
from vidgen.parallel.first import FirstStage, default_in_flight
from vidgen.parallel.pipeline import LaterStage, Links, Shapes, StageRun
from vidgen.parallel.place import fill, strip
from vidgen.parallel.topology import Stage, Topology
from vidgen.parallel.transport import InProcessLink


def _load(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


denoise_tests = _load("denoise_conftest", Path(__file__).parent.parent / "denoise" / "conftest.py")


@dataclass
class Watched:
    """A Watcher that keeps everything, and may ask to stop after so many ticks."""

    stop_after: int | None = None
    blocks: list[FinishedBlock] = field(default_factory=list)
    states: dict[int, LoopState] = field(default_factory=dict)
    ticks_done: int = 0

    def finished(self, block: FinishedBlock) -> None:
        self.blocks.append(block)

    def ticked(self, ticks_done: int) -> None:
        self.ticks_done = ticks_done

    def save(self, state: LoopState) -> None:
        self.states[state.next_tick] = state

    def may_begin(self) -> bool:
        return True

    def should_stop(self) -> bool:
        return self.stop_after is not None and self.ticks_done >= self.stop_after


@dataclass
class PipelineRun:
    """What a pipeline of threads did."""

    watched: Watched
    stages: list[StageRun]
    lent: list[dict[int, Lent]]  # per stage, next tick -> what its layers have lent

    @property
    def latents(self) -> list[Tensor]:
        return [block.latents_BCFYX for block in self.watched.blocks]


def cut(model: DiT, stage: Stage) -> DiT:
    """A stage's part of a model that is whole in memory."""
    whole = model.state_dict()
    part = strip(model.config, stage).to_empty(device="cpu")

    def read(names: dict[str, Tensor]) -> None:
        for name, tensor in names.items():
            tensor.copy_(whole[name])

    fill(part, stage, read)
    return part


def _with_models(task: Task, models: tuple[DiT, ...]) -> Task:
    return replace(task, model=models[0], second_model=models[1] if len(models) > 1 else None)


def run_pipeline(
    task: Task,
    layers_per_stage: tuple[int, ...],
    *,
    state: LoopState | None = None,
    watched: Watched | None = None,
    state_every: int = 0,
    max_in_flight: int | None = None,
    hook: Callable[[StageRun], None] = lambda stage: None,
) -> PipelineRun:
    """Run a task on stages that are threads of this process."""
    topology, state, watched = Topology(layers_per_stage), state or LoopState(), watched or Watched()
    num_stages = topology.num_stages
    shapes = Shapes.of(task)
    forward, back = shapes.layouts(task.timetable)
    in_flight = max_in_flight or default_in_flight(num_stages)
    links = [InProcessLink(forward, timeout_s=20, ranks=(i, i + 1)) for i in range(num_stages - 1)]
    links.append(InProcessLink(back, timeout_s=20, depth=in_flight, ranks=(num_stages - 1, 0)))
    stages: list[StageRun] = []
    saved: list[dict[int, Lent]] = [{} for _ in range(num_stages)]
    for stage in topology.stages():
        models = tuple(cut(model, stage) for model in task.models)
        ends = Links(links[stage.index - 1], links[stage.index])
        if stage.is_first:
            stages.append(
                FirstStage(
                    stage, _with_models(task, models), shapes, ends, max_in_flight=in_flight,
                    state_every=state_every,
                    state=LoopState(state.next_tick, state.blocks, state.lent.layers(stage.layers)),
                )
            )  # fmt: skip
        else:
            stages.append(
                LaterStage(
                    stage, models, task.timetable, shapes, task.runs_at, ends,
                    lent=state.lent.layers(stage.layers), state_every=state_every, sparsity=task.sparsity,
                    backend=task.attention_backend,
                )
            )  # fmt: skip
        hook(stages[-1])

    errors: list[BaseException] = []

    def work(run: StageRun) -> None:
        torch.set_num_threads(1)
        try:
            if isinstance(run, FirstStage):
                run.run(watched)
            elif isinstance(run, LaterStage):
                run.run(state.next_tick, saved[run.stage.index].__setitem__)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(run,), daemon=True) for run in stages]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 60
    while any(thread.is_alive() for thread in threads) and not errors and time.monotonic() < deadline:
        for thread in threads:
            thread.join(0.01)
    if errors:
        raise errors[0]
    assert not any(thread.is_alive() for thread in threads)
    saved[0] = {tick: made.lent for tick, made in watched.states.items()}
    return PipelineRun(watched, stages, saved)


@pytest.fixture
def pipeline() -> Callable[..., PipelineRun]:
    return run_pipeline


@pytest.fixture(scope="session")
def model() -> Callable[..., DiT]:
    """Small random models by the settings in which they differ from those of tests/denoise."""
    made: dict[Any, DiT] = {}

    def model(**settings: Any) -> DiT:
        key = tuple(sorted(settings.items()))
        if key not in made:
            made[key] = denoise_tests.redraw(DiT(denoise_tests.DiTConfig(**denoise_tests.SIZES | settings)))
        return made[key]

    return model


@pytest.fixture
def make_task(model: Callable[..., DiT]) -> Callable[..., Task]:
    def make_task(
        timetable: Any, *, layers: int = 4, settings: dict[str, Any] | None = None, **options: Any
    ) -> Task:
        mode = options.pop("guidance_mode", None)
        dit = model(num_layers=layers, **(settings or {}))
        task = denoise_tests.make_task(timetable, model=dit, **options)
        return replace(task, guidance_mode=mode) if mode else task

    return make_task


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    """A local Ray cluster of this process, as a render starts one, for all renders of a test file."""
    from vidgen.parallel.cluster import connected

    with connected(None, 4):
        yield


@pytest.fixture(scope="session")
def jobs() -> ModuleType:
    """jobs.py; with importlib import mode a test folder is not on the path."""
    return _load("parallel_jobs", Path(__file__).with_name("jobs.py"))
