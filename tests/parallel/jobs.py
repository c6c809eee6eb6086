"""Small jobs for ranks, what they leave, and what must not be left of them."""

import os
from pathlib import Path
from typing import Any

from vidgen.config import JobConfig, parse_job


def job(output: Path, ranks: Any, **settings: Any) -> JobConfig:
    parallel = {"ranks": ranks, **settings.pop("parallel", {})}
    return parse_job(
        {
            "segments": [
                {"prompt": "a blue square moving up over a white background", "num_frames": 20},
                {"prompt": "a red circle moving left over a gray background", "num_frames": 25},
            ],
            "num_inference_steps": 3,
            "state_every": 2,
            "parallel": parallel,
            "output": {"path": output, "sheet": False},
            **settings,
        }
    )


def files(folder: Path) -> dict[str, bytes]:
    """Latents and segments of a job."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for part in ("latents", "segments")
        for path in sorted((folder / part).iterdir())
    }


def leftovers() -> list[Any]:
    """Placement groups that still hold something."""
    import ray

    groups = ray.util.placement_group_table().values()
    return [group for group in groups if group["state"] != "REMOVED"]


def alive(pids: set[int]) -> set[int]:
    """Those that still run; a process that only waits to be reaped does not."""
    found = set()
    for pid in pids:
        try:
            os.kill(pid, 0)
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (ProcessLookupError, FileNotFoundError):
            continue
        if state != "Z":
            found.add(pid)
    return found
