"""Renders on one rank and on several, side by side: speed-up, slots, memory and bytes of each.

Every render runs in a process of its own. Numbers of ranks take turns, so that a busy minute hits all alike.
"""

import json
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from vidgen.bench.rendering import PROMPT

MIB = 2**20
TIMEOUT_S = 7200


def bench_pipeline(num_frames: int, ranks: list[int], repeats: int) -> list[dict[str, Any]]:
    """Per number of ranks, medians: seconds once it runs, speed-up over one rank, slots, memory, bytes."""
    readings: dict[int, list[dict[str, Any]]] = {count: [] for count in ranks}
    for _ in range(repeats):
        for count in ranks:
            readings[count].append(_in_own_process(num_frames, count))
    rows = [_median(found) for found in readings.values()]
    first = rows[0]
    return [row | {"speed_up": round(first["working_s"] / row["working_s"], 3)} for row in rows]


def bench_lengths(lengths: list[int], ranks: int) -> list[dict[str, Any]]:
    """Per length: seconds per frame once it runs, and peak memory, which should not grow."""
    return [_in_own_process(num_frames, ranks) for num_frames in lengths]


def render_once(num_frames: int, ranks: int, folder: Path) -> dict[str, Any]:
    """One render in this process, and what it took."""
    from vidgen.config import parse_job
    from vidgen.render import render

    output = {"path": folder / "bench.mp4", "sheet": False}
    parallel = {"ranks": ranks, "trace": False}
    done = render(
        parse_job({"prompt": PROMPT, "num_frames": num_frames, "output": output, "parallel": parallel})
    )
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    row = {"num_frames": num_frames, "ranks": ranks, "seconds": done.seconds, "driver_mib": own}
    if done.evidence is None:
        facts: dict[str, Any] = {
            "working_s": done.seconds, "utilisation": 1.0, "bubble_share": 0.0, "layers": "all",
            "rank_mib": own, "weights_mib": "all", "link_kib_per_frame": 0.0,
        }  # fmt: skip
    else:
        (attempt,) = done.evidence["attempts"]
        found = attempt["ranks"]
        facts = {
            "working_s": attempt["working_s"],
            "utilisation": attempt["utilisation"],
            "bubble_share": attempt["bubble_share"],
            "layers": "+".join(map(str, attempt["layers_per_rank"])),
            "rank_mib": max(rank["peak_memory_bytes"] for rank in found) // MIB,
            "weights_mib": "+".join(f"{rank['weight_bytes'] / MIB:.1f}" for rank in found),
            "link_kib_per_frame": round(max(attempt["bytes_per_link"].values()) / 1024 / num_frames, 1),
        }
    return row | {"s_per_frame": round(facts["working_s"] / num_frames, 5)} | facts


def _in_own_process(num_frames: int, ranks: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "vidgen.bench.pipeline", str(num_frames), str(ranks), folder]
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
    if done.returncode != 0:
        raise RuntimeError(f"bench on {ranks} ranks failed: {done.stderr.strip()[-500:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _median(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians of what is a figure; of the rest the first row's."""
    return {
        name: round(statistics.median(row[name] for row in rows), 5)
        if isinstance(value, int | float)
        else value
        for name, value in rows[0].items()
    }


if __name__ == "__main__":
    given = render_once(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
    sys.stdout.write(json.dumps(given) + "\n")
