"""Low delay on the built-in model: what timetables, residual guidance and repeated blocks save and cost.

python -m vidgen.bench.live [--prompts N] [--scenes N]
"""

import argparse
import statistics
import sys
import time
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vidgen.bench.machine import machine_facts, table
from vidgen.config import parse_job
from vidgen.denoise.loop import LoopState, run_tick
from vidgen.engine import Engine
from vidgen.measure.adherence import judge, windows
from vidgen.measure.fidelity import boundary_jump, psnr
from vidgen.measure.report import CLIP_FRAMES, pick_scenes
from vidgen.world import WORLDS, Scene

GUIDANCE: dict[str, dict[str, Any]] = {
    "both branches": {},
    "onetime": {"queue": {"residual_guidance": "onetime"}},
    "self": {"queue": {"residual_guidance": "self"}},
    "onetime, scale 1.5": {"queue": {"residual_guidance": "onetime"}, "guidance_scale": 1.5},
    "self, scale 1.5": {"queue": {"residual_guidance": "self"}, "guidance_scale": 1.5},
    "no guidance": {"guidance_scale": 1.0},
}
THRESHOLDS = (None, 0.95, 0.9, 0.8)
VIDEO_FRAMES, VIDEO_STEPS = 160, 8
BLOCK_FRAMES = 16  # of the built-in model
TIMETABLES: dict[str, dict[str, Any]] = {
    "dualparal": {"timetable": "dualparal"},
    "dualparal, stride 4": {"timetable": "dualparal", "stride": 4},
    "autoregressive": {"timetable": "autoregressive"},
    "autoregressive, cache": {"timetable": "autoregressive", "context_mode": "cache"},
    "buffer of 2": {"timetable": "buffer", "stride": 4},
    "buffer of 4, 2 frames each": {"timetable": "buffer", "stride": 2, "block_frames": 2},
}


@dataclass
class Made:
    """What one setting made, and what it took."""

    videos: list[Tensor] = field(default_factory=list)  # [3, F, Y, X] in [-1, 1]
    seconds: list[float] = field(default_factory=list)
    runs: int = 0  # of the model
    repeats: int = 0  # blocks


@torch.inference_mode()
def make_video(engine: Engine, made: Made, settings: dict[str, Any]) -> None:
    """One more video, timed from noise to pixels."""
    plan = engine.plan(parse_job(settings))
    task, state, latents = plan.task, LoopState(), list[Tensor]()
    started = time.perf_counter()
    while state.next_tick < task.timetable.num_ticks:
        latents += [done.latents_BCFYX for done in run_tick(task, state)]
    pixels = engine.family.codec().stream().decode(torch.cat(latents, dim=2))
    made.seconds.append(time.perf_counter() - started)
    made.videos.append(pixels[0, :, : plan.job.num_frames].clamp(-1, 1))
    runs_of_a_block = sum(map(task.runs_at, range(task.timetable.num_steps)))
    made.runs += (task.timetable.num_blocks - state.still.total) * runs_of_a_block
    made.repeats += state.still.total


def bench_timetables(num_scenes: int, engine: Engine | None = None) -> list[dict[str, Any]]:
    """A row per timetable: when the first frames come, when another prompt shows, how fast, how well.

    A prompt that changes just after a block has begun, which is the longest delay, waits for the next one to
    begin and to end, where the queue is full; in a buffer, for the oldest then in the window to end.
    """
    torch.set_num_threads(1)
    engine = engine or Engine.from_pretrained()
    scenes = pick_scenes(num_scenes, seed=1)
    made = {name: Made() for name in TIMETABLES}
    for seed, scene in enumerate(scenes):
        for name, queue in TIMETABLES.items():
            make_video(engine, made[name], {**_video(scene, seed, None), "queue": queue})
    return [_timetable_row(engine, name, one, scenes) for name, one in made.items()]


def _timetable_row(engine: Engine, name: str, one: Made, scenes: list[Scene]) -> dict[str, Any]:
    plan = engine.plan(parse_job({**_video(scenes[0], 0, None), "queue": TIMETABLES[name]}))
    timetable = plan.task.timetable
    by_tick = [sum(len(forward.parts) for forward in tick) for tick in timetable.ticks()]  # blocks that step
    step_s = statistics.median(one.seconds) / sum(by_tick)
    tick_s = step_s * timetable.num_steps / timetable.stride
    wait = timetable.stride + (timetable.stride if timetable.joint else timetable.num_steps)
    return {
        "timetable": name,
        "first frames ms": round(1000 * step_s * sum(by_tick[: timetable.num_steps])),
        "change ms": round(1000 * tick_s * wait),
        "ms a frame": round(1000 * statistics.median(one.seconds) / VIDEO_FRAMES, 2),
        "windows right": _right(one, scenes),
        "border jump": _jump(one, timetable.block_frames * plan.sizes.temporal_stride),
    }


def bench_guidance(num_prompts: int, steps: int, engine: Engine | None = None) -> list[dict[str, Any]]:
    """A row per kind of guidance: runs of the model, speed-up, nearness to both branches, adherence."""
    torch.set_num_threads(1)
    engine = engine or Engine.from_pretrained()
    made = {name: Made() for name in GUIDANCE}
    scenes = pick_scenes(num_prompts, seed=0)
    for seed, scene in enumerate(scenes):
        clip = {"num_frames": CLIP_FRAMES, "num_inference_steps": steps, "seed": seed, "threads": 1}
        for name, settings in GUIDANCE.items():  # taking turns, so that a busy moment hits all alike
            queue = {"timetable": "full", **settings.get("queue", {})}
            make_video(engine, made[name], {"prompt": scene.caption(), **clip, **settings, "queue": queue})
    first = made["both branches"]
    rows = []
    for name, one in made.items():
        verdicts = [judge(video, scene) for video, scene in zip(one.videos, scenes, strict=True)]
        rows.append(
            {
                "steps": steps,
                "guidance": name,
                "runs": one.runs // len(scenes),
                "ms a clip": round(1000 * statistics.median(one.seconds), 1),
                "speed-up": round(statistics.median(first.seconds) / statistics.median(one.seconds), 2),
                "PSNR": round(_psnr(one, first), 2),
                **{
                    factor: f"{sum(getattr(verdict, factor) for verdict in verdicts)}/{len(verdicts)}"
                    for factor in ("colour", "shape", "motion", "background", "all")
                },
            }
        )
    return rows


def bench_still(num_scenes: int, engine: Engine | None = None) -> list[dict[str, Any]]:
    """A row per threshold for scenes that stay still, and for scenes that move, a block at a time.

    Blocks repeated, speed-up, nearness to what comes of denoising every block, windows of 16 frames that show
    what was asked for, and how much larger the change at block borders is than within.
    """
    torch.set_num_threads(1)
    engine = engine or Engine.from_pretrained()
    rows = []
    for kind, scenes in _scenes(num_scenes).items():
        made = {threshold: Made() for threshold in THRESHOLDS}
        for seed, scene in enumerate(scenes):
            video = partial(_video, scene, seed)
            for threshold in THRESHOLDS:
                make_video(engine, made[threshold], video(threshold))
        rows += [_still_row(kind, threshold, one, made[None], scenes) for threshold, one in made.items()]
    return rows


def _video(scene: Scene, seed: int, threshold: float | None) -> dict[str, Any]:
    return {
        "prompt": scene.caption(),
        "seed": seed,
        "threads": 1,
        "num_frames": VIDEO_FRAMES,
        "num_inference_steps": VIDEO_STEPS,
        "queue": {"timetable": "autoregressive", "static_threshold": threshold},
    }


def _scenes(count: int) -> dict[str, list[Scene]]:
    """Still ones and moving ones, of those that the model was trained on."""
    trained, _ = WORLDS["small"].split()
    groups = {
        "still": [scene for scene in trained if scene.motion == "still"],
        "moving": [scene for scene in trained if scene.motion != "still"],
    }
    return {kind: scenes[:: max(1, len(scenes) // count)][:count] for kind, scenes in groups.items()}


def _still_row(
    kind: str, threshold: float | None, one: Made, first: Made, scenes: list[Scene]
) -> dict[str, Any]:
    return {
        "scenes": f"{len(scenes)} {kind}",
        "threshold": "none" if threshold is None else threshold,
        "repeated": f"{one.repeats}/{VIDEO_FRAMES // BLOCK_FRAMES * len(scenes)}",
        "speed-up": round(statistics.median(first.seconds) / statistics.median(one.seconds), 2),
        "PSNR": round(_psnr(one, first), 2),
        "windows right": _right(one, scenes),
        "border jump": _jump(one, BLOCK_FRAMES),
    }


def _right(one: Made, scenes: list[Scene]) -> str:
    """Windows that show what was asked for, of how many."""
    seen = [
        measured.verdict(scene).all
        for video, scene in zip(one.videos, scenes, strict=True)
        for measured in windows(video, CLIP_FRAMES)
    ]
    return f"{sum(seen)}/{len(seen)}"


def _jump(one: Made, block_frames: int) -> float:
    """How much larger the change at the borders of blocks is than within; 1 when none is seen."""
    borders = list(range(block_frames, VIDEO_FRAMES, block_frames))
    return round(statistics.mean(boundary_jump(video, borders) for video in one.videos), 2)


def _psnr(one: Made, other: Made) -> float:
    return float(psnr(torch.stack(one.videos), torch.stack(other.videos)))


def main() -> None:
    """Print all tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--scenes", type=int, default=8)
    given = parser.parse_args()
    engine = Engine.from_pretrained()
    guidance = [row for steps in (20, 8) for row in bench_guidance(given.prompts, steps, engine)]
    parts = (
        ", ".join(f"{name} {value}" for name, value in machine_facts().items()),
        table(bench_timetables(given.scenes, engine)),
        table(guidance),
        table(bench_still(given.scenes, engine)),
    )
    sys.stdout.write("\n".join(parts) + "\n")


if __name__ == "__main__":
    main()
