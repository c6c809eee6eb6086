"""The engine against diffusers on Wan's architecture: the same random weights, noise, steps and threads.

Both sides run the public call with all frames at once and guidance, in turns, so that what else the machine
does falls on both. Nothing is decoded: the codec is diffusers' own on both sides.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vidgen.bench.random_wan import MID, make_wan
from vidgen.engine import Engine

PROMPT, NEGATIVE = "a red cat runs over the grass", "a blue dog"
NUM_RANKS = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class PeersCase:
    """What is rendered. The default is 4,200 tokens and about 100 M parameters."""

    height: int = 480
    width: int = 448
    num_frames: int = 17
    readings: int = 3
    threads: int = 2
    compile: bool = False


def bench_peers(case: PeersCase) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(a row per side: seconds per step, their ratio, the largest difference; a row per rank that loads)."""
    before = torch.get_num_threads()
    torch.set_num_threads(case.threads)
    try:
        with tempfile.TemporaryDirectory() as place:
            folder = make_wan(Path(place) / "wan", "t2v", sizes=MID)
            return _bench_steps(case, folder), _bench_loading(folder)
    finally:
        torch.set_num_threads(before)


def _bench_steps(case: PeersCase, folder: Path) -> list[dict[str, Any]]:
    from diffusers.pipelines.wan.pipeline_wan import WanPipeline

    pipeline: Any = WanPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    engine = Engine.from_pretrained(folder, dtype="fp32")
    sides: dict[str, Callable[..., Any]] = {"diffusers": pipeline, "vidgen": engine}
    if case.compile:
        sides["vidgen, compiled"] = Engine.from_pretrained(folder, dtype="fp32")
    stride = engine.family.sizes.spatial_stride
    shape = (1, engine.config.latent_channels, engine.family.sizes.num_latent_frames(case.num_frames))
    noise = torch.randn(*shape, case.height // stride, case.width // stride)
    given = {
        "prompt": PROMPT, "negative_prompt": NEGATIVE, "height": case.height, "width": case.width,
        "num_frames": case.num_frames, "guidance_scale": 4.0, "latents": noise, "output_type": "latent",
    }  # fmt: skip
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    latents: dict[str, Tensor] = {}
    for reading in range(case.readings + 1):
        for name, call in sides.items():
            more = {"compile": True} if "compiled" in name else {}
            took, latents[name] = _step_seconds(call, {**given, **more})
            if reading:  # the first warms up, and compiles
                seconds[name].append(took)
    theirs = statistics.median(seconds["diffusers"])
    tokens = noise.shape[2] * noise.shape[3] * noise.shape[4] // 4
    return [
        {
            "what": f"seconds per step, {tokens} tokens",
            "side": name,
            "median": round(statistics.median(found), 3),
            "spread": f"{min(found):.2f}-{max(found):.2f}",
            "diffusers / this": round(theirs / statistics.median(found), 3),
            "largest difference": f"{_difference(latents[name], latents['diffusers']):.1e}",
        }
        for name, found in seconds.items()
    ]


def _step_seconds(call: Callable[..., Any], given: dict[str, Any]) -> tuple[float, Tensor]:
    """(seconds from the end of the first step to the end of the second, clean latents after both)."""
    ends: list[float] = []

    def tell(*_: Any) -> dict[str, Any]:
        ends.append(time.perf_counter())
        return {}

    latents = call(num_inference_steps=2, callback_on_step_end=tell, **given).frames
    return ends[1] - ends[0], latents


def _difference(found: Tensor, expected: Tensor) -> float:
    """Largest error, of the expected scale."""
    return float((found - expected).abs().max() / expected.abs().max())


def _bench_loading(folder: Path) -> list[dict[str, Any]]:
    """Each of four ranks loads its layers in a process of its own."""
    rows = []
    for rank in range(NUM_RANKS):
        command = [sys.executable, "-m", "vidgen.bench.peers", str(folder), str(rank)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
        if done.returncode != 0:
            raise RuntimeError(f"loading rank {rank} failed: {done.stderr.strip()[-500:]}")
        found = json.loads(done.stdout.splitlines()[-1])
        rows.append(
            {
                "loading": f"rank {rank} of {NUM_RANKS}",
                "read / all bytes": round(found["bytes_read"] / found["bytes_stored"], 3),
                "peak memory / weights": round(found["peak_bytes"] / found["weight_bytes"], 3),
                "MiB of weights": round(found["weight_bytes"] / 2**20, 1),
            }
        )
    return rows


def load_once(folder: Path, rank: int) -> dict[str, int]:
    """What one rank's load reads and takes, in this process."""
    from vidgen.families.opening import open_model
    from vidgen.parallel.place import place
    from vidgen.parallel.topology import balanced

    family = open_model(str(folder), dtype="fp32")
    config, (weights,) = family.dits[0].config, family.weights()
    stage = balanced(config.num_layers, NUM_RANKS).stage(rank)
    _reset_peak()
    before = _memory_bytes("VmRSS")
    placed = place(weights, config, stage, torch.device("cpu"))
    peak = _memory_bytes("VmHWM") - before
    whole = sum(tensor.numel() * 4 for tensor in family.dits[0].state_dict().values())
    held = sum(tensor.numel() * 4 for tensor in placed.model.state_dict().values())
    return {
        "bytes_read": placed.bytes_read, "bytes_stored": whole, "peak_bytes": peak, "weight_bytes": held
    }  # fmt: skip


def _reset_peak() -> None:
    """Let VmHWM begin anew at what is held now (proc(5), clear_refs)."""
    Path("/proc/self/clear_refs").write_text("5")


def _memory_bytes(name: str) -> int:
    """A line of /proc/self/status: memory of files that are mapped counts too."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {name}")


if __name__ == "__main__":
    sys.stdout.write(json.dumps(load_once(Path(sys.argv[1]), int(sys.argv[2]))) + "\n")
