"""The planner held against one GPU: seconds and memory of one process's denoising, predicted and measured.

The model has random weights and the sizes of a known one; nothing is read, decoded or written. Predictions
are the planner's for one rank, without decoding: `python -m vidgen.bench.gpu_plans --profile h100`.
"""

import gc
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from vidgen.bench.machine import machine_facts, table
from vidgen.bench.plans import ALLOWED
from vidgen.bench.rendering import PROMPT
from vidgen.choosing import scheme_of
from vidgen.config import JobConfig, parse_job
from vidgen.denoise.loop import Task, denoise
from vidgen.denoise.multistep import make_solver
from vidgen.denoise.task import make_task
from vidgen.known_sizes import KNOWN, film_like
from vidgen.model.dit import DiT
from vidgen.model.rope import rotations
from vidgen.parallel.place import random_model
from vidgen.parallel.planner.hardware import Hardware, Rate, load_hardware
from vidgen.parallel.planner.plan import Planned, examine
from vidgen.parallel.topology import Lanes
from vidgen.planning import make_clips, make_timetable
from vidgen.stepcache.cache import make_cache
from vidgen.types import NoiseKind

SHIFT = 5.0
NOTHING = Rate((1e18,), (1e-9,))  # what is left out takes no time


@dataclass(frozen=True, kw_only=True, slots=True)
class GpuCase:
    """What is denoised: pixel frames, and the settings of a job's `queue` and `cache`."""

    num_frames: int
    queue: dict[str, Any]
    cache: dict[str, Any] = field(default_factory=dict)


def _queue(timetable: str, block: int, context: int, mode: str = "recompute", **more: Any) -> dict[str, Any]:
    sizes = {"block_frames": block, "context_frames": context, "context_mode": mode}
    return {"timetable": timetable, **sizes, **more}


FULL = {"timetable": "full"}
CASES = (
    *(GpuCase(num_frames=frames, queue=FULL) for frames in (21, 41, 81, 161)),
    GpuCase(num_frames=81, queue={**FULL, "guidance": "stacked"}),
    GpuCase(num_frames=129, queue=_queue("dualparal", 4, 2)),
    GpuCase(num_frames=129, queue=_queue("dualparal", 4, 2, "cache")),
    GpuCase(num_frames=129, queue=_queue("dualparal", 4, 4)),
    GpuCase(num_frames=129, queue=_queue("dualparal", 8, 4)),
    GpuCase(num_frames=129, queue=_queue("dualparal", 8, 4, "cache")),
    GpuCase(num_frames=129, queue=_queue("dualparal", 8, 8, guidance="stacked")),
    GpuCase(num_frames=129, queue=_queue("dualparal", 1, 1, "cache")),
    GpuCase(num_frames=129, queue=_queue("autoregressive", 4, 2)),
    GpuCase(num_frames=129, queue=_queue("autoregressive", 8, 4, "cache")),
    GpuCase(num_frames=129, queue=_queue("lockstep", 8, 2)),
)


def bench_gpu_plans(
    hardware: Hardware, model: str, cases: Sequence[GpuCase] = CASES, *, steps: int = 4, repeats: int = 2,
    device: str = "cuda",
) -> list[dict[str, Any]]:  # fmt: skip
    """A row per case. The model is one of KNOWN; its loop runs once to warm up, then so many times."""
    dit = random_model(KNOWN[model].dit, KNOWN[model].dit.num_layers, device)
    return [
        row(predict(hardware, model, case, steps), measure(dit, model, case, steps, repeats), case)
        for case in cases
    ]


def predict(hardware: Hardware, model: str, case: GpuCase, steps: int) -> Planned:
    """What the planner says of a case on one rank, decoding and writing left out."""
    job = _job(case, steps)
    film = film_like(model, job)
    without_output = replace(hardware, decode_alone=NOTHING, write=NOTHING)
    return examine(film, without_output, scheme_of(job, film.num_frames), Lanes(), 1)


def measure(
    dit: DiT, model: str, case: GpuCase, steps: int, repeats: int, warm_ups: int = 1
) -> dict[str, Any]:
    """`seconds` of each denoising after those to warm up, and the most `bytes` that tensors held at once."""
    rotations.cache_clear()  # of other cases
    gc.collect()
    task, is_gpu = _task(dit, model, case, steps), dit.device.type == "cuda"
    if is_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    taken = []
    for _ in range(warm_ups + repeats):
        start = time.perf_counter()
        for _ in denoise(task):
            pass
        if is_gpu:
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - start)
    return {"seconds": taken[warm_ups:], "bytes": torch.cuda.max_memory_allocated() if is_gpu else 0}


def row(plan: Planned, found: dict[str, Any], case: GpuCase) -> dict[str, Any]:
    """A line of the table: medians, and predicted over measured."""
    (memory,) = plan.memory
    held = memory.total - memory.process - memory.decoding
    seconds = statistics.median(found["seconds"])
    return {
        "video": plan.scheme.label + (" stacked" if case.queue.get("guidance") == "stacked" else ""),
        "frames": case.num_frames,
        "predicted s": round(plan.seconds, 4),
        "measured s": round(seconds, 4),
        "ratio": round(plan.seconds / seconds, 3),
        "least to most s": f"{min(found['seconds']):.4f} to {max(found['seconds']):.4f}",
        "MiB, predicted": round(held / 2**20),
        "MiB, measured": round(found["bytes"] / 2**20),
    }


def within(rows: Sequence[dict[str, Any]]) -> str:
    """How many predictions of seconds hold."""
    good = sum(ALLOWED[0] <= row["ratio"] <= ALLOWED[1] for row in rows)
    return f"{good} of {len(rows)} within {ALLOWED[0]} to {ALLOWED[1]}"


def main(
    profile: Annotated[str, typer.Option("--profile", metavar="NAME|FILE")],
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE")] = None,
    model: Annotated[str, typer.Option("--model", metavar="|".join(KNOWN))] = "wan-1.3b",
    steps: Annotated[int, typer.Option("--steps", metavar="N", min=2)] = 4,
) -> None:
    """Hold the planner's predictions against this GPU: the built-in cases, in minutes."""
    hardware = load_hardware(profile)
    rows = bench_gpu_plans(hardware, model, steps=steps)
    sys.stdout.write(f"{table(rows)}\n{within(rows)}\n")
    found = {"machine": machine_facts(), "model": model, "steps": steps, "profile": hardware.source}
    found |= {"within": within(rows), "rows": rows}
    if json_file is not None:
        json_file.write_text(json.dumps(found, indent=1) + "\n")


def _job(case: GpuCase, steps: int) -> JobConfig:
    sizes = {"num_frames": case.num_frames, "num_inference_steps": steps, "guidance_scale": 5.0}
    return parse_job({"prompt": PROMPT, **sizes, "queue": case.queue, "cache": case.cache})


@torch.inference_mode()
def _task(dit: DiT, model: str, case: GpuCase, steps: int) -> Task:
    """The case on a model, with random texts."""
    known, job = KNOWN[model], _job(case, steps)
    film = film_like(model, job)
    texts = tuple(torch.randn(1, known.text_tokens, known.dit.text_width) for _ in range(film.branches))
    return make_task(
        dit,
        make_timetable(job, film.num_frames),
        lambda block: texts,
        latent_rows=film.latent_rows,
        latent_columns=film.latent_columns,
        seed=0,
        guidance_scale=job.guidance_scale or 1.0,
        noise=NoiseKind.POOL,
        solver=make_solver("unipc", steps, SHIFT),
        guidance_mode=job.queue.guidance,
        clips=make_clips(job, film.num_frames),
        cache=make_cache(job.cache),
    )


if __name__ == "__main__":
    typer.run(main)
