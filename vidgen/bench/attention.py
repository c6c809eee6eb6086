"""Sparsity policies end to end: what they leave out, what that costs in quality and gains in time.

Two tables, for two questions. The built-in model shows what a policy does to a video, at the longest clips
that the model knows; its 128 tokens are too few for any sparsity to gain time. A random model of 8,192 tokens
shows the time: layers as in a large model, whose attention is no video's.
"""

import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vidgen.builtin import SmallModel, load_small
from vidgen.denoise.attending import Sparsity
from vidgen.denoise.loop import LoopState, run_tick
from vidgen.denoise.task import make_task
from vidgen.denoise.timetable import full
from vidgen.kernels.attention.layout import BlockLayout
from vidgen.measure.adherence import judge
from vidgen.measure.fidelity import psnr, ssim
from vidgen.measure.generate import generate
from vidgen.measure.report import pick_scenes
from vidgen.model.dit import DiT, DiTConfig
from vidgen.sparsity.making import make_policy
from vidgen.sparsity.settings import SparsitySettings
from vidgen.sparsity.tally import summarise
from vidgen.types import NoiseKind

LONGEST_CLIP = 32  # frames: 8 latent frames of 16 tokens
FRAME_TOKENS = 16  # of a latent frame of the built-in model
EARLY: dict[str, Any] = {"search_at": (0.2, 0.6), "restore": False}
TILE: dict[str, Any] = {"policy": "sliding_tile", "tile": (1, 4, 4), "window": (3, 1, 1)}
SMALL: dict[str, dict[str, Any]] = {  # by default but for geometry, and settings that cost more
    "adaspa": {"policy": "adaspa"},
    "adaspa, recall 0.9": {"policy": "adaspa", "recall": 0.9},
    "adaspa, density 0.5": {"policy": "adaspa", "density": 0.5},
    "svg2": {"policy": "svg2", "query_clusters": 8, "key_clusters": 16},
    "svg2, early, not restored": {"policy": "svg2", "query_clusters": 8, "key_clusters": 16, **EARLY},
    "sliding tile, 3 frames": TILE,
    "sliding tile, early, not restored": {**TILE, **EARLY},
    "radial, blocks of 4": {"policy": "radial", "query_block": 4, "key_block": 4},
    "local, radius 2.3": {"policy": "local", "radius": 2.3},
    "local, early, not restored": {"policy": "local", "radius": 2.3, **EARLY},
}
LARGE: dict[str, dict[str, Any]] = {
    "adaspa, density 0.2": {"policy": "adaspa", "density": 0.2},
    "adaspa, density 0.2, restored": {"policy": "adaspa", "density": 0.2, "restore": True},
    "adaspa, density 0.1": {"policy": "adaspa", "density": 0.1},
    "svg2": {"policy": "svg2"},
    "sliding tile 1x3x3": {"policy": "sliding_tile", "tile": (4, 8, 8), "window": (1, 3, 3)},
    "radial": {"policy": "radial"},
    "local, radius 6, 2 frames": {"policy": "local", "radius": 6.0, "frame_radius": 2},
}


def bench_quality(
    num_prompts: int, model: SmallModel | None = None
) -> tuple[list[dict[str, Any]], dict[str, Sparsity]]:
    """(a row per policy on the built-in model, what each did): nearness to dense, adherence, time."""
    torch.set_num_threads(1)
    model = model or load_small()
    policies = {
        name: _sparsity(
            {"query_block": FRAME_TOKENS, "key_block": FRAME_TOKENS, "dense_above": 1.0, **settings}
        )
        for name, settings in SMALL.items()
    }
    scenes = pick_scenes(num_prompts, seed=0)
    clips: dict[str, list[Tensor]] = {name: [] for name in ("dense", *policies)}
    seconds = dict.fromkeys(clips, 0.0)
    for seed, scene in enumerate(scenes):
        for name in clips:  # taking turns, so that a busy moment hits all alike
            started = time.perf_counter()
            clip = generate(
                model, scene.caption(), num_frames=LONGEST_CLIP, seed=seed, settings=model.recommended,
                sparsity=policies.get(name),
            )  # fmt: skip
            seconds[name] += time.perf_counter() - started
            clips[name].append(clip)
    dense = torch.stack(clips["dense"])
    rows = []
    for name, made in clips.items():
        right = sum(judge(clip, scene).all for clip, scene in zip(made, scenes, strict=True))
        videos = torch.stack(made)
        rows.append(
            {
                "policy": name,
                **_done(policies.get(name)),
                "speed-up": round(seconds["dense"] / seconds[name], 3),
                "PSNR": round(psnr(videos, dense), 2),
                "SSIM": round(ssim(videos, dense), 4),
                "all four right": f"{right}/{len(scenes)}",
            }
        )
    return rows, {name: sparsity for name, sparsity in policies.items() if sparsity is not None}


@dataclass(frozen=True, kw_only=True, slots=True)
class LargeCase:
    """A random model and one clip for it: 8,192 tokens, two layers of width 512 and 8 heads of 64."""

    grid: tuple[int, int, int] = (8, 32, 32)
    width: int = 512
    num_heads: int = 8
    num_layers: int = 2
    num_steps: int = 10
    device: str = "cpu"


@torch.inference_mode()
def bench_speed(case: LargeCase) -> list[dict[str, Any]]:
    """A row per policy on the random model: seconds of all steps with searches, against dense."""
    model = _random_model(case)
    policies = {"dense": None, **{name: _sparsity(settings) for name, settings in LARGE.items()}}
    runs = {name: _step_seconds(case, model, sparsity) for name, sparsity in policies.items()}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(case.num_steps):  # taking turns, so that a busy moment hits all alike
        for name, run in runs.items():
            seconds[name].append(next(run))
    dense = seconds["dense"]
    return [
        {
            "policy": name,
            **_done(policies[name]),
            "seconds": round(sum(steps), 2),
            "speed-up": round(sum(dense) / sum(steps), 2),
            "last steps s": round(_last(steps), 2),
            "of these": round(_last(dense) / _last(steps), 2),
        }
        for name, steps in seconds.items()
    ]


def _last(steps: list[float]) -> float:
    """Median of the last three steps, at which nothing is searched for."""
    return statistics.median(steps[-3:])


def _sparsity(settings: dict[str, Any]) -> Sparsity | None:
    policy = make_policy(SparsitySettings(**settings))
    return None if policy is None else Sparsity(policy=policy)


def _done(sparsity: Sparsity | None) -> dict[str, Any]:
    found = (
        summarise(sparsity.tally.layers()) if sparsity else {"density": 1.0, "recall": None, "search_s": 0.0}
    )
    return {
        "density": found["density"],
        "recall": "" if found["recall"] is None else found["recall"],
        "search s": round(found["search_s"], 2),
    }


def _random_model(case: LargeCase) -> DiT:
    config = DiTConfig(
        latent_channels=16, width=case.width, num_layers=case.num_layers, num_heads=case.num_heads,
        ffn_width=4 * case.width, text_width=64, patch=(1, 1),
    )  # fmt: skip
    torch.manual_seed(0)
    return DiT(config).eval().requires_grad_(False).to(case.device)


def _step_seconds(case: LargeCase, model: DiT, sparsity: Sparsity | None) -> Iterator[float]:
    """Seconds of each step of one clip, without guidance."""
    text = torch.randn(1, 8, 64, generator=torch.Generator().manual_seed(0))
    task = make_task(
        model, full(case.grid[0], case.num_steps), lambda block: (text,), latent_rows=case.grid[1],
        latent_columns=case.grid[2], seed=0, shift=4.0, guidance_scale=1.0, noise=NoiseKind.INDEPENDENT,
        sparsity=sparsity,
    )  # fmt: skip
    state = LoopState()
    while state.next_tick < task.timetable.num_ticks:
        started = time.perf_counter()
        run_tick(task, state)
        if case.device == "cuda":
            torch.cuda.synchronize()
        yield time.perf_counter() - started


def draw_layouts(policies: dict[str, Sparsity], target: Path) -> Path:
    """A picture: a row per policy, a column per head of a middle layer; brighter: more of a block is seen."""
    from matplotlib.figure import Figure  # for plots only

    shown = {}
    for name, sparsity in policies.items():
        layouts = list(sparsity.tally.layouts().items())
        if layouts:
            layer, layout = layouts[len(layouts) // 2]
            shown[f"{name}\nlayer {layer}"] = layout
    if not shown:
        raise ValueError(f"{target}: no policy made a choice; nothing to draw")
    heads = max(_seen(layout).shape[0] for layout in shown.values())
    figure = Figure(figsize=(1.6 * heads + 2.2, 1.5 * len(shown)), layout="constrained")
    axes = figure.subplots(len(shown), heads, squeeze=False)
    for row, (label, layout) in zip(axes, shown.items(), strict=True):
        seen_HRC = _seen(layout)
        for head, axis in enumerate(row):
            seen = seen_HRC[min(head, len(seen_HRC) - 1)]  # one for all heads is shown for each
            axis.imshow(seen.numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            axis.set_title(f"head {head}: {seen.mean():.0%}", fontsize=7)
            axis.set_xticks([])
            axis.set_yticks([])
        row[0].set_ylabel(label, fontsize=6)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=90)
    return target


def _seen(layout: BlockLayout) -> Tensor:
    """Share of each block that is seen [H, R, C], of the first of the batch."""
    blocks = layout.block_mask()[0].float().cpu()
    if layout.partial is None:
        return blocks
    tokens = layout.to("cpu").dense_mask()[0]  # the small model's: a few hundred squared
    return torch.nn.functional.avg_pool2d(
        tokens.float(), (layout.query_block, layout.key_block), ceil_mode=True, count_include_pad=False
    )
