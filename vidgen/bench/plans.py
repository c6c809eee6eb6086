"""The planner held against renders: predicted and measured seconds of many plans of the built-in model.

Every render runs in processes of its own. Seconds count from the first run of the model until the last block
is durable, as the planner counts them; starting ranks is not in them. Plans, and passes of the profile, take
turns, so that a busy minute hits all alike.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vidgen.bench.rendering import PROMPT
from vidgen.parallel.planner.hardware import Hardware

TIMEOUT_S = 1800
ALLOWED = (0.85, 1.15)  # predicted over measured


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanCase:
    """A render: the settings of a job that are its plan."""

    ranks: int
    queue: dict[str, Any]
    lanes: dict[str, int] = field(default_factory=dict)
    cache: str = "none"  # a method of step caches, as it is by default

    @property
    def name(self) -> str:
        """Such as `2 ranks, guidance 2`."""
        shared = [f"{axis} {size}" for axis, size in self.lanes.items()]
        cached = [] if self.cache == "none" else [f"cache {self.cache}"]
        return ", ".join([f"{self.ranks} rank{'s' if self.ranks > 1 else ''}", *shared, *cached])

    def settings(self) -> dict[str, Any]:
        """Of a job, beside its size and its ranks."""
        return {"prompt": PROMPT, "queue": self.queue, "cache": {"method": self.cache}}


QUEUE = {"timetable": "dualparal", "block_frames": 4, "context_frames": 2, "context_mode": "recompute"}
CACHE = {**QUEUE, "context_mode": "cache"}
WIDE = {**QUEUE, "block_frames": 8}
FULL = {"timetable": "full"}
STAGES_ONLY = (
    PlanCase(ranks=1, queue=QUEUE),
    PlanCase(ranks=1, queue=CACHE),
    PlanCase(ranks=1, queue=FULL),
    PlanCase(ranks=2, queue=QUEUE),
    PlanCase(ranks=2, queue=CACHE),
    PlanCase(ranks=2, queue=WIDE),
    PlanCase(ranks=2, queue=FULL),
    PlanCase(ranks=2, queue={**CACHE, "stride": 2}),
    PlanCase(ranks=3, queue=QUEUE),
)
LANES = (
    PlanCase(ranks=2, queue=FULL, lanes={"ulysses": 2}),
    PlanCase(ranks=2, queue=FULL, lanes={"ring": 2}),
    PlanCase(ranks=2, queue=FULL, lanes={"guidance": 2}),
    PlanCase(ranks=2, queue=CACHE, lanes={"guidance": 2}),
    PlanCase(ranks=2, queue={**QUEUE, "timetable": "lockstep"}, lanes={"clip": 2}),
)
CACHED = (
    PlanCase(ranks=1, queue=QUEUE, cache="taylor"),
    PlanCase(ranks=1, queue=FULL, cache="mag"),
    PlanCase(ranks=1, queue=QUEUE, cache="delta"),
    PlanCase(ranks=1, queue=QUEUE, cache="region"),
    PlanCase(ranks=2, queue=QUEUE, cache="taylor"),
    PlanCase(ranks=2, queue=CACHE, cache="mag"),
    PlanCase(ranks=2, queue=QUEUE, cache="delta"),
    PlanCase(ranks=2, queue=FULL, cache="taylor", lanes={"ulysses": 2}),
    PlanCase(ranks=2, queue=QUEUE, cache="taylor", lanes={"guidance": 2}),
)


def bench_plans(
    hardware: Hardware | None,
    num_frames: int,
    cases: Sequence[PlanCase],
    repeats: int = 1,
    num_steps: int = 20,
) -> tuple[Hardware, list[dict[str, Any]]]:
    """(the profile, a row per plan): seconds and time to the first frame, predicted and measured, and ratios.

    Medians of the repeats. Without a profile this machine's is measured, in turns with the renders: its pace
    drifts by a third within minutes, and both are to see the same minutes.
    """
    from vidgen.bench.calibrate import calibrate  # not in the renders' own processes
    from vidgen.bench.passes import middle

    readings: list[list[dict[str, float]]] = [[] for _ in cases]
    profiles = []
    for _ in range(repeats):
        if hardware is None:
            profiles.append(calibrate(passes=1))
        for case, found in zip(cases, readings, strict=True):
            found.append(in_own_process(case, num_frames, num_steps))
    hardware = hardware or middle(profiles)
    return hardware, [
        _row(case, predict(hardware, case, num_frames, num_steps), found)
        for case, found in zip(cases, readings, strict=True)
    ]


def _row(case: PlanCase, predicted: dict[str, Any], found: Sequence[dict[str, float]]) -> dict[str, Any]:
    seconds = statistics.median(reading["seconds"] for reading in found)
    return {
        "video": predicted["video"],
        "plan": case.name,
        "predicted s": round(predicted["seconds"], 3),
        "measured s": round(seconds, 3),
        "ratio": round(predicted["seconds"] / seconds, 3),
        "least to most s": " to ".join(f"{end(r['seconds'] for r in found):.2f}" for end in (min, max)),
        "first frame, predicted": round(predicted["first_frame_s"], 3),
        "first frame, measured": round(statistics.median(r["first_frame_s"] for r in found), 3),
        "MiB a rank, predicted": round(predicted["memory_bytes"] / 2**20),
        "MiB a rank, measured": round(max(r["memory_bytes"] for r in found) / 2**20),
    }


def verdict(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Whether predictions hold, and how much slower the plan that they choose is than the best measured."""
    within = [row for row in rows if ALLOWED[0] <= row["ratio"] <= ALLOWED[1]]
    choice = min(rows, key=lambda row: row["predicted s"])
    quickest = min(rows, key=lambda row: row["measured s"])
    return {
        "within": f"{len(within)} of {len(rows)} within {ALLOWED[0]} to {ALLOWED[1]}",
        "choice": f"{choice['video']}, {choice['plan']}",
        "choice over best": round(choice["measured s"] / quickest["measured s"], 3),
    }


def predict(hardware: Hardware, case: PlanCase, num_frames: int, num_steps: int) -> dict[str, Any]:
    """What the planner says of a case."""
    from vidgen.choosing import film_of, own_scheme
    from vidgen.config import parse_job
    from vidgen.engine import Engine
    from vidgen.parallel.planner.plan import examine
    from vidgen.parallel.topology import Lanes
    from vidgen.planning import resolve_job

    engine = Engine.from_pretrained("builtin", with_dit=False)
    asked = {"num_frames": num_frames, "num_inference_steps": num_steps, **case.settings()}
    job = resolve_job(engine.family, parse_job(asked), engine.sparsity)
    lanes = Lanes(**case.lanes)
    scheme = own_scheme(engine.family, job)
    plan = examine(film_of(engine.family, job), hardware, scheme, lanes, case.ranks // lanes.num_lanes)
    if plan.does_not_fit is not None:
        raise ValueError(f"{case.name}: {plan.does_not_fit}")
    return {
        "video": scheme.label,
        "seconds": plan.seconds,
        "first_frame_s": plan.first_frame_s,
        "memory_bytes": plan.memory_bytes,
    }


def render_once(case: PlanCase, num_frames: int, num_steps: int, folder: Path) -> dict[str, float]:
    """One render, and what it took from the first run of the model to the last block on the disk."""
    from vidgen.config import parse_job
    from vidgen.live import Live
    from vidgen.parallel.memory import peak_memory_bytes
    from vidgen.render import render

    began: list[float] = []
    committed: list[float] = []

    def check() -> None:
        if not began:
            began.append(time.time())

    live = Live(check=check, committed=lambda block: committed.append(time.time()))
    asked = {"num_frames": num_frames, "num_inference_steps": num_steps, **case.settings()}
    parallel = {"ranks": case.ranks, "trace": False, **case.lanes}
    output = {"path": folder / "bench.mp4", "sheet": False}
    job = parse_job({**asked, "parallel": parallel, "output": output})
    done = render(job, live=live)
    start, memory = began[0], peak_memory_bytes()
    if done.evidence is not None and "attempts" in done.evidence:
        (attempt,) = done.evidence["attempts"]
        start = min(rank["began_s"] for rank in attempt["ranks"])
        memory = max(rank["peak_memory_bytes"] for rank in attempt["ranks"])
    return {
        "seconds": committed[-1] - start,
        "first_frame_s": committed[0] - start,
        "memory_bytes": memory,
    }


def in_own_process(case: PlanCase, num_frames: int, num_steps: int) -> dict[str, float]:
    """The same, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        said = json.dumps(asdict(case))
        command = [sys.executable, "-m", "vidgen.bench.plans", said, str(num_frames)]
        done = subprocess.run(
            [*command, str(num_steps), folder], capture_output=True, text=True, timeout=TIMEOUT_S
        )
        if done.returncode != 0:
            raise RuntimeError(f"a render of the bench failed ({case.name}): {done.stderr.strip()[-500:]}")
        return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    what, frames, steps, place = sys.argv[1:]
    found = render_once(PlanCase(**json.loads(what)), int(frames), int(steps), Path(place))
    sys.stdout.write(json.dumps(found) + "\n")
