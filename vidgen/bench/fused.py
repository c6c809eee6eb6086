"""Fused norm kernels against the memory they must move: the share of a copy's bandwidth that they reach."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from vidgen.bench.machine import interleaved
from vidgen.kernels.modulate.api import gate_residual_norm_modulate, norm_modulate
from vidgen.kernels.rope.api import norm_rope
from vidgen.model.rope import rotations


@dataclass(frozen=True, kw_only=True, slots=True)
class FusedCase:
    """Sizes as in Wan 2.1 1.3B at 81 frames of 832x480: 32,760 tokens of width 1,536."""

    frames: int = 21
    rows: int = 30
    columns: int = 52
    width: int = 1536
    num_heads: int = 12
    device: str = "cuda"
    dtype: str = "bfloat16"
    repeats: int = 30


@torch.inference_mode()
def bench_fused(case: FusedCase) -> list[dict[str, Any]]:
    """A row per kernel and backend: milliseconds, GB/s of what it must read and write, share of a copy's."""
    device, dtype = torch.device(case.device), getattr(torch, case.dtype)
    grid = (case.frames, case.rows, case.columns)
    tokens = case.rows * case.columns
    x_BFSD = torch.randn(1, case.frames, tokens, case.width, device=device, dtype=dtype)
    branch = torch.randn_like(x_BFSD)
    scale, shift, gate = (
        torch.randn(1, case.frames, 1, case.width, device=device, dtype=dtype) for _ in range(3)
    )
    weight = torch.ones(case.width, device=device)
    cosines, sines = rotations(grid, case.width // case.num_heads, 10000.0, device)
    flat = x_BFSD.flatten(1, 2)
    size, turns = flat.numel() * flat.element_size(), 2 * cosines.numel() * cosines.element_size()

    def modulate(backend: str) -> Callable[[], object]:
        return lambda: norm_modulate(x_BFSD, scale, shift, 1e-6, backend=backend)

    def gated(backend: str) -> Callable[[], object]:
        return lambda: gate_residual_norm_modulate(x_BFSD, branch, gate, scale, shift, 1e-6, backend=backend)

    def rope(backend: str) -> Callable[[], object]:
        return lambda: norm_rope(flat, weight, cosines, sines, case.num_heads, 1e-6, backend=backend)

    kinds = {"norm + modulate": (modulate, 2 * size), "gate + residual + norm + modulate": (gated, 4 * size)}
    kinds["RMS norm + RoPE"] = (rope, 3 * size + turns)
    backends = ["triton", "reference"] if case.device == "cuda" else ["reference"]
    copy_into = torch.empty_like(flat)
    cases: dict[str, Callable[[], object]] = {"copy": lambda: copy_into.copy_(flat)}
    moved = {"copy": 2 * size}
    for kind, (make, num_bytes) in kinds.items():
        for backend in backends:
            cases[f"{kind}, {backend}"], moved[f"{kind}, {backend}"] = make(backend), num_bytes
    for run in cases.values():
        run()
    times = interleaved(cases, case.repeats, case.device)
    copy_rate = moved["copy"] / times["copy"]
    return [
        {
            "kernel": name,
            "ms": round(1000 * times[name], 4),
            "GB/s": round(moved[name] / times[name] / 1e9, 1),
            "of copy": round(moved[name] / times[name] / copy_rate, 3),
        }
        for name in cases
    ]
