"""Renders on one rank and on several, side by side: speed-up, slots, memory and bytes of each.

Every render runs in a process of its own. Numbers of ranks take turns, so that a busy minute hits all alike.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from vidgen.bench.rendering import PROMPT

MIB = 2**20
TIMEOUT_S = 7200


def bench_pipeline(num_frames: int, ranks: list[int], repeats: int, side: int) -> list[dict[str, Any]]:
    """Per number of ranks, medians: seconds once it runs, speed-up over the first, slots, memory, bytes.

    The row `2 apart` is what this machine can give at best: two renders of one rank each, at once, counted as
    if they had been one job.
    """
    readings: dict[str, list[dict[str, Any]]] = {}
    for _ in range(repeats):
        for count in ranks:
            readings.setdefault(str(count), []).extend(_in_own_processes([(num_frames, count, side)]))
        pair = _in_own_processes([(num_frames, 1, side)] * 2)
        readings.setdefault("2 apart", []).append(_as_one_job(pair))
    rows: list[dict[str, Any]] = [_median(found) | {"ranks": name} for name, found in readings.items()]
    first = rows[0]
    return [row | {"speed_up": round(first["working_s"] / row["working_s"], 3)} for row in rows]


def bench_lengths(lengths: list[int], ranks: int, side: int) -> list[dict[str, Any]]:
    """Per length: seconds per frame once it runs, and peak memory, which should not grow."""
    return [row for frames in lengths for row in _in_own_processes([(frames, ranks, side)])]


def _as_one_job(pair: list[dict[str, Any]]) -> dict[str, Any]:
    """Two renders at once did twice the work of one: half their time is what one job takes at best."""
    times = {name: max(row[name] for row in pair) / 2 for name in ("seconds", "working_s", "s_per_frame")}
    return pair[0] | times


def render_once(num_frames: int, ranks: int, side: int, folder: Path) -> dict[str, Any]:
    """One render of side x side pixels in this process, and what it took."""
    from vidgen.config import parse_job
    from vidgen.parallel.memory import peak_memory_bytes
    from vidgen.render import render

    output = {"path": folder / "bench.mp4", "sheet": False}
    parallel = {"ranks": ranks, "trace": False}
    size = {"num_frames": num_frames, "height": side, "width": side}
    done = render(parse_job({"prompt": PROMPT, **size, "output": output, "parallel": parallel}))
    own = peak_memory_bytes() // MIB
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


def _in_own_processes(renders: list[tuple[int, int, int]]) -> list[dict[str, Any]]:
    """Rows of renders (frames, ranks, side) that run at once."""
    with tempfile.TemporaryDirectory() as folder:
        running = []
        for index, numbers in enumerate(renders):
            (Path(folder) / str(index)).mkdir()
            command = [sys.executable, "-m", "vidgen.bench.pipeline", *map(str, numbers), f"{folder}/{index}"]
            running.append(
                subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            )
        rows = []
        for process in running:
            out, errors = process.communicate(timeout=TIMEOUT_S)
            if process.returncode != 0:
                raise RuntimeError(f"a render of the bench failed: {errors.strip()[-500:]}")
            rows.append(json.loads(out.splitlines()[-1]))
    return rows


def _median(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians of what is a figure; of the rest the first row's."""
    return {
        name: round(statistics.median(row[name] for row in rows), 5)
        if isinstance(value, int | float)
        else value
        for name, value in rows[0].items()
    }


if __name__ == "__main__":
    *numbers, place = sys.argv[1:]
    frames, count, pixels = map(int, numbers)
    sys.stdout.write(json.dumps(render_once(frames, count, pixels, Path(place))) + "\n")
