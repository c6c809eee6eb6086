"""How alike a model's features are over steps and layers: what a step cache or sparsity could make use of.

The figures are those that the caches go by: TeaCache (arXiv 2411.19108) by relative L1 changes, MagCache
(2506.09045) by the ratio of residuals' magnitudes, TaylorSeer (2503.06923) by forecasts from earlier steps,
Delta-DiT (2406.01125) by residuals of layers that stay what they were.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from vidgen.bench.attention_mass import AttentionMass
from vidgen.bench.features import BRANCHES, CURVES, LAYERS, Series, Watcher
from vidgen.config import JobConfig, parse_job
from vidgen.denoise.loop import Task
from vidgen.execute import choose_device
from vidgen.render import load_engine

PROMPTS = (
    "a red circle moving left over a gray background",
    "a purple square moving up over a white background",
)

Found = dict[str, Any]


def make_jobs(prompts: Sequence[str], settings: dict[str, Any]) -> list[JobConfig]:
    """A job for each prompt, with seeds one after another; settings as in a job file.

    Without prompts the built-in model has PROMPTS. ValueError for another model without, and for settings
    that cannot be.
    """
    first = parse_job(settings)
    if not prompts and first.model != "builtin":
        raise ValueError(f"model={first.model}: needs --prompt TEXT, what it is to be watched at")
    return [
        parse_job({**settings, "prompt": prompt, "seed": first.seed + index})
        for index, prompt in enumerate(prompts or PROMPTS)
    ]


def bench_redundancy(jobs: Sequence[JobConfig], report: Callable[[str], None] = lambda text: None) -> Found:
    """What `summarize` says of the jobs' renders, and `settings`: the first job, resolved, and all prompts.

    The model is the first job's, and nothing is decoded; `report` is called with a line per video. ValueError
    for a job that the model cannot do, or that has a step cache.
    """
    engine = load_engine(jobs[0])
    plans = [engine.plan(job) for job in jobs]
    resolved = plans[0].job
    engine.load_dit(choose_device(resolved.device))
    threads = torch.get_num_threads()
    torch.set_num_threads(resolved.threads or threads)
    try:
        found = watch((plan.task for plan in plans), report)
    finally:
        torch.set_num_threads(threads)
    settings = resolved.model_dump(mode="json") | {"prompts": [job.prompt for job in jobs]}
    del settings["prompt"]
    return {"settings": settings, "model_sha256": engine.sha256(), **found}


def watch(tasks: Iterable[Task], report: Callable[[str], None] = lambda text: None) -> Found:
    """What `summarize` says of runs of the tasks: of one model, and of equal noise levels."""
    series: list[Series] = []
    mass: AttentionMass | None = None
    for index, task in enumerate(tasks):
        mass = mass or AttentionMass(task.model.config.num_layers)
        made = Watcher(task, mass).run()
        series += made
        report(f"video {index + 1}: {len(made)} series of {task.timetable.num_steps} steps")
    return summarize(series, mass)


def summarize(series: Sequence[Series], mass: AttentionMass | None = None) -> Found:
    """Means over series (a prompt, block and branch each), ready for JSON; None where nothing is known.

    `noise_levels` by step, in [0, 1]. `curves`: by name (features.CURVES) `mean`, `least` and `most` by step,
    and the mean of each branch; cosines in [-1, 1], changes and errors relative (0.1 is 10 %), ratios 1 where
    a residual keeps its length. A change at a step is the one since the step before. `layers`: by name
    (features.LAYERS) means [num_layers][num_steps], of cosines those of a layer's input and output.
    `attention`: shares of mass by layer.
    """
    branches = [name for name in BRANCHES if any(one.branch == name for one in series)]
    curves = {}
    for name in CURVES:
        rows = np.array([one.curves[name] for one in series])
        masked = np.ma.masked_invalid(rows)
        curves[name] = {
            "mean": _plain(masked.mean(0)),
            "least": _plain(masked.min(0)),
            "most": _plain(masked.max(0)),
        }
        for branch in branches:
            of_branch = np.array([one.branch == branch for one in series])
            curves[name][branch] = _plain(masked[of_branch].mean(0))
    layers = {
        name: [_plain(row) for row in np.ma.masked_invalid([one.layers[name] for one in series]).mean(0)]
        for name in LAYERS
    }
    attention = mass.as_dict() if mass else None
    return {
        "num_series": len(series),
        "branches": branches,
        "noise_levels": _plain(np.ma.masked_invalid(series[0].noise_levels)),
        "curves": curves,
        "layers": layers,
        "attention": attention and {name: _plain(np.ma.array(row)) for name, row in attention.items()},
    }


def _plain(row: NDArray[np.float64]) -> list[float | None]:
    """Numbers of 6 digits, None for those that are masked."""
    values = np.ma.filled(row, math.nan)
    return [float(f"{value:.6g}") if math.isfinite(value) else None for value in values]
