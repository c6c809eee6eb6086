"""A render's operations, counted by its plan, are those that torch counts while it runs."""

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from vidgen.choosing import film_of, own_scheme
from vidgen.config import parse_job
from vidgen.engine import Engine
from vidgen.parallel.planner.flops import render_flops
from vidgen.parallel.planner.steps import all_steps, item_counts, steps_of
from vidgen.parallel.simulation.attempt import item_of
from vidgen.planning import resolve_job
from vidgen.sparsity.settings import SparsitySettings

JOB: dict[str, Any] = {
    "prompt": "a red circle moving left over a gray background", "num_frames": 49, "num_inference_steps": 3,
}  # fmt: skip
QUEUES: dict[str, dict[str, Any]] = {
    "full": {"timetable": "full"},
    "recompute": {"timetable": "dualparal"},
    "cache": {"timetable": "dualparal", "context_mode": "cache"},
    "autoregressive": {"timetable": "autoregressive"},
    "buffer": {"timetable": "buffer", "stride": 2},
    "pipefusion": {"timetable": "pipefusion"},
    "lockstep": {"timetable": "lockstep"},
}


def attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """The formula for a kernel that torch's counter does not know."""
    return sdpa_flop_count(query, key, value)


OF_CPU = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention}


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine.from_pretrained("builtin")


@pytest.mark.parametrize("name", QUEUES)
def test_they_are_those_that_torch_counts(engine: Engine, name: str):
    asked = {**JOB, "queue": QUEUES[name]}
    job = resolve_job(engine.family, parse_job(asked), SparsitySettings())
    with FlopCounterMode(display=False, custom_mapping=OF_CPU) as counter:
        engine(output_type="latent", **asked)
    found = render_flops(film_of(engine.family, job), own_scheme(engine.family, job))
    assert found == pytest.approx(counter.get_total_flops(), rel=0.01)


@pytest.mark.parametrize("method", ["taylor", "mag", "delta", "region"])
@pytest.mark.parametrize("name", ["full", "recompute", "cache"])
def test_a_step_caches_are_those_that_torch_counts(engine: Engine, name: str, method: str):
    asked = {**JOB, "num_inference_steps": 12, "queue": QUEUES[name], "cache": {"method": method}}
    asked["num_frames"] = 33
    job = resolve_job(engine.family, parse_job(asked), SparsitySettings())
    with FlopCounterMode(display=False, custom_mapping=OF_CPU) as counter:
        engine(output_type="latent", **asked)
    film, scheme = film_of(engine.family, job), own_scheme(engine.family, job)
    found = render_flops(film, scheme, steps=steps_of(film, scheme.timetable))
    assert found < 0.95 * render_flops(film, scheme)
    assert found == pytest.approx(counter.get_total_flops(), rel=0.01)


@pytest.mark.parametrize("name", QUEUES)
def test_every_forward_is_counted(engine: Engine, name: str):
    job = resolve_job(engine.family, parse_job({**JOB, "queue": QUEUES[name]}), SparsitySettings())
    table = own_scheme(engine.family, job).timetable
    counts = item_counts(table, all_steps(table), 2)
    forwards = [item_of(table, forward) for tick in table.ticks() for forward in tick]
    assert counts == {item: 2 * forwards.count(item) for item in forwards}


def test_a_skipped_forward_is_none_and_sparse_attention_is_less(engine: Engine):
    job = resolve_job(engine.family, parse_job(JOB), SparsitySettings())
    film, scheme = film_of(engine.family, job), own_scheme(engine.family, job)
    assert render_flops(film, scheme, ran=0.5) == pytest.approx(render_flops(film, scheme) / 2)
    assert render_flops(film, scheme, density=0.5) < render_flops(film, scheme)
