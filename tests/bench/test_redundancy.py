"""Figures of redundancy on models whose outputs are known, and on small random ones in every timetable."""

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from vidgen.bench.attention_mass import AttentionMass, frame_mass
from vidgen.bench.features import CURVES, FEATURES, Series, Watcher
from vidgen.bench.redundancy import summarize, watch
from vidgen.bench.redundancy_plot import draw
from vidgen.bench.redundancy_report import longest_run, rows, sentences
from vidgen.denoise.loop import Task, denoise
from vidgen.denoise.timetable import (
    Timetable,
    autoregressive,
    dualparal,
    fifo,
    full,
    moving_buffer,
    pipefusion,
)
from vidgen.model.dit import DiT, DiTConfig
from vidgen.stepcache.cache import make_cache
from vidgen.stepcache.settings import CacheSettings
from vidgen.types import ContextMode, GuidanceMode

_spec = importlib.util.spec_from_file_location(
    "denoise_conftest", Path(__file__).parent.parent / "denoise" / "conftest.py"
)
assert _spec and _spec.loader
denoise_tests = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(denoise_tests)

SIZES: dict[str, Any] = {"block_frames": 3, "context_frames": 2}
TIMETABLES: dict[str, Timetable] = {
    "full": full(5, 4),
    "dualparal": dualparal(8, 4, **SIZES),
    "dualparal, cached": dualparal(8, 4, **SIZES, mode=ContextMode.CACHE, anchor_frames=1),
    "autoregressive": autoregressive(8, 3, **SIZES),
    "buffer": moving_buffer(8, 4, **SIZES, stride=2),
    "fifo": fifo(4, 3),
    "pipefusion": pipefusion(8, 4, block_frames=3),
}


@pytest.fixture(scope="module")
def dit() -> DiT:
    return denoise_tests.redraw(DiT(DiTConfig(**denoise_tests.SIZES | {"num_layers": 3})))


def make_task(timetable: Timetable, dit: DiT, **options: Any) -> Task:
    return denoise_tests.make_task(timetable, model=dit, **options)


def says(dit: DiT, velocity: Callable[[float], float], monkeypatch: pytest.MonkeyPatch) -> None:
    """The model's output is a fixed pattern times a function of the noise level."""

    def velocity_of(_: Tensor, latents_BCFYX: Tensor, level_BF: Tensor) -> Tensor:
        pattern = torch.linspace(1, 2, latents_BCFYX[0].numel()).view_as(latents_BCFYX[0])
        return pattern[None] * velocity(float(level_BF[0, 0]))

    monkeypatch.setattr(dit, "velocity", velocity_of)


def errors(series: Series) -> list[np.ndarray]:
    return [series.curves[f"forecast_error_{order}"] for order in (0, 1, 2)]


def test_an_output_that_stays_the_same_is_alike_and_foreseen(dit: DiT, monkeypatch: pytest.MonkeyPatch):
    says(dit, lambda level: 1.0, monkeypatch)
    (series,) = Watcher(make_task(full(3, 5), dit)).run()
    assert np.isnan(series.curves["output_cosine"][0]) and np.isnan(series.curves["output_change"][0])
    assert (series.curves["output_cosine"][1:] == 1).all() and (series.curves["output_change"][1:] == 0).all()
    for order, found in enumerate(errors(series)):
        assert np.isnan(found[: order + 1]).all() and np.abs(found[order + 1 :]).max() < 1e-6


def test_layers_that_see_the_same_say_the_same(dit: DiT, monkeypatch: pytest.MonkeyPatch):
    tokens = torch.randn(1, 3, 6, dit.config.width, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(dit, "embed", lambda latents: tokens)
    monkeypatch.setattr(
        dit, "condition_noise", lambda level: (torch.zeros(1, 1, 24), torch.zeros(1, 1, 6, 24))
    )
    (series,) = Watcher(make_task(full(3, 4), dit)).run()
    for feature in FEATURES[1:]:
        assert (series.curves[f"{feature}_cosine"][1:] == 1).all()
        assert (series.curves[f"{feature}_change"][1:] == 0).all()
    assert (series.curves["stack_residual_ratio"][1:] == 1).all()
    assert (series.layers["residual_change"][:, 1:] == 0).all()


@pytest.mark.parametrize("degree", [1, 2])
def test_a_forecast_is_exact_from_its_degree_on(degree: int, dit: DiT, monkeypatch: pytest.MonkeyPatch):
    says(dit, lambda level: 1 + level**degree, monkeypatch)
    # without a shift noise levels are even, and what is linear in them is so in steps
    (series,) = Watcher(make_task(full(3, 6), dit, shift=1.0)).run()
    for order, found in enumerate(errors(series)):
        known = found[order + 1 :]
        assert (known < 1e-5).all() if order >= degree else (known > 1e-3).all(), (order, known)


def test_figures_are_those_of_the_definitions(dit: DiT):
    velocities: list[Tensor] = []
    task = make_task(full(3, 3), dit)
    run = dit.forward_and_lend

    def kept(*inputs: Any, **options: Any) -> Any:
        made = run(*inputs, **options)
        velocities.append(made[0].double().flatten())
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dit, "forward_and_lend", kept)
        list(denoise(task))
    (series,) = Watcher(task).run()
    for step in (1, 2):
        now, then = velocities[step], velocities[step - 1]
        change = (now - then).abs().sum() / then.abs().sum()
        assert series.curves["output_change"][step] == pytest.approx(float(change), rel=1e-5)
        likeness = now @ then / now.norm() / then.norm()
        assert series.curves["output_cosine"][step] == pytest.approx(float(likeness), rel=1e-5)
        error = (now - then).abs().sum() / now.abs().sum()
        assert series.curves["forecast_error_0"][step] == pytest.approx(float(error), rel=1e-5)


@pytest.mark.parametrize("mode", list(GuidanceMode), ids=str)
@pytest.mark.parametrize("name", TIMETABLES)
def test_watching_changes_no_bit_and_sees_every_step(name: str, mode: GuidanceMode, dit: DiT):
    timetable = TIMETABLES[name]
    task = replace(make_task(timetable, dit, guidance_scale=3.0), guidance_mode=mode)
    before = [done.latents_BCFYX for done in denoise(task)]
    watcher = Watcher(task, AttentionMass(3))
    series, after = _run_and_keep(watcher)
    assert len(series) == 2 * timetable.num_blocks and {one.branch for one in series} == {
        "prompt",
        "no prompt",
    }
    for one in series:
        assert np.isfinite([one.curves[name][3:] for name in CURVES]).all()
        assert np.isfinite(one.layers["residual_change"][:, 1:]).all()
        assert np.isfinite(one.layers["output_cosine"]).all()
        assert not one.kept and not one.outputs, "a finished block leaves only figures"
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    assert "forward_and_lend" not in vars(dit) and not dit.layers[0]._forward_hooks


def _run_and_keep(watcher: Watcher) -> tuple[Sequence[Series], list[Tensor]]:
    from vidgen.bench import features

    run_tick, clean = features.run_tick, []

    def kept(*inputs: Any) -> Any:
        done = run_tick(*inputs)
        clean.extend(block.latents_BCFYX for block in done)
        return done

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(features, "run_tick", kept)
        return watcher.run(), clean


def test_all_branches_agree_whether_they_are_run_alone_or_stacked(dit: DiT):
    task = make_task(TIMETABLES["dualparal"], dit, guidance_scale=3.0)
    alone, stacked = (
        summarize(Watcher(replace(task, guidance_mode=mode)).run())
        for mode in (GuidanceMode.SPLIT, GuidanceMode.STACKED)
    )
    for name in CURVES:
        for key, row in alone["curves"][name].items():
            other = np.array(stacked["curves"][name][key], dtype=float)
            assert np.allclose(np.array(row, dtype=float), other, rtol=1e-3, atol=1e-5, equal_nan=True), name


def test_experts_are_not_compared_with_each_other(dit: DiT):
    other = denoise_tests.redraw(DiT(dit.config), seed=1)
    one = make_task(full(3, 6), dit)
    task = replace(one, timetable=full(3, 6, switch_step=3), second_model=other)
    (series,) = Watcher(task).run()
    change = series.curves["output_change"]
    assert np.isnan(change[[0, 3]]).all() and np.isfinite(change[[1, 2, 4, 5]]).all()
    assert np.isnan(series.layers["residual_change"][:, 3]).all()


def test_a_task_with_a_step_cache_is_refused(dit: DiT):
    task = replace(make_task(full(3, 4), dit), cache=make_cache(CacheSettings(method="taylor")))
    with pytest.raises(ValueError, match="cache=taylor: skips steps; leave it out"):
        Watcher(task)


def test_mass_of_even_attention_is_the_share_of_keys():
    query, key = torch.zeros(1, 8, 2, 4), torch.zeros(1, 16, 2, 4)
    # 4 frames of 4 tokens, queries of frames 1 and 2: each has itself, and two beside it
    mass = frame_mass(query, key, 4, 4)
    assert mass.flatten().tolist() == pytest.approx([1 / 4, 1 / 4, 3 / 4, 3 / 4])


def test_mass_of_attention_to_the_own_frame_is_all_there():
    frames = 30 * torch.eye(4).repeat_interleave(4, 0)[None, :, None]  # tokens point where their frame does
    mass = frame_mass(frames, frames, 4, 0)
    assert mass[:, 0].tolist() == pytest.approx([1, 1]) and mass[0, 1] == pytest.approx(1 / 4)


def test_what_is_found_can_be_drawn_and_said_even_of_two_steps(dit: DiT):
    found = watch([make_task(full(3, 2), dit)])
    assert draw(found).startswith(b"\x89PNG") and len(rows(found)) == 2
    said = sentences(found)
    assert 2 <= len(said) <= 4 and not any("nan" in sentence for sentence in said), said


def test_sentences_follow_the_numbers(dit: DiT, monkeypatch: pytest.MonkeyPatch):
    says(dit, lambda level: 1 + 3 * max(0.0, level - 0.5), monkeypatch)  # still from the fourth step on
    said = sentences(watch([make_task(full(3, 8), dit, shift=1.0)]))
    assert said[0].startswith("From step 5 on the model's output changes by less than 10% a step (mean 0.0%")
    assert "warm_up_steps=5" in said[0]


def test_a_forecast_that_is_nowhere_better_is_said_so(dit: DiT, monkeypatch: pytest.MonkeyPatch):
    says(dit, lambda level: 2 + round(6 * level) % 2, monkeypatch)  # up and down
    said = sentences(watch([make_task(full(3, 6), dit, shift=1.0)]))
    assert any("Order 1 forecasts better than 0 at none of 4 steps" in sentence for sentence in said)


@pytest.mark.parametrize(
    ("places", "run"), [("..", (0, 0)), ("xx.xxx", (3, 6)), ("xxx.x", (0, 3)), ("x.x", (2, 3))]
)
def test_the_longest_run_is_found(places: str, run: tuple[int, int]):
    assert longest_run([place == "x" for place in places]) == range(*run)
