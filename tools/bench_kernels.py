"""Attention kernels against dense attention: `python tools/bench_kernels.py [--tokens N ...] [--json FILE]`.

The same as `vidgen bench kernels`; runs on a machine that has torch, numpy and safetensors only.
"""

import argparse
import json
import sys
from dataclasses import fields
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from vidgen.bench.kernels import KernelCase, absent_backends, bench_kernels  # noqa: E402
from vidgen.bench.machine import machine_facts, table  # noqa: E402


def main() -> None:
    """Print the table, and write it where it is wanted."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for field in fields(KernelCase):
        kind = type(field.default) if field.name != "densities" else str
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=kind, default=field.default)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    given = vars(parser.parse_args())
    json_file = given.pop("json")
    if isinstance(given["densities"], str):
        given["densities"] = tuple(float(density) for density in given["densities"].split(","))
    case, machine = KernelCase(**given), machine_facts()
    rows = bench_kernels(case)
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    print(table(rows))
    for name, reason in absent_backends().items():
        print(f"not measured: {name}, {reason}")
    if json_file:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps({"machine": machine, "case": given, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
