"""The Triton kernels compile for A100 and H100 on any machine, and not only for the interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")

SCRIPT = Path(__file__).with_name("compile_kernels.py")
ROOT = SCRIPT.parents[2]


@pytest.mark.parametrize(
    "capability", [pytest.param(80, id="A100", marks=pytest.mark.slow), pytest.param(90, id="H100")]
)
def test_every_kernel_compiles_within_the_shared_memory_of(capability: int, tmp_path: Path):
    settings = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    settings |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(SCRIPT), str(capability)]
    run = subprocess.run(command, env=settings, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    kernels = [line.split() for line in run.stdout.splitlines()]
    assert {name for name, _, _ in kernels} == {"forward_kernel", "_mass", "_modulate", "_norm_rope"}
    for name, shared_bytes, _ in kernels:
        assert int(shared_bytes) <= {80: 163, 90: 227}[capability] * 1024, name
    in_half = [int(number) for name, _, number in kernels if name in ("forward_kernel", "_mass")]
    assert sum(number > 0 for number in in_half) == 7  # by tensor cores; fp32 is not
