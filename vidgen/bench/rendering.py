"""Renders end to end: seconds, time to the first frame, peak memory.

Each length runs in a process of its own, so that its peak memory is its own.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

PROMPT = "a red circle moving left over a gray background"


def bench_render(lengths: list[int]) -> list[dict[str, Any]]:
    """Per length: seconds, seconds per frame, time to the first frame, peak memory; end to end on disk."""
    rows = []
    for num_frames in lengths:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "vidgen.bench.rendering", str(num_frames), folder]
            done = subprocess.run(command, capture_output=True, text=True, timeout=3600)
            if done.returncode != 0:
                raise RuntimeError(f"bench of {num_frames} frames failed: {done.stderr.strip()[-500:]}")
            rows.append(json.loads(done.stdout.splitlines()[-1]))
    return rows


def render_once(num_frames: int, folder: Path) -> dict[str, Any]:
    """One render in this process, and what it took."""
    from vidgen.config import parse_job
    from vidgen.parallel.memory import peak_memory_bytes
    from vidgen.render import render

    output = {"path": folder / "bench.mp4", "sheet": False}
    done = render(parse_job({"prompt": PROMPT, "num_frames": num_frames, "output": output}))
    return {
        "num_frames": num_frames,
        "seconds": round(done.seconds, 2),
        "seconds_per_frame": round(done.seconds / num_frames, 4),
        "first_frame_s": round(done.first_frame_s or 0.0, 2),
        "peak_memory_mib": peak_memory_bytes() // 2**20,
    }


if __name__ == "__main__":
    sys.stdout.write(json.dumps(render_once(int(sys.argv[1]), Path(sys.argv[2]))) + "\n")
