"""What figures depend on, and how they are printed."""

import datetime
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from vidgen import __version__


def machine_facts() -> dict[str, str]:
    """What the figures depend on."""
    cpu = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if sys.platform == "linux" else ():
        if line.startswith("model name"):
            cpu = line.split(":", 1)[1].strip()
    return {
        "vidgen": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpu": cpu,
        **({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}),
        "date": datetime.date.today().isoformat(),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Rows under their headings, columns aligned."""
    cells = [list(rows[0]), *([str(value) for value in row.values()] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    return "\n".join("  ".join(c.rjust(w) for c, w in zip(row, widths, strict=True)) for row in cells)


def interleaved(
    cases: dict[str, Callable[[], object]], repeats: int, device: str = "cpu"
) -> dict[str, float]:
    """Median seconds of each case, the cases taking turns so that a busy moment hits all alike."""
    readings: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(repeats):
        for name, run in cases.items():
            started = time.perf_counter()
            run()
            if device == "cuda":
                torch.cuda.synchronize()
            readings[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in readings.items()}
