"""The first stage: it holds the blocks, starts every item and takes the solver's steps.

It runs ahead: an item starts as soon as the versions it reads are back, not when the tick before has ended.
That changes nothing in what is computed, since every read names its version.
"""

import time
from collections import deque
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from vidgen.denoise.lending import Lent
from vidgen.denoise.loop import BlockState, FinishedBlock, LoopState, Task, Window, make_window, take_step
from vidgen.denoise.timetable import Forward
from vidgen.parallel.pipeline import Links, Shapes, StageRun
from vidgen.parallel.topology import Stage
from vidgen.parallel.transport import Header, Kind

LOOK_EVERY_S = 0.02


class Watcher(Protocol):
    """Whom the first stage answers to."""

    def finished(self, block: FinishedBlock) -> None:
        """A block is clean."""
        ...

    def ticked(self, ticks_done: int) -> None:
        """All velocities of one more tick are back."""
        ...

    def save(self, state: LoopState) -> None:
        """The state after a tick, with what this stage's layers have lent."""
        ...

    def may_begin(self) -> bool:
        """Whether there is room for what the next tick finishes."""
        ...

    def should_stop(self) -> bool: ...


@dataclass
class InFlight:
    """A forward that has started; its velocities come back one run after the other."""

    tick: int
    forward: Forward
    own: BlockState
    window: Window
    batch: int
    is_last_of_tick: bool
    velocities: list[Tensor] = field(default_factory=list)


class FirstStage(StageRun):
    """See the module. `max_in_flight` items at most are on their way through the stages."""

    def __init__(
        self, stage: Stage, task: Task, shapes: Shapes, links: Links, *, state: LoopState | None = None,
        max_in_flight: int | None = None, keepalive_s: float = 5.0, **options: Any,
    ) -> None:  # fmt: skip
        state = state or LoopState()
        assert task.still is None and not task.timetable.joint, "in one process only"
        super().__init__(
            stage,
            task.models,
            task.timetable,
            shapes,
            task.runs_at,
            links,
            lent=state.lent,
            sparsity=task.sparsity,
            backend=task.attention_backend,
            **options,
        )
        self.task = task
        self.blocks = dict(state.blocks)
        self.next_tick = self.ticks_done = state.next_tick
        self.max_in_flight = max_in_flight or default_in_flight(stage.num_stages)
        self.keepalive_s = keepalive_s
        self._in_flight: deque[tuple[InFlight, Header]] = deque()
        self._came_back_slot = 0  # of the newest result, which was taken because somebody needed it
        self._lent_after: dict[int, Lent] = {}

    @torch.inference_mode()
    def run(self, watcher: Watcher) -> int:
        """Run all ticks that are left, or until asked to stop; the tick that was not run."""
        while self.next_tick < self.timetable.num_ticks:
            if not self._wait_for_leave(watcher):
                return self._stop(watcher)
            self._start_tick(watcher)
        self._take_all(watcher)
        self.links.outgoing.flush()
        self.doing = "done"
        return self.next_tick

    def _start_tick(self, watcher: Watcher) -> None:
        tick = self.next_tick
        forwards = self.timetable.forwards(tick)
        for forward in forwards:
            self._take_what_it_reads(forward, watcher)
            own = self.blocks[forward.block]
            window = make_window(self.task, self.blocks, forward, own)
            texts = self.task.run_texts(self.timetable.block(forward.block), forward.step)
            started = InFlight(tick, forward, own, window, self.shapes.batch, forward is forwards[-1])
            self.lending.begin(forward)
            for run, text in enumerate(texts):
                while len(self._in_flight) >= self.max_in_flight:
                    self._take_one(watcher)
                item = Header(Kind.WORK, tick, forward.block, forward.step, run)
                item = item._replace(slot=self.next_slot(self._came_back_slot))
                parts = self.work(item, partial(self._compute, item, window, text))
                self.send(item, parts)
                self._in_flight.append((started, item))
        self.end_tick(tick)
        if self.is_saved_after(tick):
            self._lent_after[tick] = self.lending.lent.copy()
        self.next_tick = tick + 1

    def _compute(self, item: Header, window: Window, text: Tensor) -> tuple[Tensor, ...]:
        latents, _ = window.repeated(text.shape[0])
        shared = self.task.conditioning(item.step, window.levels, text)
        tokens = self.model_at(item).embed(latents)
        tokens = self.run_layers(item, tokens, shared, window.frames_before)
        return tokens, shared.noise_BFD, shared.noise_BF6D, shared.text_BND

    def _take_what_it_reads(self, forward: Forward, watcher: Watcher) -> None:
        """Take results until the versions that a forward reads are here."""
        reads = [(forward.block, forward.step)]
        if forward.before_latents is not None:
            reads.append((forward.before_latents.block, forward.before_latents.step))
        if forward.step == 0 and forward.block not in self.blocks:
            self.blocks[forward.block] = self.task.new_block(self.timetable.block(forward.block))
        for block, steps_done in reads:
            while self.blocks[block].steps_done < steps_done:
                self._take_one(watcher)

    def _take_one(self, watcher: Watcher) -> None:
        """Receive the oldest item's result; with a forward's last one, take the solver's step."""
        header, buffer = self.receive()
        started, item = self._in_flight.popleft()
        if not header.same_item(item):
            raise AssertionError(f"rank {self.stage.index}: expected {item}, got {header}")
        self._came_back_slot = header.slot
        own = started.own
        shapes = self.shapes.result(own.latents_BCFYX.shape[2])
        (out,) = self.links.incoming.layout.read(buffer, shapes)
        window = started.window.own_frames()
        velocity = self.model_at(item).velocity(out, *window.repeated(started.batch))
        started.velocities.extend(velocity.split(1))
        if len(started.velocities) < self.task.branches_at(started.forward.step):
            return
        block = started.forward.block
        stepped = take_step(self.task, started.forward, own, started.velocities)
        self.blocks[block] = stepped
        if stepped.steps_done == self.timetable.num_steps:
            watcher.finished(FinishedBlock(self.timetable.block(block), stepped.latents_BCFYX))
        if started.is_last_of_tick:
            self._end_tick(started.tick, watcher)

    def _end_tick(self, tick: int, watcher: Watcher) -> None:
        """All of a tick is back: what the blocks are now is the state after it."""
        kept = self.timetable.kept_after(tick)
        for block in [block for block in self.blocks if block < kept.start]:
            del self.blocks[block]
        self.ticks_done = tick + 1
        if self.is_saved_after(tick):
            watcher.save(self._state(kept, self._lent_after.pop(tick)))
        watcher.ticked(self.ticks_done)

    def _state(self, kept: range, lent: Lent) -> LoopState:
        # a block of the next tick may be here already, as noise; the loop would not hold it yet
        blocks = {index: block for index, block in self.blocks.items() if index in kept}
        return LoopState(self.ticks_done, blocks, lent)

    def _take_all(self, watcher: Watcher) -> None:
        while self._in_flight:
            self._take_one(watcher)

    def _wait_for_leave(self, watcher: Watcher) -> bool:
        """Whether the next tick may begin; False when asked to stop instead."""
        if watcher.should_stop():
            return False
        if watcher.may_begin():
            return True
        self._take_all(watcher)
        last = time.monotonic()
        self.doing = "waiting for room"
        while not watcher.may_begin():
            if watcher.should_stop():
                return False
            time.sleep(LOOK_EVERY_S)
            if time.monotonic() - last > self.keepalive_s:
                self.links.outgoing.send(Header(Kind.IDLE))
                last = time.monotonic()
        return True

    def _stop(self, watcher: Watcher) -> int:
        """Finish what has started, tell the others, and leave a state."""
        self._take_all(watcher)
        self.send(Header(Kind.STOP, self.next_tick))
        self.links.outgoing.flush()
        if not (self.next_tick and self.is_saved_after(self.next_tick - 1)):
            kept = self.timetable.kept_after(self.next_tick - 1) if self.next_tick else range(0)
            watcher.save(self._state(kept, self.lending.lent.copy()))
        self.doing = "done"
        return self.next_tick


def default_in_flight(num_stages: int, link_depth: int = 1) -> int:
    """Items that may be on their way: one in each stage's hands, and its link full.

    The link back has room for as many, so that no stage ever waits for the first one to take results.
    """
    return num_stages * (1 + link_depth)
