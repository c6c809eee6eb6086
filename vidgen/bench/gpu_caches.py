"""What step caches that go by the clock save on one GPU: seconds of one process's denoising, in one run.

The model has random weights and the sizes of a known one, so that its time says something and its video
nothing: `python -m vidgen.bench.gpu_caches`.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from vidgen.bench.gpu_plans import FULL, GpuCase, measure
from vidgen.bench.machine import machine_facts, table
from vidgen.known_sizes import KNOWN
from vidgen.parallel.place import random_model

QUEUE = {"timetable": "dualparal", "block_frames": 8, "context_frames": 4, "context_mode": "recompute"}
CASES = (GpuCase(num_frames=81, queue=FULL), GpuCase(num_frames=129, queue=QUEUE))
CACHES: tuple[dict[str, Any], ...] = (
    {},
    {"method": "taylor"},
    {"method": "delta"},
    {"method": "region", "ratio": 0.5},
    {"method": "region", "ratio": 0.25},
)
WARM_UP_STEPS = 6  # of a denoising of its own, with regions among them


def bench_gpu_caches(model: str, steps: int, device: str = "cuda") -> list[dict[str, Any]]:
    """A row per case and cache. The model is one of KNOWN; each is read once, after short ones of all."""
    dit = random_model(KNOWN[model].dit, KNOWN[model].dit.num_layers, device)
    rows = []
    for case in CASES:
        dense_s = 0.0
        for cache in CACHES:
            early = {"warm_up_steps": 2} if cache else {}
            measure(dit, model, replace(case, cache=cache | early), WARM_UP_STEPS, 1, warm_ups=0)
        for cache in CACHES:
            found = measure(dit, model, replace(case, cache=cache), steps, 1, warm_ups=0)
            (seconds,) = found["seconds"]
            dense_s = dense_s or seconds
            rows.append(
                {
                    "video": f"{case.queue['timetable']}, {case.num_frames} frames",
                    "cache": " ".join(str(value) for value in cache.values()) or "none",
                    "seconds": round(seconds, 3),
                    "speed-up": round(dense_s / seconds, 3),
                    "MiB": round(found["bytes"] / 2**20),
                }
            )
    return rows


def main(
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE")] = None,
    model: Annotated[str, typer.Option("--model", metavar="|".join(KNOWN))] = "wan-1.3b",
    steps: Annotated[int, typer.Option("--steps", metavar="N", min=8)] = 20,
) -> None:
    """Denoise with each cache, in minutes."""
    rows = bench_gpu_caches(model, steps)
    sys.stdout.write(f"{table(rows)}\n")
    if json_file is not None:
        found = {"machine": machine_facts(), "model": model, "steps": steps, "rows": rows}
        json_file.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
