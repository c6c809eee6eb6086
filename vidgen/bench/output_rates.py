"""Rates of the end of a render, decoding and writing; and how a rate is measured."""

import math
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vidgen.engine import Engine
from vidgen.journal import Journal
from vidgen.media.sink import open_sink
from vidgen.parallel.planner.hardware import Rate
from vidgen.planning import Plan

READINGS = 9
ENOUGH_S = 1.5  # no larger work is tried after a reading that took so long
ROW, ROW_S = 50, 0.1  # calls of a GPU in a reading, and seconds that they may take together
FRAMES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Clock:
    """Times work on a device: the median of several readings.

    `between` is what a render does before such work; done before each reading, it leaves caches as full of
    other things as they are then. Small work in a loop of its own takes half or a fourth of the time.
    On a GPU a reading is of several calls in a row: in a render it works while the next ones are launched.
    """

    def __init__(self, device: str, threads: int, between: Callable[[], object] | None = None) -> None:
        self.device, self.threads, self._between = device, threads, between
        self._now = time.thread_time if device == "cpu" and threads == 1 else time.perf_counter

    def among(self, between: Callable[[], object]) -> "Clock":
        """The same clock, for work that comes between other work."""
        return Clock(self.device, self.threads, between)

    def seconds(self, action: Callable[[], object], readings: int = READINGS) -> float:
        """Of one call, after one that warms up. Work that takes long is read less often."""
        first = self._once(action)
        readings, calls = readings if first < ENOUGH_S / readings else 2, self._in_a_row(first)
        return statistics.median(self._once(action, calls) for _ in range(readings))

    def seconds_of_each(self, actions: Sequence[Callable[[], object]]) -> list[float]:
        """Of one call of each, the actions taking turns, so that a slow moment hits all alike."""
        first = max([self._once(action) for action in actions])
        count, calls = READINGS if first < ENOUGH_S / READINGS else 2, self._in_a_row(first)
        readings = [[self._once(action, calls) for action in actions] for _ in range(count)]
        return [statistics.median(column) for column in zip(*readings, strict=True)]

    def _in_a_row(self, first_s: float) -> int:
        """Calls of a reading, where one has taken so long."""
        return 1 if self.device == "cpu" else max(1, min(ROW, int(ROW_S / first_s)))

    def _once(self, action: Callable[[], object], calls: int = 1) -> float:
        if self._between is not None:
            self._between()
        if self.device == "cuda":
            torch.cuda.synchronize()
        start = self._now()
        for _ in range(calls):
            action()
        if self.device == "cuda":
            torch.cuda.synchronize()
        return (self._now() - start) / calls


def rate(points: Sequence[tuple[float, float]]) -> Rate:
    """From (size, seconds): where more work took less time, it takes as long as the lesser."""
    sizes, seconds = [], []
    for size, taken in sorted(points):
        if sizes and size <= sizes[-1]:
            continue
        sizes.append(size)
        seconds.append(max(taken, 1e-9, seconds[-1] * (1 + 1e-6) if seconds else 0))
    return Rate(tuple(sizes), tuple(seconds))


def decode_rate(engine: Engine, plan: Plan, clock: Clock, *, is_apart: bool = False) -> Rate:
    """Decoding a block, by pixels of a frame times frames; on the CPU if it `is_apart`, as ranks have it."""
    decode, points = engine.family.load_decode()(None) if is_apart else engine.decoder(), []
    for frames in FRAMES[:7]:
        latents = latents_of(plan, frames, "cpu")
        taken = clock.seconds(lambda z=latents: decode(z), readings=3)
        points.append((frames * _pixels_per_frame(plan), taken))
        if taken > ENOUGH_S:
            break
    return rate(points)


def write_rate(plan: Plan) -> Rate:
    """Making a block durable: latents, a segment of video, the journal's row. By the clock on the wall."""
    job, points = plan.job, []
    assert job.height and job.width and job.fps
    pictures = _moving_pictures(64, job.height, job.width)
    with tempfile.TemporaryDirectory() as place:
        with Journal(Path(place) / "job", create=job) as journal:
            sink = open_sink(
                Path(place) / "x.mp4", journal.folder, job.width, job.height, Fraction(job.fps), {}
            )
            block = first = 0
            for frames in (1, 2, 4, 8, 16):
                length = frames * plan.sizes.temporal_stride
                latents, readings = latents_of(plan, frames, "cpu"), []
                for _ in range(3):
                    start = time.perf_counter()
                    digest = journal.save_latents(block, latents)
                    record = sink.write(pictures[:length], first_frame=first, block=block)
                    journal.commit(record, digest)
                    readings.append(time.perf_counter() - start)
                    block, first = block + 1, first + length
                points.append((frames * _pixels_per_frame(plan), statistics.median(readings)))
    return rate(points)


def _moving_pictures(count: int, height: int, width: int) -> NDArray[np.uint8]:
    """Frames of a wave that moves: about as busy as what models make."""
    frame, row, column = np.ogrid[:count, :height, :width]
    waves = [np.sin((row * (1 + c) + column + 2 * frame) / 7) for c in range(3)]
    return (127.5 * (1 + np.stack(waves, axis=-1))).astype(np.uint8)


def latents_of(plan: Plan, frames: int, device: str) -> Tensor:
    """Noise [1, C, frames, Y, X] of the plan's size."""
    _, channels, _, rows, columns = plan.latents_shape
    return torch.randn(1, channels, frames, rows, columns, device=device)


def _pixels_per_frame(plan: Plan) -> int:
    """Pixels that a latent frame stands for."""
    assert plan.job.height and plan.job.width
    return plan.sizes.temporal_stride * math.prod((plan.job.height, plan.job.width))
