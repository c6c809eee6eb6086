"""Runs every check that is no unit test, a line each, and exits 1 if one fails."""

import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CHECKS: dict[str, list[str]] = {
    "ruff": ["-m", "ruff", "check", "--output-format=concise", "."],
    "pyright": ["-m", "pyright"],
    "imports": ["-m", "pytest", "-q", "--tb=short", "tests/test_imports.py"],
    "size": ["tools/size.py", "--brief"],
}


def main() -> int:
    """Number of failed checks, at most 1, as the exit code."""
    environment = os.environ | {"PYRIGHT_PYTHON_IGNORE_WARNINGS": "1", "NO_COLOR": "1"}
    failed = []
    for name, arguments in CHECKS.items():
        start_s = time.perf_counter()
        result = subprocess.run(
            [sys.executable, *arguments],
            cwd=ROOT,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        took_s = time.perf_counter() - start_s
        lines = result.stdout.strip().splitlines()
        verdict = "ok" if result.returncode == 0 else "FAILED"
        print(f"{name:8} {verdict:6} {took_s:5.1f} s  {lines[-1].strip('= ') if lines else ''}", flush=True)
        if result.returncode:
            failed.append((name, result.stdout))
    for name, output in failed:
        print(f"\n--- {name} ---\n{output.rstrip()}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
