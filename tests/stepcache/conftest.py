"""Tasks with step caches on small random models, in the loop and on threads."""

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from tests.stepcache import loops
from vidgen.denoise.loop import Task
from vidgen.denoise.timetable import Timetable
from vidgen.model.dit import DiT
from vidgen.stepcache.cache import StepCache, make_cache
from vidgen.stepcache.settings import CacheSettings

PART_STEPS = 8
TIMETABLES = loops.timetables(PART_STEPS, switch_step=5)
# of a small random model no magnitudes are known: these make some steps near, others far
CURVE = ((1.0, 1.0), (0.7, 1.02), (0.5, 1.2), (0.0, 1.25))
SKIPPING: dict[str, dict[str, Any]] = {
    "tea": {"threshold": 0.8},
    "taylor": {"max_skips": 1},
    "gated_taylor": {"threshold": 1.3},
    "mag": {"threshold": 0.1, "magnitudes": CURVE},
    "first_block": {"threshold": 0.8},
    "delta": {"layers": 0.5},
    "region": {"ratio": 0.5},
}


def _load(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


on_threads = _load("parallel_conftest", Path(__file__).parent.parent / "parallel" / "conftest.py")
denoise_tests = on_threads.denoise_tests


def cache(method: str, **settings: Any) -> StepCache:
    """One that skips some steps of a small random model, not all."""
    settings = (
        {"method": method, "warm_up_steps": 1, "last_steps": 1, "max_skips": 2} | SKIPPING[method] | settings
    )
    made = make_cache(CacheSettings(**settings))
    assert made is not None
    return made


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The loop's sums as those of the ranks' threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def dit() -> DiT:
    return denoise_tests.redraw(DiT(denoise_tests.DiTConfig(**denoise_tests.SIZES | {"num_layers": 4})))


@pytest.fixture(scope="session")
def other(dit: DiT) -> DiT:
    """A second expert."""
    return denoise_tests.redraw(DiT(dit.config), seed=1)


@pytest.fixture
def make_task(dit: DiT, other: DiT) -> Callable[..., Task]:
    """A task, its cache by name and settings; without a name it has none."""

    def make_task(timetable: Any, method: str | None = None, *, guidance_scale: float = 2.0,
                  seed: int = 5, options: dict[str, Any] | None = None, **settings: Any) -> Task:  # fmt: skip
        single = replace(timetable, switch_step=None)
        task = denoise_tests.make_task(single, model=dit, guidance_scale=guidance_scale, seed=seed)
        second = {} if timetable.switch_step is None else {"timetable": timetable, "second_model": other}
        return replace(task, cache=cache(method, **settings) if method else None, **second, **(options or {}))

    return make_task


@pytest.fixture(scope="session")
def threads() -> ModuleType:
    """tests/parallel/conftest.py: pipelines of threads."""
    return on_threads


@pytest.fixture(scope="session")
def timetables() -> dict[str, Timetable]:
    """For caches that leave out a part of a step."""
    return TIMETABLES


@pytest.fixture(params=TIMETABLES.values(), ids=list(TIMETABLES))
def timetable(request: pytest.FixtureRequest) -> Timetable:
    """Each of them."""
    return request.param
