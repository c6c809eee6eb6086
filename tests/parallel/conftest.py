"""Small random models and tasks, and pipelines of threads that run them."""

import copy
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

from vidgen.conditioning.prompts import BlockTexts, Timeline
from vidgen.denoise.lending import Lent
from vidgen.denoise.lockstep import ClipAttention
from vidgen.denoise.loop import FinishedBlock, LoopState, Task
from vidgen.model.dit import DiT
from vidgen.parallel.first import FirstStage, OfferedChange, attending_of, default_in_flight
from vidgen.parallel.lanes.clip import SplitClips
from vidgen.parallel.lanes.exchange import Exchange, in_process
from vidgen.parallel.lanes.lane import Lane
from vidgen.parallel.lanes.lead import Follower, Lead, Leader
from vidgen.parallel.lanes.sequence import SplitSequence
from vidgen.parallel.pipeline import LaterStage, Links, StageRun
from vidgen.parallel.place import fill, strip
from vidgen.parallel.shapes import Shapes
from vidgen.parallel.shares import join, sequence_index, share
from vidgen.parallel.topology import Axis, Lanes, Stage, Topology, parts
from vidgen.parallel.transport import InProcessLink, MessageLayout
from vidgen.types import Segment


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
    changes: list[tuple[int, OfferedChange]] = field(default_factory=list)  # (not before so many ticks, it)
    changed_at: list[int | None] = field(default_factory=list)

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

    def offered(self) -> list[OfferedChange]:
        return [change for after, change in self.changes if self.ticks_done >= after]

    def taken_up(self, first_block: int | None) -> None:
        self.changed_at.append(first_block)


@dataclass
class PipelineRun:
    """What a pipeline of threads did."""

    watched: Watched
    stages: list[StageRun]
    lent: list[dict[int, Lent]]  # per rank, next tick -> what it has lent
    topology: Topology

    @property
    def latents(self) -> list[Tensor]:
        return [block.latents_BCFYX for block in self.watched.blocks]

    def state(self, next_tick: int) -> LoopState:
        """What was saved before a tick, of all ranks together."""
        shares = {rank: LoopState(next_tick, {}, saved[next_tick]) for rank, saved in enumerate(self.lent)}
        return replace(join(shares, self.topology), blocks=self.watched.states[next_tick].blocks)


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
    first, *rest = models
    return replace(task, model=first, second_model=rest[0] if rest else None, texts=copy.deepcopy(task.texts))


def lane_of(stage: Stage, task: Task, exchanges: dict[Any, Any], tokens_per_frame: int) -> Lane:
    """A rank's lane over exchanges between threads, which are made when the first member asks."""

    def exchange(axis: Axis) -> Exchange:
        ranks = stage.peers(axis)
        if (axis, ranks) not in exchanges:
            exchanges[axis, ranks] = in_process(ranks, timeout_s=20)
        return exchanges[axis, ranks][ranks.index(stage.rank)]

    sequence = clips = None
    if task.clips is not None:
        clips = SplitClips(ClipAttention(task.clips, task.model.config, stage.layers), exchange("clip"))
    if stage.lanes.sequence > 1:
        sequence = SplitSequence(tokens_per_frame, exchange("ulysses"), exchange("ring"))
    guidance = exchange("guidance") if stage.lanes.guidance > 1 else None
    return Lane(sequence=sequence, clips=clips, guidance=guidance)


def leads(num_lanes: int) -> list[Lead]:
    """Who leads, and who follows it."""
    nothing = MessageLayout((), torch.float32)
    words = [InProcessLink(nothing, depth=64, timeout_s=20) for _ in range(num_lanes - 1)]
    return [Leader(words), *(Follower(word) for word in words)]


def run_pipeline(
    task: Task,
    layers_per_stage: tuple[int, ...],
    *,
    lanes: Lanes = Lanes(),  # noqa: B008  plain integers
    state: LoopState | None = None,
    watched: Watched | None = None,
    state_every: int = 0,
    max_in_flight: int | None = None,
    hook: Callable[[StageRun], None] = lambda stage: None,
) -> PipelineRun:
    """Run a task on ranks that are threads of this process."""
    topology, state, watched = Topology(layers_per_stage, lanes), state or LoopState(), watched or Watched()
    num_stages, whole = topology.num_stages, Shapes.of(task)
    in_flight = max_in_flight or default_in_flight(num_stages)
    # whoever follows has heard of every change before the first lane does, as Gang.offer sees to
    changes = [(0, change) for _, change in watched.changes]
    watchers = [watched, *(Watched(changes=changes) for _ in range(lanes.num_lanes - 1))]
    exchanges: dict[Any, Any] = {}
    lead = leads(lanes.num_lanes)
    links: dict[int, InProcessLink] = {}  # by the rank that sends
    stages: list[StageRun] = []
    saved: list[dict[int, Lent]] = [{} for _ in topology.stages()]
    lane_shapes: list[Shapes] = []
    for stage in topology.stages():
        tokens = whole.tokens_per_frame
        if lanes.sequence > 1:
            tokens = len(parts(tokens, lanes.sequence)[sequence_index(stage)])
        lane_shapes.append(whole.holding(tokens))
        forward, back = lane_shapes[-1].layouts(task.timetable)
        links[stage.rank] = InProcessLink(
            back if stage.is_last else forward, timeout_s=20, depth=in_flight if stage.is_last else 2,
            ranks=(stage.rank, stage.after),
        )  # fmt: skip
    for stage, shapes in zip(topology.stages(), lane_shapes, strict=True):
        models = tuple(cut(model, stage) for model in task.models)
        ends = Links(links[stage.before], links[stage.rank])
        own = share(state, stage, whole.tokens_per_frame)
        lane = lane_of(stage, task, exchanges, whole.tokens_per_frame)
        if stage.is_first:
            stages.append(
                FirstStage(
                    stage, _with_models(task, models), shapes, ends, max_in_flight=in_flight,
                    state_every=state_every, lane=lane, lead=lead[stage.lane], state=own,
                )
            )  # fmt: skip
        else:
            stages.append(
                LaterStage(
                    stage, models, task.timetable, shapes, task.runs_at, ends, lane=lane,
                    lent=own.lent, state_every=state_every, attending=attending_of(task, stage, own.lent),
                    backend=task.attention_backend, may_skip=task.cache is not None,
                )
            )  # fmt: skip
        hook(stages[-1])

    errors: list[BaseException] = []

    def work(run: StageRun) -> None:
        torch.set_num_threads(1)
        try:
            if isinstance(run, FirstStage):
                run.run(watchers[run.stage.lane])
            elif isinstance(run, LaterStage):
                run.run(state.next_tick, saved[run.stage.rank].__setitem__)
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
    for stage in topology.stages():
        if stage.is_first:
            states = watchers[stage.lane].states.items()
            saved[stage.rank] = {tick: made.lent for tick, made in states}
    return PipelineRun(watched, stages, saved, topology)


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


@pytest.fixture
def make_changing_task(make_task: Callable[..., Task]) -> Callable[..., tuple[Task, BlockTexts]]:
    """Tasks of one prompt, which may be changed."""

    def make_changing_task(timetable: Any) -> tuple[Task, BlockTexts]:
        segment = Segment(prompt="first", num_frames=100)
        timeline = Timeline((segment,), first_frame=lambda block: block * 4)
        encoded = {name: denoise_tests.random_text(name) for name in ("first", "negative")}
        texts = BlockTexts(timeline, "negative", encoded)
        return replace(make_task(timetable, guidance_scale=2.0), texts=texts), texts

    return make_changing_task


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
