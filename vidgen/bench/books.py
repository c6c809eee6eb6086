"""What a rank does beside running the model and the solver: messages, the timetable, what blocks lend."""

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from vidgen.bench.rendering import PROMPT
from vidgen.config import parse_job
from vidgen.denoise.loop import FinishedBlock, LoopState
from vidgen.engine import Engine
from vidgen.parallel.first import FirstStage, OfferedChange, default_in_flight
from vidgen.parallel.pipeline import Links
from vidgen.parallel.place import random_model
from vidgen.parallel.planner.hardware import Rate
from vidgen.parallel.shapes import Shapes
from vidgen.parallel.topology import Stage
from vidgen.parallel.transport import Header, InProcessLink

FRAMES, STEPS, BLOCK = 65, 8, 4  # a queue of a few blocks
QUEUE = {"timetable": "dualparal", "block_frames": BLOCK, "context_frames": 2, "context_mode": "recompute"}


class _Nobody:
    """A Watcher that wants nothing."""

    def finished(self, block: FinishedBlock) -> None: ...

    def ticked(self, ticks_done: int) -> None: ...

    def save(self, state: LoopState) -> None: ...

    def may_begin(self) -> bool:
        return True

    def should_stop(self) -> bool:
        return False

    def offered(self) -> list[OfferedChange]:
        return []

    def taken_up(self, first_block: int | None) -> None: ...


class _Timed(FirstStage):
    """Knows how much of its thread's time runs of the model took."""

    model_s = 0.0

    def work(self, item: Header, action: Callable[[], Any]) -> Any:
        start = time.thread_time()
        done = super().work(item, action)
        self.model_s += time.thread_time() - start
        return done


def books_s(engine: Engine, model: str, solver: Rate) -> float:
    """Seconds of an item on a CPU rank, from a queue of blocks that one stage with one layer runs.

    Of its thread's time, less what runs of the model take and what the solver does.
    """
    asked = {"num_frames": FRAMES, "num_inference_steps": STEPS, "queue": QUEUE}
    plan = engine.plan(parse_job({"model": model, "prompt": PROMPT, **asked}))
    timetable = replace(plan.task.timetable, switch_step=None)
    layer = random_model(plan.task.model.config, 1, "cpu")
    task = replace(plan.task, model=layer, second_model=None, timetable=timetable)
    shapes, depth = Shapes.of(task), default_in_flight(1)
    itself = InProcessLink(shapes.layouts(timetable)[1], depth=depth)
    run = _Timed(Stage(0, 1, range(1)), task, shapes, Links(itself, itself), max_in_flight=depth)
    began = time.thread_time()
    run.run(_Nobody())
    taken = time.thread_time() - began
    own = timetable.block(0).num_frames
    _, channels, _, rows, columns = plan.latents_shape
    forwards = sum(len(timetable.forwards(tick)) for tick in range(timetable.num_ticks))
    solver_s = forwards * solver.seconds_of(own * channels * rows * columns)
    return max(0.0, taken - run.model_s - solver_s) / run.stats.items
