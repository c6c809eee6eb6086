"""Sizes of the messages between the stages of a lane."""

from dataclasses import dataclass, replace
from math import prod

import torch

from vidgen.denoise.loop import Task
from vidgen.denoise.skipping import Regions, regions_of
from vidgen.denoise.timetable import Forward, Timetable
from vidgen.model.dit import Grid
from vidgen.parallel.transport import MessageLayout

# B batch, F latent frames of a window, S tokens per frame, D width, N text tokens


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """Sizes of a task's messages; the same on every rank of a lane."""

    batch: int  # branches in one run of the model
    frame_shape: tuple[int, int, int]  # latent channels, rows, columns
    rows: int  # of tokens
    columns: int
    tokens: int  # of each frame, that the lane holds
    width: int
    text_tokens: int
    out_channels: int
    dtype: torch.dtype
    regions: Regions | None = None  # of a step cache that leaves out tokens

    @classmethod
    def of(cls, task: Task) -> "Shapes":
        """The shapes of a task, whose model may lie on the meta device, in a lane that holds every token."""
        block = task.timetable.block(0)
        text = task.run_texts(block)[0]
        noise = task.noise(block)
        _, rows, columns = task.model.token_grid(noise.shape)
        return cls(
            batch=text.shape[0],
            frame_shape=(noise.shape[1], noise.shape[3], noise.shape[4]),
            rows=rows,
            columns=columns,
            tokens=rows * columns,
            width=task.model.config.width,
            text_tokens=text.shape[1] + task.model.config.image_tokens,
            out_channels=task.model.out_channels,
            dtype=task.model.dtype,
            regions=regions_of(task),
        )

    @property
    def tokens_per_frame(self) -> int:
        """In all lanes together."""
        return self.rows * self.columns

    def holding(self, tokens: int) -> "Shapes":
        """Those of a lane that holds so many tokens of each frame."""
        return replace(self, tokens=tokens)

    def grid(self, frames: int) -> Grid:
        """Of whole frames."""
        return frames, self.rows, self.columns

    def window(self, frames: int) -> tuple[tuple[int, ...], ...]:
        """Tokens, noise conditioning for the head and for the layers, text: what goes to the next stage.

        Where a step cache may leave out tokens, last which ones run: nothing here, where all do.
        """
        return self._window(frames, self.tokens, 0)

    def region(self, frames: int) -> tuple[tuple[int, ...], ...]:
        """The same, of own frames of which only some tokens run."""
        assert self.regions is not None
        return self._window(frames, self.regions.count(self.tokens), frames)

    def _window(self, frames: int, tokens: int, chosen_frames: int) -> tuple[tuple[int, ...], ...]:
        shapes = (
            (self.batch, frames, tokens, self.width),
            (self.batch, frames, self.width),
            (self.batch, frames, 6, self.width),
            (self.batch, self.text_tokens, self.width),
        )
        return shapes if self.regions is None else (*shapes, (chosen_frames, self.tokens))

    def result(self, frames: int) -> tuple[tuple[int, ...], ...]:
        """The projection of a window's own frames: what goes back to the first stage."""
        return ((self.batch * frames, self.out_channels, self.rows, self.columns),)

    def layouts(self, timetable: Timetable) -> tuple[MessageLayout, MessageLayout]:
        """(from stage to stage, from the last to the first), with room for the longest window."""
        own, whole = longest_window(timetable)
        window = (
            self.window(whole) if self.regions is None else (*self.window(whole)[:-1], (own, self.tokens))
        )
        forward, back = (
            MessageLayout(tuple(prod(shape) for shape in shapes), self.dtype)
            for shapes in (window, self.result(own))
        )
        return forward, back


def own_frames(timetable: Timetable, forward: Forward) -> int:
    """Frames of a forward's window that take a step."""
    return sum(timetable.block(block).num_frames for block, _ in forward.parts)


def frames_before(forward: Forward) -> int:
    """Recomputed context frames at the start of a forward's window."""
    return forward.before_latents.num_frames if forward.before_latents is not None else 0


def longest_window(timetable: Timetable) -> tuple[int, int]:
    """(most own frames, most frames) of a window: of those at the beginning, until the first block ends."""
    ramp = range(min(timetable.num_ticks, timetable.num_steps + timetable.stride + 1))
    forwards = [forward for tick in ramp for forward in timetable.forwards(tick)]
    return (
        max(own_frames(timetable, forward) for forward in forwards),
        max(own_frames(timetable, forward) + frames_before(forward) for forward in forwards),
    )
