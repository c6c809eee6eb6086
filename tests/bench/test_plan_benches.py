"""What the planner's benches are made of. Whole calibrations take minutes and are run by hand."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from vidgen.bench import busy
from vidgen.bench.books import books_s
from vidgen.bench.calibrate import _joining, _layers
from vidgen.bench.items import run_of
from vidgen.bench.output_rates import Clock, decode_rate, rate, write_rate
from vidgen.bench.plans import CACHED, LANES, STAGES_ONLY, PlanCase, predict, render_once, verdict
from vidgen.bench.rendering import PROMPT
from vidgen.bench.two_ranks import _in_order, _together
from vidgen.config import parse_job
from vidgen.engine import Engine
from vidgen.parallel.place import random_model
from vidgen.parallel.planner.hardware import Hardware, load_hardware
from vidgen.planning import Plan


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine.from_pretrained("builtin", with_dit=False)


@pytest.fixture(scope="module")
def plan(engine: Engine) -> Plan:
    return engine.plan(parse_job({"prompt": PROMPT, "queue": {"timetable": "full"}}))


def test_a_rate_of_noisy_readings_still_rises():
    found = rate([(4, 3.0), (1, 1.0), (2, 2.0), (3, 1.5)])
    assert found.sizes == (1, 2, 3, 4) and found.seconds[0] == 1.0 and found.seconds[3] == 3.0
    assert found.seconds[1] < found.seconds[2] < 2.001


@torch.inference_mode()
def test_measured_rates_rise_with_the_work(engine: Engine, plan: Plan, monkeypatch: pytest.MonkeyPatch):
    from vidgen.bench import calibrate, output_rates

    for module in (calibrate, output_rates):
        monkeypatch.setattr(module, "FRAMES", (1, 2, 4, 8))
    clock = Clock("cpu", 1)
    layers, attention, run_s = _layers(plan, clock)
    assert attention.seconds[-1] >= attention.seconds[0] > 0
    assert run_s >= 0 and layers.seconds[-1] > layers.seconds[0] > 0
    assert _joining(plan, clock).seconds[0] > 0
    assert decode_rate(engine, plan, clock).seconds[-1] > 0
    assert write_rate(plan).seconds[0] > 0


def test_a_clock_among_other_work_does_that_before_each_reading_and_does_not_count_it():
    done: list[str] = []
    clock = Clock("cpu", 1).among(lambda: done.append("other"))
    assert clock.seconds(lambda: done.append("own"), readings=3) < 0.01
    assert done == ["other", "own"] * 4


@torch.inference_mode()
def test_a_run_has_the_layers_frames_and_others_that_were_asked_for(plan: Plan):
    model = random_model(plan.task.model.config, 2, "cpu")
    seen: list[tuple[Any, ...]] = []
    model.layers[1].self_attention.register_forward_pre_hook(  # type: ignore[union-attr]
        lambda _, given: seen.append((given[0].shape[1], *(kv and kv.num_frames for kv in given[2:4])))
    )
    assert run_of(model, 4, 6, 8)().shape == (1, 4, 6, model.config.width)  # type: ignore[attr-defined]
    run_of(model, 4, 6, 8, others=3)()
    assert seen == [(4, None, None), (4, 1, 2)]


@torch.inference_mode()
def test_what_a_rank_does_beside_the_model_is_measured(engine: Engine):
    assert 1e-5 < books_s(engine, "builtin", load_hardware("cpu").solver) < 0.05


def test_how_much_ranks_slow_each_other_down_is_against_one_process(monkeypatch: pytest.MonkeyPatch):
    """What is foretold is too little by a half for one process, and by as much again for two."""
    taken = {1: [3.0, 3.1], 2: [3.0, 3.2]}
    other = load_hardware("cpu")
    other = replace(other, layers={"bf16": other.layer_rate("fp32")}, attention={"bf16": other.joining})

    def predict(hardware: Hardware, case: PlanCase, *_: int) -> dict[str, float]:
        assert not hardware.busy and hardware.layer_rate("fp32") and hardware.attention_rate("fp32")
        return {"seconds": 2.0 / case.ranks, "memory_bytes": hardware.process_bytes + 3e8}

    monkeypatch.setattr(busy, "predict", predict)
    monkeypatch.setattr(
        busy, "in_own_process", lambda case, *_: {"seconds": taken[case.ranks].pop(), "memory_bytes": 1e9}
    )
    found = busy.among_ranks(other, cores=2)
    assert found.busy == (
        (1.0, 1.0),
        (2.0, pytest.approx(3.1 / 1.0 / (3.05 / 2.0))),
        (4.0, pytest.approx(4.0656, rel=1e-3)),
    )
    assert found.process_bytes == 7e8
    taken |= {1: [3.0, 3.1], 2: [3.0, 3.2], 4: [1.6, 1.6]}
    many = busy.among_ranks(load_hardware("cpu"), cores=16).busy
    assert [count for count, _ in many] == [1, 2, 4, 16, 32] and many[3][1] == many[2][1] == many[4][1] / 2


@pytest.mark.slow
def test_processes_tell_each_other_and_answer():
    assert _together(_in_order, 2) == [(0, 1), (1, 0)]


def test_a_process_that_dies_is_an_error():
    with pytest.raises(RuntimeError, match="a process of the bench died"):
        _together(_dies, 1)


def _dies(index: int, swap: Any) -> None:
    os._exit(1)


@pytest.mark.parametrize(
    "case", [*STAGES_ONLY, *LANES, *CACHED], ids=lambda case: f"{case.name} {case.queue}"
)
def test_every_case_has_a_prediction(case: PlanCase):
    found = predict(load_hardware("cpu"), case, 65, 4)
    assert 0 < found["first_frame_s"] <= found["seconds"] < 1e4


def test_a_render_is_timed_from_its_first_run_to_its_last_block(tmp_path: Path):
    found = render_once(STAGES_ONLY[0], 33, 2, tmp_path)
    assert 0 < found["first_frame_s"] < found["seconds"] < 60 and found["memory_bytes"] > 2**20


def test_the_verdict_counts_what_is_within_and_prices_the_choice():
    rows = [
        {"video": "a", "plan": "x", "predicted s": 1.0, "measured s": 1.0, "ratio": 1.0},
        {"video": "b", "plan": "y", "predicted s": 0.5, "measured s": 2.0, "ratio": 0.25},
    ]
    found = verdict(rows)
    assert found["within"] == "1 of 2 within 0.85 to 1.15"
    assert found["choice"] == "b, y" and found["choice over best"] == 2.0
