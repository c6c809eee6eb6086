"""Plans are those that a render would take: what it refuses is not proposed."""

from itertools import product
from typing import Any

import pytest

from vidgen.choosing import choose, film_of, plans_of, schemes_of
from vidgen.config import JobConfig, parse_job
from vidgen.engine import Engine
from vidgen.known_sizes import film_like, schemes_like
from vidgen.parallel.planner.hardware import load_hardware
from vidgen.parallel.topology import Lanes
from vidgen.planning import make_plan, resolve_job
from vidgen.sharing import check_lanes
from vidgen.sparsity.settings import SparsitySettings

CACHES = ({}, {"method": "taylor"}, {"method": "tea"}, {"method": "delta"}, {"method": "region"})
SPARSE = ({}, {"policy": "radial"}, {"policy": "adaspa"}, {"policy": "svg2"})
GUIDANCE = ("split", "stacked")
ASKED = [
    (cache, sparsity, guidance)
    for cache, sparsity, guidance in product(CACHES, SPARSE, GUIDANCE)
    if not (cache.get("method") == "region" and sparsity)  # refused, whatever the plan
]


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine.from_pretrained("builtin")


def job_of(engine: Engine, **asked: Any) -> JobConfig:
    job = parse_job({"prompt": "a red circle", "num_frames": 65, "num_inference_steps": 8} | asked)
    return resolve_job(engine.family, job, SparsitySettings())


@pytest.mark.parametrize(("cache", "sparsity", "guidance"), ASKED)
def test_every_scheme_and_axis_that_is_proposed_is_taken_by_a_render(
    engine: Engine, cache: dict[str, Any], sparsity: dict[str, Any], guidance: str
):
    asked = {"cache": cache, "attention": {"sparsity": sparsity}, "queue": {"guidance": guidance}}
    job = job_of(engine, **asked)
    closed = film_of(engine.family, job).closed_axes
    task = make_plan(engine.family, job).task
    for axis in ("ring", "ulysses", "guidance"):
        try:
            check_lanes(task, Lanes(**{axis: 2}))
            refused = False
        except ValueError:
            refused = True
        assert (axis in closed) == refused
    for scheme in schemes_of(engine.family, job, lossy=True):
        made = asked | {"queue": asked["queue"] | scheme.settings()}
        make_plan(engine.family, job_of(engine, **made))


def test_ranks_are_shared_as_the_cache_allows(engine: Engine):
    hardware = load_hardware("cpu")
    job = job_of(engine, queue={"timetable": "full"}, parallel={"ranks": 2, "scheme": "auto"})
    assert choose(engine.family, job, 2, hardware).axes["stages"] == 1
    job = job.model_copy(update={"cache": job_of(engine, cache={"method": "delta"}).cache})
    found = plans_of(engine.family, job, hardware, 2, any_scheme=False)
    assert {plan.kind for plan in found} == {"stages", "guidance"}


def test_schemes_of_which_a_cache_knows_none_are_refused_in_words():
    job = parse_job({"prompt": "x", "queue": {"timetable": "lockstep"}, "cache": {"method": "delta"}})
    with pytest.raises(ValueError, match="cache=delta with timetable=lockstep: knows no clips"):
        schemes_like("wan-1.3b", job, film_like("wan-1.3b", job))


def test_a_scheme_that_the_jobs_cache_does_not_know_is_refused_in_words(engine: Engine):
    job = job_of(engine, queue={"timetable": "buffer"}, cache={"method": "taylor"})
    with pytest.raises(ValueError, match="timetable=buffer: knows no step cache; leave cache out"):
        plans_of(engine.family, job, load_hardware("cpu"), 2, any_scheme=False)
