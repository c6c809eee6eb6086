"""A process that renders the videos of one cell, so that its peak memory is its own.

It reads a line of JSON per video from stdin, {"prompt", "seed", "output"}, and answers each with a line of
figures on stdout, or {"cannot": why} for a job that cannot be done. A cell on ranks keeps them from video to
video. Seconds count from the first run of the model until the last block is durable: starting processes and
reading weights is not in them.
"""

import json
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from vidgen.ablate.pace import pace_s
from vidgen.ablate.settings import Cell
from vidgen.choosing import film_of, own_scheme
from vidgen.config import JobConfig, parse_job
from vidgen.engine import Engine
from vidgen.live import Live
from vidgen.parallel.memory import peak_memory_bytes
from vidgen.parallel.planner.flops import render_flops
from vidgen.render import load_engine, render
from vidgen.run import Rendered
from vidgen.sparsity.tally import summarise

MIB = 2**20


class Renderer:
    """Renders a cell's videos one after the other, with one engine and one gang."""

    def __init__(self, cell: Cell, opened: ExitStack) -> None:
        self.cell = cell
        self.engine = load_engine(cell.job)
        self.gangs = None
        if cell.job.parallel.ranks != 1:
            from vidgen.parallel.cluster import connected, wanted_address
            from vidgen.parallel.standing import Gangs

            ranks, address = cell.job.parallel.ranks, wanted_address(cell.job.parallel.address)
            opened.enter_context(connected(address, None if ranks == "auto" else ranks))
            self.gangs = Gangs(keeps=True)
            opened.callback(self.gangs.close)

    def render(self, prompt: str, seed: int, output: Path) -> dict[str, Any]:
        """One video, and what it took. What an earlier, cut render left of it is replaced."""
        began: list[float] = []
        committed: list[float] = []

        def check() -> None:
            if not began:
                began.append(time.time())

        job, folder = self.cell.job_of(prompt, seed, output), output.with_suffix(".job")
        shutil.rmtree(folder, ignore_errors=True)
        live = Live(
            engine=self.engine,
            gangs=self.gangs,
            check=check,
            committed=lambda block: committed.append(time.time()),
        )
        paces = [pace_s()] if _has_pace(job) else []
        done = render(job, folder=folder, overwrite=True, live=live)
        paces += [pace_s()] if paces else []
        shutil.rmtree(folder)
        attempts = (done.evidence or {}).get("attempts", [])
        start = min(rank["began_s"] for rank in attempts[0]["ranks"]) if attempts else began[0]
        return {
            "seconds": round(committed[-1] - start, 4),
            "first_frame_s": round(committed[0] - start, 4),
            "pace_s": round(fmean(paces), 5) if paces else None,
            **_memory_and_bytes(attempts),
            **_work(self.engine, done),
            "block_frames": _block_frames(self.engine, done),
        }


def _has_pace(job: JobConfig) -> bool:
    """A CPU's says nothing of what a GPU does, and ranks that wait would make it look slower."""
    return job.parallel.ranks == 1 and (job.device == "cpu" or not torch.cuda.is_available())


def _block_frames(engine: Engine, done: Rendered) -> int | None:
    """Pixel frames from one border of blocks to the next; None without blocks, or of uneven ones."""
    queue, sizes = done.job.queue, engine.family.sizes
    if queue.timetable == "full" or queue.block_frames is None:
        return None
    one, two = (sizes.num_pixel_frames(count * queue.block_frames) for count in (1, 2))
    return one if two == 2 * one else None


def _memory_and_bytes(attempts: list[dict[str, Any]]) -> dict[str, Any]:
    """Of the fullest rank, and of what all ranks sent one another."""
    if not attempts:
        return {"memory_mib": round(peak_memory_bytes() / MIB), "sent_mib": 0.0}
    sent = sum(sum(found["bytes_per_link"].values()) + found["bytes_between_lanes"] for found in attempts)
    memory = max(rank["peak_memory_bytes"] for found in attempts for rank in found["ranks"])
    return {"memory_mib": round(memory / MIB), "sent_mib": round(sent / MIB, 3)}


def _work(engine: Engine, done: Rendered) -> dict[str, Any]:
    """What was run, skipped and left out, and the FLOPs that were left."""
    evidence = done.evidence or {}
    last: dict[str, Any] = (evidence.get("attempts") or [evidence])[-1]
    cache = last.get("cache") or {}
    rows = last.get("attention") or [
        row for rank in last.get("ranks", ()) for row in rank.get("attention", ())
    ]
    density = summarise(rows)["density"] if rows else None
    skipped = cache.get("skipped", 0) / cache["forwards"] if cache else 0.0
    film, scheme = film_of(engine.family, done.job), own_scheme(engine.family, done.job)
    flops = render_flops(film, scheme, ran=1 - skipped, density=1.0 if density is None else density)
    return {"skipped": round(skipped, 4), "density": density, "tflops": round(flops / 1e12, 6)}


def _lines(cell: Cell, asked: Iterator[str]) -> Iterator[dict[str, Any]]:
    with ExitStack() as opened:
        renderer = Renderer(cell, opened)
        for line in asked:
            video = json.loads(line)
            try:
                yield renderer.render(video["prompt"], video["seed"], Path(video["output"]))
            except ValueError as error:
                yield {"cannot": str(error)}


def _told_cell() -> Cell:
    """The cell, as the first line tells it."""
    told = json.loads(sys.stdin.readline())
    return Cell(name=told["name"], settings={}, job=parse_job(told["job"]))


if __name__ == "__main__":
    for row in _lines(_told_cell(), iter(sys.stdin.readline, "")):
        sys.stdout.write(json.dumps(row) + "\n")
        sys.stdout.flush()
