"""The bench that holds the planner against a GPU, on a tiny model and the CPU."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from vidgen import known_sizes
from vidgen.bench import gpu_caches
from vidgen.bench.gpu_plans import CASES, GpuCase, bench_gpu_plans, predict, row, within
from vidgen.bench.random_wan import TINY, make_hollow_wan
from vidgen.engine import Engine
from vidgen.known_sizes import Known
from vidgen.model.dit import DiTConfig
from vidgen.parallel.planner.hardware import load_hardware

RESULTS = Path(__file__).parent.parent.parent / "tools" / "results"
PLANS, CACHES = "gpu_plans_nvidia-h200_2026-11-27.json", "gpu_caches_nvidia-h200_2026-11-27.json"
SMALL = Known(
    dit=DiTConfig(width=24, num_layers=2, num_heads=2, ffn_width=48, text_width=8, dtype="bf16"),
    height=16,
    width=32,
    text_tokens=4,
)


def test_every_case_is_predicted_and_run(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(known_sizes.KNOWN, "small", SMALL)
    cases = [replace(case, num_frames=case.num_frames // 3) for case in CASES]
    rows = bench_gpu_plans(load_hardware("h200"), "small", cases, steps=2, repeats=1, device="cpu")
    assert len(rows) == len(CASES)
    assert all(row["predicted s"] > 0 and row["measured s"] > 0 and row["ratio"] > 0 for row in rows)
    assert len({(row["video"], row["frames"]) for row in rows}) == len(CASES)


def readings(name: str) -> list[dict[str, Any]]:
    return json.loads((RESULTS / name).read_text())["rows"]


def test_predictions_hold_for_what_was_measured_on_an_h200():
    """Also those of caches, which were measured before anything was predicted of them."""
    hardware = load_hardware("h200")
    plans = [(case, 4) for case in CASES]
    cached = [(replace(case, cache=cache), 20) for case in gpu_caches.CASES for cache in gpu_caches.CACHES]
    found = [row | {"seconds": row["measured s"], "MiB": row["MiB, measured"]} for row in readings(PLANS)]
    for (case, steps), measured in zip([*plans, *cached], [*found, *readings(CACHES)], strict=True):
        plan = predict(hardware, "wan-1.3b", case, steps)
        (memory,) = plan.memory
        held = (memory.total - memory.process - memory.decoding) / 2**20
        assert 0.85 <= plan.seconds / measured["seconds"] <= 1.15, (case, plan.seconds)
        assert 1 <= held / measured["MiB"] <= (1.4 if case.cache else 1.25), (case, held)


def test_decoding_is_in_neither_side():
    case, hardware = GpuCase(num_frames=21, queue={"timetable": "full"}), load_hardware("h200")
    plan = predict(hardware, "wan-1.3b", case, 4)
    item_s = plan.seconds / 8  # two branches of four steps
    assert hardware.layer_rate("bf16").seconds[0] * 30 < item_s < 1.0
    found = row(plan, {"seconds": [plan.seconds, 2 * plan.seconds, 9.0], "bytes": 2**20}, case)
    assert found["ratio"] == 0.5 and found["MiB, measured"] == 1
    assert found["MiB, predicted"] < plan.memory_bytes / 2**20


def test_ratios_at_the_edges_hold():
    assert (
        within([{"ratio": ratio} for ratio in (0.84, 0.85, 1.0, 1.15, 1.16)]) == "3 of 5 within 0.85 to 1.15"
    )


def test_a_hollow_checkpoint_is_planned_and_takes_no_room(tmp_path: Path):
    folder = make_hollow_wan(tmp_path / "wan", TINY)
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    engine = Engine.from_pretrained(folder, with_dit=False)
    assert engine.config.num_layers == TINY.num_layers
    assert file.stat().st_blocks * 512 < file.stat().st_size
    engine.load_dit("cpu")
    assert not any(
        torch.count_nonzero(tensor) for tensor in engine.family.dits[0].layers.state_dict().values()
    )


def test_every_cache_is_run_beside_none(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(known_sizes.KNOWN, "small", SMALL)
    monkeypatch.setattr(gpu_caches, "CASES", [replace(case, num_frames=33) for case in gpu_caches.CASES])
    rows = gpu_caches.bench_gpu_caches("small", 8, device="cpu")
    assert [row["cache"] for row in rows[:5]] == ["none", "taylor", "delta", "region 0.5", "region 0.25"]
    assert len(rows) == 10 and rows[0]["speed-up"] == rows[5]["speed-up"] == 1.0
    assert all(row["seconds"] > 0 for row in rows)
