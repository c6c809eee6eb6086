"""Laws of the planner: plans use all ranks, fit, cost the sum of their parts; the choice is the quickest."""

import time
from dataclasses import replace
from math import prod
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vidgen.config import parse_job, resolve
from vidgen.denoise.schedule import noise_levels
from vidgen.denoise.timetable import dualparal
from vidgen.model.dit import DiTConfig
from vidgen.parallel.planner.cost_model import CostModel
from vidgen.parallel.planner.hardware import Hardware, LinkRate, Rate
from vidgen.parallel.planner.plan import Planned, best, examine, plans, topologies
from vidgen.parallel.planner.reasons import reasons, why
from vidgen.parallel.planner.schemes import Scheme, schemes
from vidgen.parallel.planner.steps import Steps, all_steps, item_counts
from vidgen.parallel.planner.work import Film
from vidgen.parallel.simulation.workload import Item
from vidgen.parallel.topology import Lanes, Topology
from vidgen.planning import make_clips, make_timetable
from vidgen.stepcache.cache import StepCache, make_cache
from vidgen.stepcache.settings import CacheSettings
from vidgen.types import ContextMode, Recommended

DIT = DiTConfig(latent_channels=8, width=64, num_layers=6, num_heads=4, ffn_width=256, text_width=16)
FILM = Film(
    dit=DIT, num_experts=1, num_frames=24, num_steps=5, latent_rows=8, latent_columns=8, text_tokens=5,
    branches=2, stacked=False, pixels_per_frame=4096,
)  # fmt: skip
RATE, FREE = Rate((1e3, 1e18), (1e-5, 1e10)), LinkRate(0.0, 1e15)
HARDWARE = Hardware(
    name="made up", source="made up", measured=False, memory_bytes=2**34, shares_memory=False,
    ranks_per_node=8, process_bytes=2**20, layers={"fp32": RATE}, attention={"fp32": RATE}, joining=RATE,
    ends=RATE, solver=RATE, item_s=1e-4, link=LinkRate(1e-5, 1e9), exchange=LinkRate(1e-5, 1e9),
    between_nodes=LinkRate(1e-4, 1e8), decode=RATE, decode_alone=RATE, write=RATE,
)  # fmt: skip
SIZES: dict[str, Any] = {"block_frames": 4, "context_frames": 2, "mode": ContextMode.RECOMPUTE}
ALL = schemes(24, 5, lossy=True, **SIZES)
FULL = next(scheme for scheme in ALL if scheme.name == "full")
QUEUE = next(scheme for scheme in ALL if scheme.name == "dualparal")


def cache(**settings: Any) -> StepCache:
    made = make_cache(CacheSettings(**settings))
    assert made is not None
    return made


def levels_of(num_steps: int) -> tuple[float, ...]:
    return tuple(noise_levels(num_steps))


@pytest.mark.parametrize("num_ranks", [1, 2, 6, 8])
def test_parts_multiply_to_the_ranks_and_every_layer_is_held_once(num_ranks: int):
    found = plans(FILM, HARDWARE, num_ranks, ALL)
    assert found and {plan.scheme.label for plan in found} == {scheme.label for scheme in ALL}
    for plan in found:
        assert prod(plan.axes.values()) == plan.topology.num_ranks == num_ranks
        assert plan.topology.num_layers == DIT.num_layers
        settings_of = plan.job_settings()["parallel"]
        assert settings_of["ranks"] == num_ranks
        assert {name: size for name, size in settings_of.items() if name != "ranks"} == {
            axis: size for axis, size in plan.axes.items() if size > 1 and axis != "stages"
        }
    keys = [(plan.scheme.label, *plan.axes.values()) for plan in found]
    assert len(keys) == len(set(keys))


@given(st.integers(1, 64), st.integers(1, 12), st.integers(1, 5), st.integers(1, 6), st.booleans())
@settings(deadline=None)
def test_no_axis_is_wider_than_what_it_shares(
    num_ranks: int, layers: int, heads: int, tokens: int, guided: bool
):
    dit = replace(DIT, num_layers=layers, num_heads=heads, width=12 * heads, patch=(1, 1))
    film = replace(FILM, dit=dit, latent_rows=1, latent_columns=tokens, branches=1 + guided)
    for scheme in ALL:
        for lanes, num_stages in topologies(film, scheme, num_ranks):
            assert lanes.num_lanes * num_stages == num_ranks
            assert num_stages <= layers and lanes.ulysses <= heads and lanes.sequence <= tokens
            assert lanes.guidance <= 1 + guided
            assert lanes.clip <= (scheme.clips.num_clips if scheme.clips else 1)


@given(st.integers(20, 40), st.booleans(), st.sampled_from([1, 2, 4]))
@settings(deadline=None, max_examples=25)
def test_what_does_not_fit_is_never_proposed_and_says_why_in_numbers(
    log_bytes: int, shares: bool, num_ranks: int
):
    film = replace(FILM, latent_rows=64, latent_columns=64)
    hardware = replace(HARDWARE, memory_bytes=2**log_bytes, shares_memory=shares)
    found = plans(film, hardware, num_ranks, [FULL, QUEUE])
    for plan in found:
        stages = plan.memory[: plan.topology.num_stages]
        needed = max(held.total for held in stages)
        if shares:
            needed = plan.topology.lanes.num_lanes * sum(held.total for held in stages)
            needed += sum(held.total for held in plan.memory[plan.topology.num_stages :])
        assert plan.fits == (needed <= 2**log_bytes)
        assert (plan.seconds < float("inf")) == plan.fits
        if not plan.fits:
            assert plan.does_not_fit and f"{needed / 2**30:.1f} GiB" in plan.does_not_fit
    if any(plan.fits for plan in found):
        assert best(found).fits and best(found) == found[0]
        assert best(found).seconds == min(plan.seconds for plan in found)
    else:
        with pytest.raises(ValueError, match="no plan fits; the smallest is .* GiB of .*; take more ranks"):
            best(found)


def test_no_plan_at_all_is_an_error():
    assert not plans(FILM, HARDWARE, 97, [FULL])
    with pytest.raises(ValueError, match="no way to share the work of this video among so many ranks"):
        best([])


@pytest.mark.parametrize("mode", list(ContextMode))
def test_one_process_takes_the_sum_of_its_parts(mode: ContextMode):
    table = dualparal(22, 5, block_frames=4, context_frames=2, mode=mode)
    film = replace(FILM, num_frames=22)
    model = CostModel(film, HARDWARE, Lanes(), 1)
    plan = examine(film, HARDWARE, Scheme(name="dualparal", timetable=table), Lanes(), 1)
    total = 0.0
    for tick in table.ticks():
        for forward in tick:
            reads = (forward.before_kv, forward.after_kv, forward.anchor_kv)
            before = forward.before_latents.num_frames if forward.before_latents else 0
            context = sum(read.num_frames for read in reads if read)
            item = Item(table.block(forward.block).num_frames, before, context)
            layers = DIT.num_layers * model.layer(item).seconds
            run = HARDWARE.item_s + layers + model.first_s(item) + model.last_s(item)
            total += 2 * run + model.solver_s(Item(4))
    pixels = 22 * FILM.pixels_per_frame
    total += HARDWARE.decode_alone.seconds_of(pixels) + HARDWARE.write.seconds_of(pixels)
    assert plan.seconds == pytest.approx(total, rel=1e-4)


@pytest.mark.parametrize("mode", list(ContextMode))
def test_a_step_cache_takes_off_the_runs_that_it_skips(mode: ContextMode):
    table = dualparal(24, 9, block_frames=4, context_frames=2, mode=mode)
    film, scheme = replace(FILM, num_steps=9), Scheme(name="dualparal", timetable=table)
    cached = replace(film, cache=cache(method="taylor", warm_up_steps=2), levels=levels_of(9))
    whole, saved = (examine(each, HARDWARE, scheme, Lanes(), 1) for each in (film, cached))
    assert saved.steps and saved.steps.runs(2) == (2, 2, 0, 0, 2, 0, 0, 2, 2)
    model = CostModel(cached, HARDWARE, Lanes(), 1)

    def runs_s(steps: Steps) -> float:
        """Of all runs of the model."""
        counts = item_counts(table, steps, 2)
        return sum(
            count * sum(model.stage_s(Topology((DIT.num_layers,)), item)) for item, count in counts.items()
        )

    skipped_s = runs_s(all_steps(table)) - runs_s(saved.steps)
    assert saved.seconds == pytest.approx(whole.seconds - skipped_s, rel=1e-4)
    assert saved.flops < 0.6 * whole.flops
    assert saved.memory_bytes > whole.memory_bytes


@pytest.mark.parametrize(("method", "least"), [("delta", 0.5), ("region", 0.5), ("mag", 0.3)])
@pytest.mark.parametrize("num_stages", [1, 3])
def test_every_foreseen_cache_makes_a_plan_quicker(method: str, least: float, num_stages: int):
    curve = {"magnitudes": ((1.0, 1.0), (0.0, 1.05))} if method == "mag" else {}
    film = replace(FILM, num_steps=12, latent_rows=32, latent_columns=32)
    scheme = Scheme(name="dualparal", timetable=dualparal(24, 12, block_frames=4, context_frames=2))
    cached = replace(film, cache=cache(method=method, **curve), levels=levels_of(12))
    whole, saved = (examine(each, HARDWARE, scheme, Lanes(), num_stages) for each in (film, cached))
    assert least * whole.seconds < saved.seconds < 0.98 * whole.seconds
    assert saved.first_frame_s < whole.first_frame_s


def test_steps_that_are_not_known_beforehand_count_as_run():
    film = replace(FILM, cache=cache(method="tea"), levels=levels_of(5))
    plan = examine(film, HARDWARE, QUEUE, Lanes(), 2)
    assert plan.steps and not plan.steps.is_known and not plan.steps.num_skipped
    assert plan.seconds == examine(FILM, HARDWARE, QUEUE, Lanes(), 2).seconds


def test_axes_that_a_jobs_settings_do_not_know_are_never_proposed():
    film = replace(FILM, closed_axes=frozenset({"ulysses", "guidance"}))
    found = plans(film, HARDWARE, 4, ALL)
    assert found and all(plan.axes["ulysses"] == plan.axes["guidance"] == 1 for plan in found)
    assert any(plan.axes["ring"] > 1 for plan in found)


def test_with_free_messages_lanes_halve_the_time_of_what_they_share():
    hardware = replace(HARDWARE, exchange=FREE, link=FREE, item_s=0.0)
    film = replace(FILM, text_tokens=0)
    alone, ulysses, ring, guidance = (
        examine(film, hardware, FULL, lanes, 1).seconds
        for lanes in (Lanes(), Lanes(ulysses=2), Lanes(ring=2), Lanes(guidance=2))
    )
    assert 0.5 * alone < ulysses < 0.62 * alone and 0.5 * alone < ring < 0.62 * alone
    assert 0.5 * alone < guidance < 0.62 * alone


def test_stages_need_a_queue():
    whole, queue = (examine(FILM, HARDWARE, scheme, Lanes(), 4) for scheme in (FULL, QUEUE))
    assert whole.utilisation < 0.6 and queue.utilisation > 1.3 * whole.utilisation


def test_slower_messages_never_make_a_plan_quicker():
    slow = replace(HARDWARE, link=LinkRate(1e-2, 1e6), exchange=LinkRate(1e-2, 1e6))
    quick = {(p.scheme.label, *p.axes.values()): p.seconds for p in plans(FILM, HARDWARE, 4, ALL)}
    for plan in plans(FILM, slow, 4, ALL):
        assert plan.seconds >= quick[plan.scheme.label, *plan.axes.values()] * (1 - 1e-9)


def test_ranks_that_share_cores_are_slower():
    shared = replace(HARDWARE, busy=((1.0, 1.0), (2.0, 1.1), (4.0, 2.2), (8.0, 4.4)))
    for scheme in (FULL, QUEUE):
        alone = examine(FILM, HARDWARE, scheme, Lanes(), 4).seconds
        assert alone < examine(FILM, shared, scheme, Lanes(), 4).seconds < 2.5 * alone


@pytest.mark.parametrize("scheme", ALL, ids=[scheme.label for scheme in ALL])
def test_a_schemes_settings_ask_for_it(scheme: Scheme):
    asked = {"prompt": "x", "num_inference_steps": 5, "num_frames": 96, "queue": scheme.settings()}
    job = resolve(parse_job(asked), Recommended())
    assert make_timetable(job, 24) == scheme.timetable
    assert make_clips(job, 24) == scheme.clips


def test_no_two_schemes_share_a_label_and_lossy_ones_are_asked_for():
    assert len({scheme.label for scheme in ALL}) == len(ALL) >= 9
    assert [scheme.name for scheme in ALL if scheme.is_lossy] == ["pipefusion"]
    assert not any(scheme.is_lossy for scheme in schemes(24, 5, **SIZES))
    assert [scheme.name for scheme in schemes(4, 5, **SIZES)] == ["full"]
    assert "buffer" not in {scheme.name for scheme in schemes(24, 5, has_mixed_levels=False, **SIZES)}


def test_every_class_of_plans_that_lost_has_its_reason():
    found = plans(FILM, HARDWARE, 4, ALL)
    choice = best(found)
    told = {reason.name: reason.text for reason in reasons(found, choice)}
    same = {plan.kind for plan in found if plan.scheme.label == choice.scheme.label}
    assert {f"{kind} for the same video" for kind in same - {choice.kind}} <= told.keys()
    others = {scheme.label for scheme in ALL} - {choice.scheme.label}
    assert others == {name.partition(" by ")[0] for name in told if " by " in name}
    assert all(" times as long" in text for text in told.values())


def test_a_reason_names_the_cause():
    choice = examine(FILM, HARDWARE, QUEUE, Lanes(), 2)

    def changed(**figures: Any) -> Planned:
        return replace(choice, **figures)

    assert why(changed(seconds=2 * choice.seconds), choice) == "2.00 times as long"
    assert "1.5 times the work" in why(changed(flops=1.5 * choice.flops), choice)
    assert "80% of its layers' time is waiting" in why(changed(waiting_share=0.8), choice)
    assert "ranks have work for 10%" in why(changed(utilisation=0.1), choice)
    assert why(changed(does_not_fit="9 GiB of 8"), choice) == "does not fit: 9 GiB of 8"


def test_half_an_hour_of_video_on_many_ranks_is_planned_in_seconds():
    film = replace(FILM, num_frames=7200, num_steps=8)
    table = dualparal(7200, 8, block_frames=8, context_frames=8)
    start = time.process_time()
    found = plans(film, HARDWARE, 96, [Scheme(name="dualparal", timetable=table)])
    assert time.process_time() - start < 10 and len(found) > 10 and best(found).utilisation > 0.5
