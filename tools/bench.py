"""The entry for all benches: `python tools/bench.py render|model [--lengths 65,257,1025] [--json FILE]`.

Prints a table with the machine and the date; figures are this machine's at that moment, ratios travel better.
"""

import argparse
import datetime
import json
import platform
import sys
from pathlib import Path
from typing import Any

import torch

from vidgen import __version__
from vidgen.bench import bench_model, bench_render


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure this machine.")
    parser.add_argument("what", choices=("render", "model"))
    parser.add_argument("--lengths", default="65,257,1025", help="frames of the renders, with commas")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()
    try:
        lengths = [int(length) for length in arguments.lengths.split(",")]
    except ValueError:
        parser.error(f"--lengths {arguments.lengths}: need whole numbers with commas, such as 65,257")
    rows = bench_render(lengths) if arguments.what == "render" else bench_model()
    machine = machine_facts()
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    print(table(rows))
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=2) + "\n")


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
        "date": datetime.date.today().isoformat(),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Rows under their headings, columns aligned."""
    cells = [list(rows[0]), *([str(value) for value in row.values()] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    return "\n".join("  ".join(c.rjust(w) for c, w in zip(row, widths, strict=True)) for row in cells)


if __name__ == "__main__":
    main()
