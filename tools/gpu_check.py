"""Everything that needs a GPU, in one command: `python tools/gpu_check.py [--out DIR] [--quick]`.

The tests marked `gpu`, the kernel benchmarks at long sequences, sparsity policies end to end. Writes one JSON
file named after the card and the day. Needs torch with CUDA, triton, numpy, safetensors and pytest; nothing
else.
"""

import argparse
import datetime
import importlib.util
import json
import re
import subprocess
import sys
import traceback
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from vidgen.bench.attention import LargeCase, bench_speed  # noqa: E402
from vidgen.bench.fused import FusedCase, bench_fused  # noqa: E402
from vidgen.bench.kernels import KernelCase, absent_backends, bench_kernels  # noqa: E402
from vidgen.bench.machine import machine_facts, table  # noqa: E402

TEST_TIMEOUT_S = 420


def main() -> int:
    """0 when the tests passed and every benchmark ran."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, default=ROOT / "tools" / "results", help="folder of the JSON file"
    )
    parser.add_argument("--quick", action="store_true", help="shorter sequences, fewer readings")
    given = parser.parse_args()
    if not torch.cuda.is_available():
        print("error: torch finds no GPU here; this is for a machine with one", file=sys.stderr)
        return 2
    card = torch.cuda.get_device_name()
    name = (
        f"gpu_{re.sub('[^a-z0-9]+', '-', card.lower()).strip('-')}_{datetime.date.today().isoformat()}.json"
    )
    target = given.out / name
    target.parent.mkdir(parents=True, exist_ok=True)
    tokens = 16384 if given.quick else 32768
    attention_case = KernelCase(
        tokens=tokens,
        heads=8,
        head_dim=128,
        device="cuda",
        dtype="bfloat16",
        repeats=10,
        densities=(1.0, 0.2, 0.1),
    )
    fused_case, large_case = FusedCase(), LargeCase(grid=(tokens // 2048, 32, 64), device="cuda")
    found: dict[str, Any] = {"machine": machine_facts(), "absent": absent_backends()}
    parts: dict[str, Callable[[], Any]] = {
        "tests": run_tests,
        "attention": lambda: {"case": asdict(attention_case), "rows": bench_kernels(attention_case)},
        "fused": lambda: {"case": asdict(fused_case), "rows": bench_fused(fused_case)},
        "end to end": lambda: {"case": asdict(large_case), "rows": bench_speed(large_case)},
    }
    is_well = True
    for part, run in parts.items():
        try:
            found[part] = run()
        except Exception:  # the parts after it are worth having all the same
            found[part] = {"failed": traceback.format_exc()}
        is_well = is_well and "failed" not in found[part]
        print(f"== {part}")
        print(table(found[part]["rows"]) if "rows" in found[part] else json.dumps(found[part], indent=1))
        target.write_text(json.dumps(found, indent=1) + "\n")
    print(f"written: {target}")
    return 0 if is_well else 1


def run_tests() -> dict[str, Any]:
    """What pytest says of the files with tests marked `gpu`; others need packages that may not be here."""
    files = [str(path) for path in sorted(ROOT.glob("tests/**/test_*.py")) if "mark.gpu" in path.read_text()]
    # other versions of packages warn of other things
    command = [sys.executable, "-m", "pytest", "-q", "-rfs", "-W", "default", "--durations=8", *files]
    if importlib.util.find_spec("xdist") is not None:
        command += ["-n", "6"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TEST_TIMEOUT_S)
    lines = done.stdout.splitlines()
    found: dict[str, Any] = {
        "files": [str(Path(file).relative_to(ROOT)) for file in files],
        "summary": lines[-1:],
    }
    if done.returncode:
        found["failed"] = lines[-150:] + done.stderr.splitlines()[-20:]
    return found


if __name__ == "__main__":
    sys.exit(main())
