"""One rank: places its layers, meets the others, runs its part of a render in a thread, answers polls.

Nothing here knows Ray: whoever holds the object calls `begin` and `start` for a render, and `poll` now and
then. What it has placed it keeps for the next render that asks for the same.
"""

import dataclasses
import os
import socket
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from vidgen.denoise.loop import FinishedBlock, LoopState, Task
from vidgen.denoise.skipping import skips_forwards
from vidgen.model.dit import DiT
from vidgen.model.weights import Weights
from vidgen.parallel.costs import Costs, measure_costs
from vidgen.parallel.first import FirstStage, OfferedChange, attending_of, default_in_flight
from vidgen.parallel.links import Ways, link_depth, open_ways
from vidgen.parallel.memory import peak_memory_bytes
from vidgen.parallel.pipeline import LaterStage, StageRun, Stats
from vidgen.parallel.place import Placed, place
from vidgen.parallel.steps import blocks_before
from vidgen.parallel.topology import Stage, Topology
from vidgen.parallel.torch_links import connect, disconnect, listen
from vidgen.parallel.transport import TransportError

Emit = Callable[[int, Tensor], None]  # (block, clean latents)


@dataclass(frozen=True, kw_only=True)
class Blueprint:
    """What every rank of a render is told. The task's models lie on the meta device."""

    task: Task
    weights: tuple[Weights, ...]  # of each of the task's models
    threads: int
    state_every: int
    link_timeout_s: float
    queue_blocks: int  # finished blocks that may wait to be committed
    trace: bool = True
    compile: bool = False
    device: str = "cpu"
    links: Literal["auto", "gloo"] = "auto"  # gloo: also where memory could be shared


@dataclass(frozen=True, kw_only=True)
class Whereabouts:
    """Where a rank runs."""

    pid: int
    host: str
    node: str
    peak_memory_bytes: int  # before it has loaded anything


@dataclass(frozen=True, kw_only=True)
class Failure:
    """Why a rank's part ended early. `peer` is set when it lost another rank, which may be the true cause."""

    message: str
    trace: str
    peer: int | None = None


@dataclass(frozen=True, kw_only=True)
class Report:
    """A rank's answer to a poll: what is new since the last one, and where it stands."""

    doing: str
    doing_s: float
    ticks_done: int = 0
    states: list[tuple[int, LoopState]] = field(default_factory=list)
    spans: list[tuple[float, ...]] = field(default_factory=list)
    stats: dict[str, Any] = field(default_factory=dict)
    taken_up: list[int | None] = field(default_factory=list)  # see Watcher.taken_up
    ended_at: int | None = None  # the tick that was not run
    failure: Failure | None = None


class Rank:
    """One rank. `emit` is called on the first rank with every clean block."""

    def __init__(self, index: int, emit: Emit | None = None, host: str = "127.0.0.1", node: str = "") -> None:
        self.index, self.host, self.node = index, host, node
        self._emit = emit
        self._kept: dict[str, Placed] = {}
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()

    def begin(self, blueprint: Blueprint) -> None:
        """Be part of this render from now on; the one before has ended."""
        if self._thread is not None:
            self._thread.join(blueprint.link_timeout_s)
            assert not self._thread.is_alive(), f"rank {self.index}: the render before has not ended"
        self.blueprint = blueprint
        self._door: socket.socket | None = None
        self._stage_run: StageRun | None = None
        self._placed: list[Placed] = []
        self._states: list[tuple[int, LoopState]] = []
        self._offered: list[OfferedChange] = []
        self._taken_up: list[int | None] = []
        self._ended_at: int | None = None
        self._failure: Failure | None = None
        self._doing = ("starting", time.monotonic())
        self._ticks_done = 0
        self._finished_blocks = self._committed_blocks = 0
        self._stop = False
        self._given_up = threading.Event()

    def where(self) -> Whereabouts:
        return Whereabouts(
            pid=os.getpid(), host=self.host, node=self.node, peak_memory_bytes=peak_memory_bytes()
        )

    def measure(self) -> Costs:
        """Seconds of a layer and of the ends, on this rank's device."""
        with threads(self.blueprint.threads):
            return measure_costs(self.blueprint.task, torch.device(self.blueprint.device))

    def open_door(self) -> tuple[str, int]:
        """Where the others can meet this rank."""
        self._door = listen(self.host)
        return self.host, self._door.getsockname()[1]

    def start(self, topology: Topology, state: LoopState, meet_at: tuple[str, int]) -> None:
        """Begin this rank's part from a state that holds its layers' share of what has been lent."""
        stage = topology.stage(self.index)
        self._thread = threading.Thread(target=self._guarded, args=(stage, state, meet_at), daemon=True)
        self._thread.start()

    def offer(self, change: OfferedChange) -> None:
        """Another prompt, for the first stages: it holds as soon as it can, see Report.taken_up."""
        self._offered.append(change)

    def give_up(self) -> None:
        """End this rank's part before its next item; the others find their links closed."""
        self._given_up.set()

    def is_at_rest(self, timeout_s: float) -> bool:
        """Whether its part has ended, or does in time."""
        if self._thread is not None:
            self._thread.join(timeout_s)
        return self._thread is None or not self._thread.is_alive()

    def poll(self, *, stop: bool = False, committed_blocks: int = 0) -> Report:
        """What is new. `stop` asks for an end after the tick; `committed_blocks` makes room for more."""
        self._stop = self._stop or stop
        self._committed_blocks = max(self._committed_blocks, committed_blocks)
        run = self._stage_run
        with self._lock:
            ended_at, failure = self._ended_at, self._failure  # before states: these are complete then
            states, self._states = self._states, []
            taken_up, self._taken_up = self._taken_up, []
        spans = []
        if run is not None:
            fresh, run.stats.spans = run.stats.spans, []
            spans = [dataclasses.astuple(span) for span in fresh]
            if run.doing != self._doing[0]:
                self._doing = (run.doing, time.monotonic())
        return Report(
            doing=self._doing[0],
            doing_s=time.monotonic() - self._doing[1],
            ticks_done=self._ticks_done,
            states=states,
            spans=spans,
            stats=self._stats(run),
            taken_up=taken_up,
            ended_at=ended_at,
            failure=failure,
        )

    # a Watcher of the first stage

    def finished(self, block: FinishedBlock) -> None:
        self._finished_blocks = block.block.index + 1
        if self._emit is not None:
            self._emit(block.block.index, block.latents_BCFYX.cpu())

    def ticked(self, ticks_done: int) -> None:
        self._ticks_done = ticks_done

    def save(self, state: LoopState) -> None:
        with self._lock:
            self._states.append((state.next_tick, _to_cpu(state)))

    def may_begin(self) -> bool:
        return self._finished_blocks - self._committed_blocks < self.blueprint.queue_blocks

    def should_stop(self) -> bool:
        return self._stop

    def offered(self) -> list[OfferedChange]:
        return self._offered

    def taken_up(self, first_block: int | None) -> None:
        with self._lock:
            self._taken_up.append(first_block)

    def _guarded(self, stage: Stage, state: LoopState, meet_at: tuple[str, int]) -> None:
        try:
            with threads(self.blueprint.threads):
                ended_at = self._run(stage, state, meet_at)
            with self._lock:
                self._ended_at = ended_at
        except BaseException as error:
            peer = error.peer if isinstance(error, TransportError) else None
            message = (
                str(error) if peer is not None else f"rank {self.index}: {type(error).__name__}: {error}"
            )
            with self._lock:
                self._failure = Failure(message=message, trace=traceback.format_exc(), peer=peer)

    def _run(self, stage: Stage, state: LoopState, meet_at: tuple[str, int]) -> int:
        blueprint, device = self.blueprint, torch.device(self.blueprint.device)
        task = blueprint.task
        self._doing = ("loading", time.monotonic())
        self._place(stage, device)
        models: tuple[DiT, ...] = tuple(placed.model for placed in self._placed)
        self._doing = ("meeting the other ranks", time.monotonic())
        door, self._door = self._door, None
        timeout_s = blueprint.link_timeout_s
        groups = connect(
            stage.rank, stage.num_ranks, meet_at, door, own_host=self.host, timeout_s=timeout_s, device=device
        )
        try:
            may_share = blueprint.links == "auto"
            ways = open_ways(stage, task, groups, device, timeout_s, may_share=may_share)
            try:
                return self._work(stage, _to_device(state, device), models, ways)
            finally:
                ways.close()
        finally:
            disconnect()

    def _work(self, stage: Stage, state: LoopState, models: tuple[DiT, ...], ways: Ways) -> int:
        """All ticks that are left; the one that was not run."""
        blueprint, task = self.blueprint, self.blueprint.task
        options: dict[str, Any] = {
            "lane": ways.lane, "given_up": self._given_up, "state_every": blueprint.state_every,
            "trace": blueprint.trace,
        }  # fmt: skip
        self._committed_blocks = self._finished_blocks = blocks_before(task.timetable, state.next_tick)
        if stage.is_first:
            second = models[1] if len(models) == 2 else None
            task = dataclasses.replace(task, model=models[0], second_model=second)
            depth = link_depth(ways.shapes.layouts(task.timetable)[0])
            first = FirstStage(
                stage, task, ways.shapes, ways.links,
                state=state,
                keepalive_s=blueprint.link_timeout_s / 4,
                max_in_flight=default_in_flight(stage.num_stages, depth),
                lead=ways.lead,
                **options,
            )  # fmt: skip
            self._stage_run = first
            return first.run(self)
        later = LaterStage(
            stage, models, task.timetable, ways.shapes, task.runs_at, ways.links,
            lent=state.lent, attending=attending_of(task, stage, state.lent),
            backend=task.attention_backend, may_skip=skips_forwards(task), **options,
        )  # fmt: skip
        self._stage_run = later
        return later.run(state.next_tick, lambda tick, lent: self.save(LoopState(tick, {}, lent)))

    def _place(self, stage: Stage, device: torch.device) -> None:
        """This stage's layers: those of the last render where they are the same, else read."""
        blueprint, kept = self.blueprint, {}
        for model, weights in zip(blueprint.task.models, blueprint.weights, strict=True):
            key = repr((model.config, weights, stage.layers, stage.num_stages, device, blueprint.compile))
            placed = self._kept.get(key)
            if placed is None:
                self._kept = {}  # before others are read: there may be no room for both
                placed = place(weights, model.config, stage, device, compile=blueprint.compile)
            else:
                placed = dataclasses.replace(placed, bytes_read=0)
            kept[key] = placed
            self._placed.append(placed)
        self._kept = kept

    def _stats(self, run: StageRun | None) -> dict[str, Any]:
        found: dict[str, Any] = {"peak_memory_bytes": peak_memory_bytes()}
        if self._placed:
            found["num_parameters"] = sum(placed.num_parameters for placed in self._placed)
            found["bytes_read"] = sum(placed.bytes_read for placed in self._placed)
            found["weight_bytes"] = sum(
                p.numel() * p.element_size() for placed in self._placed for p in placed.model.parameters()
            )
        if torch.device(self.blueprint.device).type == "cuda":
            found["peak_device_bytes"] = torch.cuda.max_memory_allocated()
        if run is not None:
            for name in Stats.__dataclass_fields__:
                if name != "spans":
                    found[name] = getattr(run.stats, name)
            found["bytes_sent"] = run.links.outgoing.bytes_sent
            found["lane_bytes_sent"] = run.lane.bytes_sent
            if self.blueprint.task.sparsity is not None:
                found["attention"] = self.blueprint.task.sparsity.tally.layers()
            if isinstance(run, FirstStage) and self.blueprint.task.cache is not None:
                found["cache"] = run.tally.as_dict()
            found["link"] = type(run.links.outgoing).__name__.removesuffix("Outgoing").lower()
        return found


class threads:
    """Within, torch uses so many threads in this thread: sums of floats depend on it."""

    def __init__(self, num_threads: int) -> None:
        self.num_threads, self.before = num_threads, torch.get_num_threads()

    def __enter__(self) -> None:
        torch.set_num_threads(self.num_threads)

    def __exit__(self, *_: object) -> None:
        torch.set_num_threads(self.before)


def _to_cpu(state: LoopState) -> LoopState:
    return _to_device(state, torch.device("cpu"))


def _to_device(state: LoopState, device: torch.device) -> LoopState:
    """The state with every tensor on the device."""
    blocks = {index: block.to(device) for index, block in state.blocks.items()}
    return LoopState(state.next_tick, blocks, state.lent.to(device))
