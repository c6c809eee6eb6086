"""A rank's part of the loop: receive, run my layers, send. The timetable says in which order.

Every rank walks through the same ticks and forwards as `denoise/loop.py`. The first stage also holds the
blocks: it makes windows, embeds them, takes solver steps when velocities come back. Messages carry tokens and
what all layers share of the conditioning; keys and values that blocks lend stay on the rank that made them.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vidgen.denoise.attending import Attending, Sparsity
from vidgen.denoise.lending import Lending, Lent
from vidgen.denoise.loop import Task
from vidgen.denoise.timetable import Forward, Timetable
from vidgen.kernels.attention.api import attention_backend
from vidgen.model.dit import Conditioning, DiT, Grid
from vidgen.parallel.topology import Stage
from vidgen.parallel.transport import Header, Incoming, Kind, MessageLayout, Outgoing

# B batch, F latent frames of a window, S tokens per frame, D width, N text tokens


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """Sizes of a task's messages; the same on every rank."""

    batch: int  # branches in one run of the model
    frame_shape: tuple[int, int, int]  # latent channels, rows, columns
    rows: int  # of tokens
    columns: int
    width: int
    text_tokens: int
    out_channels: int
    dtype: torch.dtype

    @classmethod
    def of(cls, task: Task) -> "Shapes":
        """The shapes of a task, whose model may lie on the meta device."""
        block = task.timetable.block(0)
        text = task.run_texts(block)[0]
        noise = task.noise(block)
        _, rows, columns = task.model.token_grid(noise.shape)
        return cls(
            batch=text.shape[0],
            frame_shape=(noise.shape[1], noise.shape[3], noise.shape[4]),
            rows=rows,
            columns=columns,
            width=task.model.config.width,
            text_tokens=text.shape[1] + task.model.config.image_tokens,
            out_channels=task.model.out_channels,
            dtype=task.model.dtype,
        )

    def window(self, frames: int) -> tuple[tuple[int, ...], ...]:
        """Tokens, noise conditioning for the head and for the layers, text: what goes to the next stage."""
        tokens = self.rows * self.columns
        return (
            (self.batch, frames, tokens, self.width),
            (self.batch, frames, self.width),
            (self.batch, frames, 6, self.width),
            (self.batch, self.text_tokens, self.width),
        )

    def result(self, frames: int) -> tuple[tuple[int, ...], ...]:
        """The projection of a block's own frames: what goes back to the first stage."""
        return ((self.batch * frames, self.out_channels, self.rows, self.columns),)

    def layouts(self, timetable: Timetable) -> tuple[MessageLayout, MessageLayout]:
        """(from stage to stage, from the last to the first), with room for the longest window."""
        own = min(timetable.block_frames, timetable.num_frames)
        forward = self.window(own + timetable.context_frames)
        return tuple(
            MessageLayout(tuple(torch.Size(shape).numel() for shape in shapes), self.dtype)
            for shapes in (forward, self.result(own))
        )  # type: ignore[return-value]


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
        lent: Lent | None = None,
        sparsity: Sparsity | None = None,
        backend: str | None = None,
        state_every: int = 0,
        trace: bool = True,
    ) -> None:
        self.stage, self.models, self.timetable, self.shapes = stage, models, timetable, shapes
        self.runs_at, self.links = runs_at, links  # runs_at: runs of the model, of a step
        lent = lent or Lent()
        self.lending, self.attending = Lending(lent), None
        if sparsity is not None:
            num_layers = models[0].config.num_layers
            self.attending = Attending(sparsity, timetable, stage.layers, num_layers, lent)
        self.backend = backend  # of attention
        self.state_every, self.trace = state_every, trace
        self.stats = Stats()
        self.doing = "starting"

    def grid(self, frames: int) -> Grid:
        return frames, self.shapes.rows, self.shapes.columns

    def model_at(self, item: Header) -> DiT:
        """This stage's part of the expert that takes the item's step."""
        return self.models[self.timetable.expert(item.step)]

    def is_saved_after(self, tick: int) -> bool:
        """Whether a checkpoint is due at the end of this tick."""
        return bool(self.state_every) and (tick + 1) % self.state_every == 0

    def run_layers(
        self, item: Header, tokens: Tensor, conditioning: Conditioning, frames_before: int
    ) -> Tensor:
        """The tokens after this stage's layers; what the forward lends of them is kept."""
        grid, context = self.grid(tokens.shape[1]), self.lending.context(item.run)
        attends = self.attending and self.attending.attends(item.block, item.step, item.run, grid, context)
        with attention_backend(self.backend):
            tokens, own = self.model_at(item).run_layers(
                tokens, conditioning, grid, context, attends, lends=self.lending.is_lending
            )
        self.lending.keep(own, frames_before)
        return tokens

    def end_tick(self, tick: int) -> None:
        """What this tick's forwards leave for later ones becomes visible."""
        self.lending.end_tick(self.timetable.kept_after(tick))
        if self.attending is not None:
            self.attending.end_tick(tick)

    def send(self, header: Header, parts: tuple[Tensor, ...] = ()) -> None:
        self.doing = f"sending to rank {(self.stage.index + 1) % self.stage.num_stages}"
        start = time.monotonic()
        self.links.outgoing.send(header, parts)
        self.stats.send_wait_s += time.monotonic() - start

    def receive(self) -> tuple[Header, Tensor]:
        self.doing = f"waiting for rank {(self.stage.index - 1) % self.stage.num_stages}"
        start = time.monotonic()
        message = self.links.incoming.receive()
        self.stats.receive_wait_s += time.monotonic() - start
        return message

    def work(self, item: Header, action: Callable[[], Any]) -> Any:
        """Do a piece of this item's work, timed."""
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


def frames_before(forward: Forward) -> int:
    """Recomputed context frames at the start of a forward's window."""
    return forward.before_latents.num_frames if forward.before_latents is not None else 0


class LaterStage(StageRun):
    """Any stage but the first. `save` gets (next tick, what this stage's layers have lent)."""

    @torch.inference_mode()
    def run(self, first_tick: int, save: Callable[[int, Lent], None]) -> int:
        """Run all ticks from `first_tick` on, or until told to stop; the tick that was not run."""
        for tick in range(first_tick, self.timetable.num_ticks):
            for forward in self.timetable.forwards(tick):
                self.lending.begin(forward)
                for run in range(self.runs_at(forward.step)):
                    item = Header(Kind.WORK, tick, forward.block, forward.step, run)
                    if not self._handle(item, forward):
                        if not (tick and self.is_saved_after(tick - 1)):
                            save(tick, self.lending.lent.copy())
                        return tick
            self.end_tick(tick)
            if self.is_saved_after(tick):
                save(tick + 1, self.lending.lent.copy())
        self.links.outgoing.flush()
        self.doing = "done"
        return self.timetable.num_ticks

    def _handle(self, item: Header, forward: Forward) -> bool:
        """Run one item; False when told to stop instead."""
        header, buffer = self.receive()
        while header.kind == Kind.IDLE:
            self._pass_on(header)
            header, buffer = self.receive()
        if header.kind == Kind.STOP:
            assert header.tick == item.tick, f"told to stop before tick {header.tick} in tick {item.tick}"
            self._pass_on(header)
            self.links.outgoing.flush()
            return False
        if not header.same_item(item):
            raise AssertionError(f"rank {self.stage.index}: expected {item}, got {header}")
        item = header._replace(slot=self.next_slot(header.slot))
        self.send(item, self.work(item, lambda: self._compute(item, forward, buffer)))
        return True

    def _compute(self, item: Header, forward: Forward, buffer: Tensor) -> tuple[Tensor, ...]:
        before = frames_before(forward)
        frames = before + self.timetable.block(forward.block).num_frames
        tokens, noise, noise6, text = self.links.incoming.layout.read(buffer, self.shapes.window(frames))
        tokens = self.run_layers(item, tokens, Conditioning(noise, noise6, text), before)
        if self.stage.is_last:
            own = self.grid(frames - before)
            return (self.model_at(item).project(tokens[:, before:], noise[:, before:], own),)
        return tokens, noise, noise6, text

    def _pass_on(self, header: Header) -> None:
        if not self.stage.is_last:
            self.send(header)
