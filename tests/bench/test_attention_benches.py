"""The attention benches run at small sizes, and what they say adds up. No time is judged."""

from pathlib import Path
from typing import Any

import pytest

from vidgen.bench import attention as policies
from vidgen.bench import kernels
from vidgen.bench.attention import LargeCase, bench_quality, bench_speed, draw_layouts
from vidgen.bench.fused import FusedCase, bench_fused
from vidgen.bench.kernels import KernelCase, bench_kernels
from vidgen.kernels.attention.backends import BACKENDS


def test_kernel_rows_hold_speed_against_density(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delitem(BACKENDS, "flex")  # which compiles for seconds
    monkeypatch.setattr(kernels, "GRID", (4, 32, 32))
    rows = bench_kernels(
        KernelCase(tokens=200, heads=2, head_dim=16, block=32, densities=(1.0, 0.3), repeats=1)
    )
    by_name = {(row["kernel"], row["density"]): row for row in rows}
    assert ("dense, native", 1.0) in by_name and ("blocks, cpu", 0.3) in by_name
    assert any(name == "search (block mass)" for name, _ in by_name)
    (tiles,) = [row for row in rows if row["kernel"] == "sliding tile, cpu"]
    assert 0 < tiles["density"] < 1
    for row in rows:
        assert row["of ideal"] == pytest.approx(row["density"] / row["of dense"], rel=0.02, abs=2e-3)


def test_policies_are_held_against_dense_and_their_layouts_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    chosen = {"policy": "adaspa", "density": 0.5}
    monkeypatch.setattr(policies, "SMALL", {"adaspa": chosen, "all": {**chosen, "density": 1.0}})
    rows, done = bench_quality(2)
    dense, sparse, everything = rows
    assert dense["PSNR"] == everything["PSNR"] == float("inf") and dense["SSIM"] == pytest.approx(1)
    assert sparse["PSNR"] < 60 and 0.5 <= sparse["density"] < 1 and 0 < sparse["recall"] <= 1
    assert dense["all four right"].endswith("/2")
    layers = done["adaspa"].tally.layers()
    assert [row["layer"] for row in layers] == list(range(6))
    assert all(len(row["density_per_head"]) == 4 for row in layers)
    picture = draw_layouts({"adaspa": done["adaspa"]}, tmp_path / "deep" / "layouts.png")
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_nothing_to_draw_is_said(tmp_path: Path):
    with pytest.raises(ValueError, match="no policy made a choice"):
        draw_layouts({}, tmp_path / "layouts.png")


def test_speed_is_told_for_every_policy(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(policies, "LARGE", {"adaspa": {"policy": "adaspa", "density": 0.3, "key_block": 16}})
    rows = bench_speed(LargeCase(grid=(3, 8, 8), width=32, num_heads=2, num_layers=1, num_steps=5))
    dense, sparse = rows
    assert dense["speed-up"] == 1 and sparse["density"] < 1 and sparse["seconds"] > 0


def test_fused_kernels_are_held_against_a_copy():
    case: Any = FusedCase(
        frames=2, rows=3, columns=5, width=24, num_heads=2, device="cpu", dtype="float32", repeats=1
    )
    rows = bench_fused(case)
    assert rows[0]["kernel"] == "copy" and rows[0]["of copy"] == 1
    assert {row["kernel"].split(",")[0] for row in rows[1:]} == {
        "norm + modulate", "gate + residual + norm + modulate", "RMS norm + RoPE",
    }  # fmt: skip
