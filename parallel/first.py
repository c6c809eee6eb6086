"""The first stage: it holds the blocks, starts every item and takes the solver's steps.

It runs ahead: an item starts as soon as the versions it reads are back, not when the tick before has ended.
That changes nothing in what is computed, since every read names its version.
"""

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from vidgen.conditioning.prompts import BlockTexts, PromptChange
from vidgen.denoise.attending import Attending
from vidgen.denoise.lending import Lent
from vidgen.denoise.loop import (
    BlockState,
    FinishedBlock,
    LoopState,
    Task,
    Window,
    make_window,
    region_of,
    take_steps,
)
from vidgen.denoise.skipping import decide, share_skipped, skips_forwards
from vidgen.denoise.timetable import Forward
from vidgen.kernels.attention.api import attention_backend
from vidgen.model.conditioning import Conditioning
from vidgen.parallel.lanes.lead import Follower, Lead, Leader, Word
from vidgen.parallel.pipeline import GivenUp, Links, StageRun
from vidgen.parallel.shapes import Shapes
from vidgen.parallel.topology import Stage
from vidgen.parallel.transport import Header, Kind
from vidgen.stepcache.cache import Decision, Tally

LOOK_EVERY_S = 0.02


@dataclass(frozen=True, kw_only=True, slots=True)
class OfferedChange:
    """A prompt for all blocks that are not admitted yet."""

    prompt: str
    transition_blocks: int
    text_1NT: Tensor


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

    def offered(self) -> Sequence[OfferedChange]:
        """All changes of the prompt that were ever offered to this rank, in order."""
        ...

    def taken_up(self, first_block: int | None) -> None:
        """The next of them holds from a block on; None when it came too late."""
        ...


@dataclass
class InFlight:
    """A forward that has started; its velocities come back one run after the other, or are known already."""

    tick: int
    forward: Forward
    owns: list[BlockState]
    window: Window
    batch: int
    is_last_of_tick: bool
    decision: Decision | None  # of a step cache
    velocities: list[Tensor] = field(default_factory=list)

    @property
    def is_skipped(self) -> bool:
        return self.decision is not None and self.decision.outputs is not None


class FirstStage(StageRun):
    """See the module. `max_in_flight` items at most are on their way through the stages.

    Of a lane's only stage it is both ends: what it sends itself must have room for as many.
    """

    def __init__(
        self, stage: Stage, task: Task, shapes: Shapes, links: Links, *, state: LoopState | None = None,
        max_in_flight: int | None = None, keepalive_s: float = 5.0, lead: Lead | None = None, **options: Any,
    ) -> None:  # fmt: skip
        state = state or LoopState()
        assert task.still is None, "in one process only"
        super().__init__(
            stage,
            task.models,
            task.timetable,
            shapes,
            task.runs_at,
            links,
            lent=state.lent,
            attending=attending_of(task, stage, state.lent),
            backend=task.attention_backend,
            may_skip=skips_forwards(task),
            **options,
        )
        self.task = task
        self.blocks = dict(state.blocks)
        self.next_tick = self.ticks_done = state.next_tick
        self.max_in_flight = max_in_flight or default_in_flight(stage.num_stages)
        self.keepalive_s, self.lead = keepalive_s, lead or Leader()
        self.num_changes = 0
        self.tally = Tally()
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
            owns = [self.blocks[block] for block, _ in forward.parts]
            window = make_window(self.task, self.blocks, forward, *owns)
            newest, step = forward.parts[-1]
            texts = self.task.run_texts(self.timetable.block(newest), step)
            with attention_backend(self.backend):
                decision = decide(self.task, forward, owns[0], window)
            started = InFlight(
                tick, forward, owns, window, self.shapes.batch, forward is forwards[-1], decision
            )
            self.tally(step, share_skipped(self.task, forward, decision))
            if started.is_skipped:
                self._skip(started, watcher)
                continue
            self.lending.begin(forward)
            for run in self.runs(forward):
                while len(self._in_flight) >= self.max_in_flight:
                    self._take_one(watcher)
                item = Header(Kind.WORK, tick, forward.block, forward.step, run)
                item = item._replace(slot=self.next_slot(self._came_back_slot))
                parts = self.work(item, partial(self._compute, item, started, texts[run]))
                self.send(item, parts)
                self._in_flight.append((started, item))
        self.end_tick(tick)
        if self.is_saved_after(tick):
            self._lent_after[tick] = self.lending.lent.copy()
        self.next_tick = tick + 1

    def _skip(self, started: InFlight, watcher: Watcher) -> None:
        """Tell the other stages that a forward is not run; its step is taken when its turn comes."""
        self.lending.relend(started.forward)
        forward, run = started.forward, self.runs(started.forward)[0]
        item = Header(Kind.SKIP, started.tick, forward.block, forward.step, run, self.stats.last_slot)
        while len(self._in_flight) >= self.max_in_flight:
            self._take_one(watcher)
        if not self.stage.is_last:
            self.send(item)
        self._in_flight.append((started, item))

    def _compute(self, item: Header, started: InFlight, text: Tensor) -> tuple[Tensor, ...]:
        latents, _ = started.window.repeated(text.shape[0])
        shared = self.task.conditioning(item.step, started.window.levels, text)
        tokens = self.model_at(item).embed(latents)
        region = region_of(started.decision, started.window)
        if region is not None:
            before = started.window.frames_before
            tokens, shared = region.cut(tokens[:, before:]), shared.frames(before)
            return self.run_layers(item, tokens, shared, started.forward, region)
        tokens = self.lane.cut(tokens)
        noise, noise6 = (self.lane.cut_frames(rows) for rows in (shared.noise_BFD, shared.noise_BF6D))
        return self.run_layers(item, tokens, Conditioning(noise, noise6, shared.text_BND), started.forward)

    def _take_what_it_reads(self, forward: Forward, watcher: Watcher) -> None:
        """Take results until the versions that a forward reads are here."""
        reads = list(forward.parts)
        if forward.before_latents is not None:
            reads.append((forward.before_latents.block, forward.before_latents.step))
        for block, steps_done in reads:
            if steps_done == 0 and block not in self.blocks:
                self.blocks[block] = self.task.new_block(self.timetable.block(block))
            while self.blocks[block].steps_done < steps_done:
                self._take_one(watcher)

    def _take_one(self, watcher: Watcher) -> None:
        """Receive the oldest item's result; with a forward's last one, take the solver's step."""
        if self._in_flight[0][0].is_skipped:
            started, _ = self._in_flight.popleft()
            assert started.decision and started.decision.outputs
            self._take_steps(started, started.decision.outputs, watcher)
            return
        header, buffer = self.receive()
        started, item = self._in_flight.popleft()
        if not header.same_item(item):
            raise AssertionError(f"rank {self.stage.rank}: expected {item}, got {header}")
        self._came_back_slot = header.slot
        frames = sum(own.latents_BCFYX.shape[2] for own in started.owns)
        (out,) = self.links.incoming.layout.read(buffer, self.shapes.result(frames))
        window = started.window.own_frames()
        velocity = self.model_at(item).velocity(out, *window.repeated(started.batch))
        started.velocities.extend(velocity.split(1))
        if item.run == self.runs(started.forward)[-1]:
            self._take_steps(started, self.lane.all_branches(started.velocities), watcher)

    def _take_steps(self, started: InFlight, velocities: Sequence[Tensor], watcher: Watcher) -> None:
        stepped = take_steps(self.task, started.forward, started.owns, velocities, started.decision)
        self.blocks |= stepped
        for block, state in sorted(stepped.items()):
            if state.steps_done == self.timetable.num_steps:
                watcher.finished(FinishedBlock(self.timetable.block(block), state.latents_BCFYX))
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
        if isinstance(self.lead, Follower):
            return self._follow(self.lead, watcher)
        may_begin = not watcher.should_stop() and (watcher.may_begin() or self._has_room_later(watcher))
        if may_begin:
            self._take_up(watcher, len(watcher.offered()))
        kind = Kind.WORK if may_begin else Kind.STOP
        self.lead.tell(Word(kind, self.next_tick, self.num_changes))
        return may_begin

    def _has_room_later(self, watcher: Watcher) -> bool:
        """Wait until what the next tick finishes has room; False when asked to stop before that."""
        assert isinstance(self.lead, Leader)
        self.lead.tell(Word(Kind.IDLE, self.next_tick))  # or others would not take what this lane waits for
        self._take_all(watcher)
        last = time.monotonic()
        self.doing = "waiting for room"
        while not watcher.may_begin():
            if watcher.should_stop():
                return False
            if self.given_up.is_set():
                raise GivenUp
            time.sleep(LOOK_EVERY_S)
            if time.monotonic() - last > self.keepalive_s:
                self.lead.tell(Word(Kind.IDLE, self.next_tick))
                self._keep_alive()
                last = time.monotonic()
        return True

    def _follow(self, leader: Follower, watcher: Watcher) -> bool:
        """The same, as the leading lane decided."""
        self.doing = "waiting for the first lane"
        while (word := leader.hear()).kind == Kind.IDLE:
            self._take_all(watcher)
            self._keep_alive()
        assert word.tick == self.next_tick, f"told of tick {word.tick} before tick {self.next_tick}"
        self._take_up(watcher, word.num_changes)
        return word.kind == Kind.WORK

    def _keep_alive(self) -> None:
        if not self.stage.is_last:
            self.links.outgoing.send(Header(Kind.IDLE))

    def _take_up(self, watcher: Watcher, num_changes: int) -> None:
        """Let the prompts that were offered hold from the first block on that is not admitted yet."""
        first_block = -(-self.next_tick // self.timetable.stride)
        for change in watcher.offered()[self.num_changes : num_changes]:
            is_late = first_block >= self.timetable.num_blocks
            if not is_late:
                assert isinstance(self.task.texts, BlockTexts)
                self.task.texts.change(
                    PromptChange(
                        prompt=change.prompt,
                        first_block=first_block,
                        transition_blocks=change.transition_blocks,
                    ),
                    change.text_1NT,
                )
            watcher.taken_up(None if is_late else first_block)
        self.num_changes = max(self.num_changes, num_changes)

    def _stop(self, watcher: Watcher) -> int:
        """Finish what has started, tell the others, and leave a state."""
        self._take_all(watcher)
        if not self.stage.is_last:
            self.send(Header(Kind.STOP, self.next_tick))
        self.links.outgoing.flush()
        if not (self.next_tick and self.is_saved_after(self.next_tick - 1)):
            kept = self.timetable.kept_after(self.next_tick - 1) if self.next_tick else range(0)
            watcher.save(self._state(kept, self.lending.lent.copy()))
        self.doing = "done"
        return self.next_tick


def attending_of(task: Task, stage: Stage, lent: Lent) -> Attending | None:
    """How a stage's layers are run, where not the plain way; in lock step the lane does it, see lane.py."""
    found = task.attending(stage.layers, lent)
    return found if isinstance(found, Attending) else None


def default_in_flight(num_stages: int, link_depth: int = 1) -> int:
    """Items that may be on their way: one in each stage's hands, and its link full.

    The link back has room for as many, so that no stage ever waits for the first one to take results.
    """
    return num_stages * (1 + link_depth)
