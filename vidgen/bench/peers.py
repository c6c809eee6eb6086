"""Our engine beside diffusers' WanPipeline: the same random checkpoint, steps, threads and dtype, in one run.

Seconds of a denoising step, as both are and with compiled layers; what one of several ranks reads to load its
part, and how much memory that takes.
"""

import gc
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vidgen.bench.random_wan import MID, WORDS, Sizes, make_wan
from vidgen.engine import Engine
from vidgen.families.opening import open_model
from vidgen.model.dit import DiTConfig
from vidgen.parallel.place import place, strip
from vidgen.parallel.topology import Stage, balanced

OURS, THEIRS = "vidgen", "diffusers"
COMPILED = ", compiled"
TARGETS = {"speed-up": 1.15, "read": 0.35, "peak": 1.1}
Told = Callable[[Any, int, Any, dict[str, Any]], dict[str, Any]]
Run = Callable[[Told], Tensor]  # clean latents; the callback is called after every step


@dataclass(frozen=True, kw_only=True, slots=True)
class PeersCase:
    """What is run. The defaults are about 100 million parameters and 4,680 tokens, in minutes."""

    sizes: Sizes = MID
    height: int = 480
    width: int = 832
    num_frames: int = 9
    num_steps: int = 3  # per reading; the first one is left out
    rounds: int = 3
    threads: int = 2
    prompt_words: int = 100  # of prompt and negative prompt, about a token each; Wan pads both to 512
    num_ranks: int = 4
    compile: bool = True
    device: str = "cpu"
    dtype: str = "fp32"

    def __post_init__(self) -> None:
        if self.num_steps < 2 or self.rounds < 1:
            raise ValueError(f"num_steps={self.num_steps}, rounds={self.rounds}: need 2 and 1 at least")


def bench_peers(case: PeersCase | None = None) -> dict[str, Any]:
    """`steps`: a row for each of the engines; `loading`: of the fullest rank; `targets`; `case`."""
    case = case or PeersCase()
    with tempfile.TemporaryDirectory() as place_of_it:
        folder = make_wan(Path(place_of_it) / "wan", "t2v", sizes=case.sizes)
        with _threads(case.threads), _no_compiled_code_kept(case.compile):
            steps = _bench_steps(case, folder)
        loading = _bench_loading(case, folder)
    return {"case": asdict(case), "steps": steps, "loading": loading, "targets": TARGETS}


def rows(found: dict[str, Any]) -> list[dict[str, Any]]:
    """What `bench_peers` found, as one table of ratios with their targets."""
    by_name = {row["engine"]: row for row in found["steps"]}
    loading, targets = found["loading"], found["targets"]
    table = [
        {
            "what": f"step, {name}",
            "found": row["seconds"],
            "spread": f"{row['least']} to {row['most']}",
            "CPU seconds": row["CPU seconds"],
            "max error": row["max error"],
            "compile s": row["compile s"] or "",
            "ratio": row["speed-up"],
            "target": f">= {targets['speed-up']}" if name == OURS else "",
        }
        for name, row in by_name.items()
    ]
    for what, key in (("share of bytes read by a rank", "read"), ("peak of its load / weights", "peak")):
        blank = {"spread": "", "CPU seconds": "", "max error": "", "compile s": ""}
        table.append(
            {"what": what, "found": loading[f"{key} MB"], **blank}
            | {"ratio": loading[key], "target": f"<= {targets[key]}"}
        )
    return table


def _bench_steps(case: PeersCase, folder: Path) -> list[dict[str, Any]]:
    """A row per engine: median, least and most seconds of a step, ratio to diffusers', error against it."""
    runs = {THEIRS: _diffusers(case, folder, compiled=False), OURS: _vidgen(case, folder, compiled=False)}
    if case.compile:
        runs |= {f"{THEIRS}{COMPILED}": _diffusers(case, folder, compiled=True)}
        runs |= {f"{OURS}{COMPILED}": _vidgen(case, folder, compiled=True)}
    readings: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    first_steps: dict[str, float] = {}
    latents: dict[str, Tensor] = {}
    for _ in range(case.rounds):
        for name, run in runs.items():  # in turns, so that a busy moment hits all alike
            latents[name], taken = _timed(run)
            first_steps.setdefault(name, taken[0][0])
            readings[name] += taken[1:]
    medians = {name: statistics.median(wall for wall, _ in taken) for name, taken in readings.items()}
    expected = latents[THEIRS]
    return [
        {
            "engine": name,
            "seconds": round(medians[name], 4),
            "least": round(min(wall for wall, _ in taken), 4),
            "most": round(max(wall for wall, _ in taken), 4),
            "CPU seconds": round(statistics.median(cpu for _, cpu in taken), 4),
            "readings": len(taken),
            "speed-up": round(medians[THEIRS] / medians[name], 3),
            "compile s": round(max(0.0, first_steps[name] - medians[name]), 1) if COMPILED in name else None,
            "max error": float((latents[name].cpu() - expected.cpu()).abs().max()),
            "scale": float(expected.abs().max()),
        }
        for name, taken in readings.items()
    ]


def _timed(run: Run) -> tuple[Tensor, list[tuple[float, float]]]:
    """(latents, wall and CPU seconds of each step; the first one has all that comes before it)."""
    gc.collect()
    times = [(time.perf_counter(), time.process_time())]

    def told(_pipeline: Any, _step: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append((time.perf_counter(), time.process_time()))
        return tensors

    latents = run(told)
    pairs = zip(times, times[1:], strict=False)
    return latents, [(after[0] - before[0], after[1] - before[1]) for before, after in pairs]


def _arguments(case: PeersCase) -> dict[str, Any]:
    """What both are called with."""
    words = WORDS * (case.prompt_words // len(WORDS) + 1)
    return {
        "prompt": " ".join(words[: case.prompt_words]),
        "negative_prompt": " ".join(words[::-1][: case.prompt_words]),
        "height": case.height,
        "width": case.width,
        "num_frames": case.num_frames,
        "num_inference_steps": case.num_steps,
        "guidance_scale": 5.0,
        "output_type": "latent",
    }


def _vidgen(case: PeersCase, folder: Path, *, compiled: bool) -> Run:
    engine = Engine.from_pretrained(folder, dtype=case.dtype, device=case.device)
    if compiled:
        engine.compile()
    noise = torch.Generator()
    return lambda told: (
        engine(
            **_arguments(case),
            generator=noise.manual_seed(0),
            queue={"timetable": "full"},
            callback_on_step_end=told,
        ).frames
    )


def _diffusers(case: PeersCase, folder: Path, *, compiled: bool) -> Run:
    from diffusers.pipelines.wan.pipeline_wan import WanPipeline

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[case.dtype]
    pipeline: Any = WanPipeline.from_pretrained(folder, dtype=dtype).to(case.device)
    pipeline.set_progress_bar_config(disable=True)
    if compiled:
        pipeline.transformer.compile_repeated_blocks()
    noise = torch.Generator()
    return lambda told: (
        pipeline(**_arguments(case), generator=noise.manual_seed(0), callback_on_step_end=told).frames
    )


def _bench_loading(case: PeersCase, folder: Path) -> dict[str, Any]:
    """Of the rank with the most weights, in a process of its own: shares, and MB."""
    command = [sys.executable, "-m", "vidgen.bench.peers", str(folder), str(case.num_ranks)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3600)
    if done.returncode != 0:
        raise RuntimeError(f"loading a rank failed: {done.stderr.strip()[-500:]}")
    return json.loads(done.stdout.splitlines()[-1])


def load_fullest_rank(folder: Path, num_ranks: int) -> dict[str, Any]:
    """What the rank with the most weights reads and needs, in this process.

    The peak is of resident memory, pages of mapped files among it, over what was there before.
    """
    family = open_model(str(folder), dtype="fp32")
    weights, config = family.weights()[0], family.dits[0].config
    stage = max(balanced(config.num_layers, num_ranks).stages(), key=lambda stage: _num_bytes(config, stage))
    whole = balanced(config.num_layers, 1).stage(0)
    strip(config, stage)  # what is loaded on first use is in memory now
    with _Watched() as memory:
        placed = place(weights, config, stage, torch.device("cpu"))
    weight_bytes = _num_bytes(config, stage)
    assert sum(p.numel() * p.element_size() for p in placed.model.state_dict().values()) == weight_bytes
    return {
        "rank": stage.index,
        "num_ranks": num_ranks,
        "read": round(placed.bytes_read / _num_bytes(config, whole), 4),
        "read MB": round(placed.bytes_read / 1e6, 3),
        "weights MB": round(weight_bytes / 1e6, 3),
        "peak": round(memory.peak["VmRSS"] / weight_bytes, 4),
        "peak MB": round(memory.peak["VmRSS"] / 1e6, 3),
        "peak anonymous MB": round(memory.peak["RssAnon"] / 1e6, 3),
        "peak of files MB": round(memory.peak["RssFile"] / 1e6, 3),
    }


def _num_bytes(config: DiTConfig, stage: Stage) -> int:
    return sum(
        tensor.numel() * tensor.element_size() for tensor in strip(config, stage).state_dict().values()
    )


class _Watched:
    """Peaks of this process's memory, in bytes above what it was when watching began."""

    def __init__(self) -> None:
        self.peak: dict[str, int] = {}
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "_Watched":
        gc.collect()
        self._before = _memory()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self._look()

    def _watch(self) -> None:
        while not self._done.wait(0.001):
            self._look()

    def _look(self) -> None:
        for name, num_bytes in _memory().items():
            self.peak[name] = max(self.peak.get(name, 0), num_bytes - self._before[name])


def _memory() -> dict[str, int]:
    """Bytes of resident memory of this process: all, anonymous, pages of files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = (line.split() for line in lines if line.startswith(("VmRSS", "RssAnon", "RssFile")))
    return {name.rstrip(":"): int(kilobytes) * 1024 for name, kilobytes, _ in fields}


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _no_compiled_code_kept(compiles: bool) -> Iterator[None]:
    """Compiling takes as long as it does the first time."""
    if not compiles:
        yield
        return
    from torch._inductor.utils import fresh_cache

    with fresh_cache():
        yield


if __name__ == "__main__":
    sys.stdout.write(json.dumps(load_fullest_rank(Path(sys.argv[1]), int(sys.argv[2]))) + "\n")
