"""Step caches on the built-in model: the dial trades forwards for error, and the engine turns it."""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch

import vidgen
from vidgen.builtin import BUILTIN_PATH, load_small
from vidgen.denoise.loop import LoopState, denoise, run_tick
from vidgen.denoise.task import make_task
from vidgen.denoise.timetable import full
from vidgen.measure.calibration import calibrate
from vidgen.stepcache.cache import make_cache
from vidgen.stepcache.calibration import BUILTIN, read_calibration, with_calibration
from vidgen.stepcache.settings import CacheSettings
from vidgen.types import NoiseKind

PROMPTS = (
    "a red circle moving left over a gray background",
    "a blue square moving up over a white background",
    "a purple triangle staying still over a navy background",
)
DIALS: dict[str, tuple[str, tuple[float, ...]]] = {
    "tea": ("threshold", (0.0, 0.1, 0.2, 0.5)),
    "taylor": ("max_skips", (0, 1, 2, 4)),
    "gated_taylor": ("threshold", (0.0, 0.05, 0.1, 0.3)),
    "mag": ("threshold", (0.0, 0.01, 0.05, 0.3)),
    "first_block": ("threshold", (0.0, 0.1, 0.2, 0.5)),
}


@pytest.fixture(scope="module")
def tasks() -> list[Any]:
    """Videos of two latent frames in ten steps."""
    model, steps = load_small(BUILTIN_PATH), 10
    with torch.inference_mode():
        texts = [tuple(model.text(model.text.ids([words])) for words in (prompt, "")) for prompt in PROMPTS]
    size = model.recommended.height // model.codec.spatial_stride
    return [
        make_task(
            model.dit, full(2, steps), lambda block, text=text: text, latent_rows=size, latent_columns=size,
            seed=seed, guidance_scale=3.0, noise=NoiseKind.POOL, shift=model.recommended.shift,
        )
        for seed, text in enumerate(texts)
    ]  # fmt: skip


def clean(task: Any) -> torch.Tensor:
    (block,) = denoise(task)
    return block.latents_BCFYX


@pytest.mark.parametrize("method", DIALS)
def test_further_up_the_dial_are_fewer_forwards_and_more_error(method: str, tasks: list[Any]):
    """On average over the seeds."""
    name, values = DIALS[method]
    exact = [clean(task) for task in tasks]
    errors, forwards = [], []
    settings: dict[str, Any] = {"method": method, "warm_up_steps": 3, "last_steps": 1, "max_skips": 3}
    for value in values:
        cache = make_cache(with_calibration(CacheSettings(**{**settings, name: value}), is_builtin=True))
        assert cache is not None
        found = [clean(replace(task, cache=cache)) for task in tasks]
        errors.append(_error(found, exact))
        forwards.append(cache.tally.forwards - cache.tally.skipped)
    assert errors[0] == 0 and forwards[0] == 10 * len(tasks)
    assert forwards == sorted(forwards, reverse=True) and forwards[-1] < 0.7 * forwards[0], forwards
    assert errors == sorted(errors) and errors[-1] > errors[0], errors


def test_delta_with_more_skips_runs_fewer_layers_and_errs_more(tasks: list[Any]):
    """On average over the seeds."""
    exact, errors, forwards = [clean(task) for task in tasks], list[float](), list[float]()
    for max_skips in (0, 1, 2, 4):
        cache = make_cache(CacheSettings(method="delta", warm_up_steps=3, last_steps=1, max_skips=max_skips))
        assert cache is not None
        found = [clean(replace(task, cache=cache)) for task in tasks]
        errors.append(_error(found, exact))
        forwards.append(cache.tally.forwards - cache.tally.skipped)
    assert errors[0] == 0 and forwards[0] == 10 * len(tasks)
    assert forwards == sorted(forwards, reverse=True) and forwards[-1] < 0.8 * forwards[0], forwards
    assert errors == sorted(errors) and errors[-1] > errors[0], errors


@pytest.mark.parametrize("boundary", [0.0, 1.0], ids=["front", "rear"])
def test_a_step_that_leaves_out_more_layers_errs_more(boundary: float, tasks: list[Any]):
    """On average over the seeds, after one such step; within 2 %, since the first two make most of it."""

    def after(task: Any) -> torch.Tensor:
        state = LoopState()
        for _ in range(3):
            run_tick(task, state)
        return state.blocks[0].latents_BCFYX

    exact, errors = [after(task) for task in tasks], list[float]()
    for layers in (0.0, 0.15, 0.3, 0.5, 0.7, 1.0):
        cache = make_cache(
            CacheSettings(method="delta", warm_up_steps=2, layers=layers, boundary=boundary, last_steps=0)
        )
        errors.append(_error([after(replace(task, cache=cache)) for task in tasks], exact))
    assert errors[0] == 0 < errors[1]
    assert all(one < 1.02 * other for one, other in pairwise(errors)), errors
    assert errors[-1] > 1.1 * errors[1]


def _error(found: list[torch.Tensor], exact: list[torch.Tensor]) -> float:
    off = [(one - other).square().mean() for one, other in zip(found, exact, strict=True)]
    return float(torch.stack(off).mean().sqrt())


def test_the_shipped_calibration_is_what_is_measured(tasks: list[Any]):
    """Its curve, at the noise levels of other videos in another number of steps."""
    shipped, found = dict(read_calibration(BUILTIN)["magnitudes"]), calibrate(tasks)
    for level, magnitude in found["magnitudes"]:
        nearest = min(shipped, key=lambda known: abs(known - level))
        assert magnitude == pytest.approx(shipped[nearest], rel=0.15)


def test_a_cache_is_enabled_once_and_disabled():
    engine = vidgen.Engine.from_pretrained("builtin")
    engine.enable_cache(method="taylor", warm_up_steps=1)
    with pytest.raises(ValueError, match=r"enabled already \(taylor\): call disable_cache\(\) first"):
        engine.enable_cache(method="tea")
    asked = {"num_frames": 8, "num_inference_steps": 6, "output_type": "latent"}
    cached = engine(PROMPTS[0], **asked).frames
    said = engine(PROMPTS[0], **asked, cache={"method": "taylor", "max_skips": 0}).frames
    engine.disable_cache()
    exact = engine(PROMPTS[0], **asked).frames
    assert torch.equal(said, exact), "a job that says something of its own has that"
    assert not torch.equal(cached, exact)
    engine.enable_cache(CacheSettings(method="taylor", warm_up_steps=1))
    assert torch.equal(engine(PROMPTS[0], **asked).frames, cached)


@pytest.mark.parametrize("wrong", [{}, {"method": "fast"}, {"method": "tea", "threshold": -1}], ids=str)
def test_what_cannot_be_enabled_leaves_the_engine_as_it_was(wrong: dict[str, Any]):
    engine = vidgen.Engine.from_pretrained("builtin", with_dit=False)
    with pytest.raises(ValueError):
        engine.enable_cache(**wrong)
    assert engine.cache == CacheSettings()


def test_a_render_says_what_was_skipped(tmp_path: Any):
    from vidgen.config import parse_job
    from vidgen.render import render

    job = parse_job(
        {
            "prompt": PROMPTS[0], "num_frames": 16, "num_inference_steps": 8,
            "cache": {"method": "mag"}, "output": {"path": tmp_path / "v.mp4", "sheet": False},
        }
    )  # fmt: skip
    rendered = render(job)
    assert rendered.job.cache.magnitudes == read_calibration(BUILTIN)["magnitudes"]
    assert rendered.evidence is not None
    found = rendered.evidence["cache"]
    assert found["forwards"] == 8 and 0 < found["skipped"] == sum(found["skipped_at"].values())
