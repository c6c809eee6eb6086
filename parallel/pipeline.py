"""A rank's part of the loop: receive, run my layers, send. The timetable says in which order.

Every rank walks through the same ticks and forwards as `denoise/loop.py`. The first stage also holds the
blocks: it makes windows, embeds them, takes solver steps when velocities come back. Messages carry tokens and
what all layers share of the conditioning; keys and values that blocks lend stay on the rank that made them.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vidgen.denoise.attending import Attending
from vidgen.denoise.lending import Lending, Lent
from vidgen.denoise.timetable import Forward, Timetable
from vidgen.kernels.attention.api import attention_backend
from vidgen.model.conditioning import Conditioning
from vidgen.model.dit import DiT
from vidgen.model.region import Region
from vidgen.parallel.lanes.lane import ALONE, Lane
from vidgen.parallel.shapes import Shapes, frames_before, own_frames
from vidgen.parallel.topology import Stage
from vidgen.parallel.transport import Header, Incoming, Kind, Outgoing


@dataclass(frozen=True, slots=True)
class Span:
    """One run of the model on one rank, in seconds since the epoch."""

    tick: int
    block: int
    step: int
    run: int
    start_s: float
    stop_s: float


@dataclass
class Stats:
    """What a rank has done so far."""

    items: int = 0
    busy_s: float = 0.0
    receive_wait_s: float = 0.0
    send_wait_s: float = 0.0
    last_slot: int = 0
    began_s: float = 0.0  # since the epoch: the first run of the model
    ended_s: float = 0.0  # the newest
    spans: list[Span] = field(default_factory=list)  # emptied by whoever collects them


@dataclass
class Links:
    """A stage's two ends: messages come in from the stage before it, and go out to the one after it."""

    incoming: Incoming
    outgoing: Outgoing

    def close(self) -> None:
        """Give back what the operating system lent."""
        self.incoming.close()
        self.outgoing.close()


class GivenUp(Exception):
    """Nobody wants what this rank would go on to make."""


class StageRun:
    """What all stages share: walking through the timetable, running their layers, sending, keeping books."""

    def __init__(
        self,
        stage: Stage,
        models: tuple[DiT, ...],
        timetable: Timetable,
        shapes: Shapes,
        runs_at: Callable[[int], int],
        links: Links,
        *,
        lane: Lane = ALONE,
        lent: Lent | None = None,
        attending: Attending | None = None,
        backend: str | None = None,
        may_skip: bool = False,
        state_every: int = 0,
        trace: bool = True,
        given_up: threading.Event | None = None,
    ) -> None:
        self.given_up = given_up or threading.Event()
        self.stage, self.models, self.timetable, self.shapes = stage, models, timetable, shapes
        self.runs_at, self.links, self.lane = runs_at, links, lane  # runs_at: runs of the model, of a step
        self.lending = Lending(lent or Lent(), remembers=may_skip)
        self.attending = attending  # which keeps its states in `lent`
        self.backend = backend  # of attention
        self.state_every, self.trace = state_every, trace
        self.stats = Stats()
        self.doing = "starting"

    def runs(self, forward: Forward) -> range:
        """Runs of the model for a forward that are this lane's."""
        return self.lane.runs(self.runs_at(forward.parts[-1][1]))

    def model_at(self, item: Header) -> DiT:
        """This stage's part of the expert that takes the item's step."""
        return self.models[self.timetable.expert(item.step)]

    def is_saved_after(self, tick: int) -> bool:
        """Whether a checkpoint is due at the end of this tick."""
        return bool(self.state_every) and (tick + 1) % self.state_every == 0

    def run_layers(
        self, item: Header, tokens: Tensor, conditioning: Conditioning, forward: Forward,
        region: Region | None = None,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """What goes on from here: the tokens after this stage's layers, or after the last the projection.

        What the forward lends of the layers is kept. Tokens and conditioning are of the `region`, where only
        some tokens run.
        """
        before, own = frames_before(forward), own_frames(self.timetable, forward)
        grid, context = self.shapes.grid(before + own), self.lending.context(item.run)
        run = item.run // self.lane.num_branches
        attends = self.attending and self.attending.attends(item.block, item.step, run, grid, context)
        with attention_backend(self.backend):
            tokens, lent = self.model_at(item).run_layers(
                tokens, conditioning, grid, context, attends, lends=self.lending.is_lending,
                part=self.lane.part, region=region,
            )  # fmt: skip
        self.lending.keep(lent, before)
        noise = conditioning.noise_BFD
        if not self.stage.is_last:
            shared = noise, conditioning.noise_BF6D, conditioning.text_BND
            return tokens, *shared, *self._chosen(tokens, region)
        if region is None:
            tokens, noise = self.lane.whole_frames(tokens[:, before:]), noise[:, before:]
        out = self.model_at(item).project(tokens, noise, self.shapes.grid(tokens.shape[1]))
        return (self.lane.all_frames(out, tokens.shape[0]),)

    def _chosen(self, tokens: Tensor, region: Region | None) -> tuple[Tensor, ...]:
        """What tells the next stage which tokens run, where a step cache may leave out some."""
        if self.shapes.regions is None:
            return ()
        nothing = tokens.new_zeros(0, self.shapes.tokens)
        return (nothing if region is None else region.active_FS.to(tokens.dtype),)

    def end_tick(self, tick: int) -> None:
        """What this tick's forwards leave for later ones becomes visible."""
        self.lending.end_tick(self.timetable.kept_after(tick))
        if self.attending is not None:
            self.attending.end_tick(tick)

    def send(self, header: Header, parts: tuple[Tensor, ...] = ()) -> None:
        self.doing = f"sending to rank {self.stage.after}"
        start = time.monotonic()
        self.links.outgoing.send(header, parts)
        self.stats.send_wait_s += time.monotonic() - start

    def receive(self) -> tuple[Header, Tensor]:
        self.doing = f"waiting for rank {self.stage.before}"
        start = time.monotonic()
        message = self.links.incoming.receive()
        self.stats.receive_wait_s += time.monotonic() - start
        return message

    def work(self, item: Header, action: Callable[[], Any]) -> Any:
        """Do a piece of this item's work, timed. GivenUp when none is wanted any more."""
        if self.given_up.is_set():
            raise GivenUp
        self.doing = f"computing block {item.block} step {item.step}"
        start, begun = time.monotonic(), time.time()
        done = action()
        took = time.monotonic() - start
        self.stats.busy_s += took
        self.stats.began_s = self.stats.began_s or begun
        self.stats.ended_s = begun + took
        if self.trace:
            self.stats.spans.append(Span(item.tick, item.block, item.step, item.run, begun, begun + took))
        return done

    def next_slot(self, *needed: int) -> int:
        """The first slot that is free here and later than all those."""
        self.stats.last_slot = max(self.stats.last_slot, *needed) + 1
        self.stats.items += 1
        return self.stats.last_slot


class LaterStage(StageRun):
    """Any stage but the first. `save` gets (next tick, what this stage's layers have lent)."""

    @torch.inference_mode()
    def run(self, first_tick: int, save: Callable[[int, Lent], None]) -> int:
        """Run all ticks from `first_tick` on, or until told to stop; the tick that was not run."""
        for tick in range(first_tick, self.timetable.num_ticks):
            for forward in self.timetable.forwards(tick):
                self.lending.begin(forward)
                for run in self.runs(forward):
                    item = Header(Kind.WORK, tick, forward.block, forward.step, run)
                    handled = self._handle(item, forward)
                    if handled == Kind.STOP:
                        if not (tick and self.is_saved_after(tick - 1)):
                            save(tick, self.lending.lent.copy())
                        return tick
                    if handled == Kind.SKIP:
                        self.lending.relend(forward)
                        break
            self.end_tick(tick)
            if self.is_saved_after(tick):
                save(tick + 1, self.lending.lent.copy())
        self.links.outgoing.flush()
        self.doing = "done"
        return self.timetable.num_ticks

    def _handle(self, item: Header, forward: Forward) -> Kind:
        """Run one item, or do what is told in its place: what it was."""
        header, buffer = self.receive()
        while header.kind == Kind.IDLE:
            self._pass_on(header)
            header, buffer = self.receive()
        if header.kind == Kind.STOP:
            assert header.tick == item.tick, f"told to stop before tick {header.tick} in tick {item.tick}"
            self._pass_on(header)
            self.links.outgoing.flush()
            return Kind.STOP
        if header.kind == Kind.SKIP and header.same_item(item._replace(kind=Kind.SKIP)):
            self._pass_on(header)
            return Kind.SKIP
        if not header.same_item(item):
            raise AssertionError(f"rank {self.stage.rank}: expected {item}, got {header}")
        item = header._replace(slot=self.next_slot(header.slot))
        self.send(item, self.work(item, lambda: self._compute(item, forward, buffer)))
        return Kind.WORK

    def _compute(self, item: Header, forward: Forward, buffer: Tensor) -> tuple[Tensor, ...]:
        before, own = frames_before(forward), own_frames(self.timetable, forward)
        regions, layout = self.shapes.regions, self.links.incoming.layout
        if regions is not None and regions.only_some(item.block, item.step):
            tokens, *shared, active_FS = layout.read(buffer, self.shapes.region(own))
            region = Region.of(active_FS, before)
            return self.run_layers(item, tokens, Conditioning(*shared), forward, region)
        shapes = self.shapes.window(self.lane.num_frames(before + own))
        tokens, noise, noise6, text, *_ = layout.read(buffer, shapes)
        return self.run_layers(item, tokens, Conditioning(noise, noise6, text), forward)

    def _pass_on(self, header: Header) -> None:
        if not self.stage.is_last:
            self.send(header)
