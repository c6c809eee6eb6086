"""Laws of what work costs: counts agree with the model, rates with their points, memory with a render."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from vidgen.config import parse_job, resolve
from vidgen.denoise.timetable import dualparal, full
from vidgen.limits import memory_bytes
from vidgen.model.context import Context
from vidgen.model.dit import DiT, DiTConfig
from vidgen.parallel.place import strip
from vidgen.parallel.planner.cost_model import CostModel
from vidgen.parallel.planner.hardware import (
    Hardware,
    LinkRate,
    Rate,
    dump_hardware,
    load_hardware,
    parse_hardware,
    profile_names,
)
from vidgen.parallel.planner.memory_model import rank_memory
from vidgen.parallel.planner.work import (
    Film,
    end_flops,
    first_channels,
    first_parameters,
    last_parameters,
    layer_parameters,
    linear_flops,
    out_channels,
)
from vidgen.parallel.simulation.workload import Item
from vidgen.parallel.topology import Lanes, Topology
from vidgen.types import ContextMode, Recommended

TINY = DiTConfig(latent_channels=8, width=24, num_layers=3, num_heads=4, ffn_width=40, text_width=16)
CONFIGS = {
    "wan": TINY,
    "built-in": replace(TINY, convolutions=True, linear_skip=True, patch=(1, 1)),
    "image": replace(TINY, condition_channels=4, image_width=20, image_tokens=6, image_positions=True),
}
FILM = Film(
    dit=TINY, num_experts=1, num_frames=33, num_steps=6, latent_rows=8, latent_columns=8, text_tokens=5,
    branches=2, stacked=False, pixels_per_frame=4096,
)  # fmt: skip
LINEAR = Rate((1.0, 1e18), (1e-9, 1e9))
HARDWARE = Hardware(
    name="ideal", source="made up", measured=False, memory_bytes=2**40, shares_memory=False, ranks_per_node=8,
    process_bytes=1000, layers={"fp32": LINEAR}, attention={"fp32": LINEAR}, joining=LINEAR, ends=LINEAR,
    solver=LINEAR, item_s=0.0, link=LinkRate(0.0, 1e9), exchange=LinkRate(0.0, 1e9),
    between_nodes=LinkRate(0.0, 1e8), decode=LINEAR, decode_alone=LINEAR, write=LINEAR,
)  # fmt: skip


def model_of(film: Film = FILM, /, **lanes: int) -> CostModel:
    grid = Lanes(**lanes)
    return CostModel(film, HARDWARE, grid, grid.num_lanes)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_numbers_of_weights_are_those_of_the_model(config: DiTConfig):
    for stage in Topology((1, 1, 1)).stages():
        held = sum(tensor.numel() for tensor in strip(config, stage).state_dict().values())
        counted = layer_parameters(config)
        counted += first_parameters(config) if stage.is_first else 0
        counted += last_parameters(config) if stage.is_last else 0
        assert counted == held


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@torch.inference_mode()
def test_flops_are_those_that_torch_counts(config: DiTConfig):
    frames, rows, texts = 3, 4, 5
    model, (p, q) = DiT(config).eval(), config.patch
    image = torch.randn(1, config.image_tokens, config.image_width) if config.image_width else None
    shared = model.condition(torch.full((1, frames), 0.5), torch.randn(1, texts, config.text_width), image)
    channels = config.latent_channels + config.condition_channels
    latents = torch.randn(1, channels, frames, rows * p, rows * q)
    grid, tokens = (frames, rows, rows), frames * rows * rows
    with FlopCounterMode(display=False) as counter:
        x = model.embed(latents)
    assert counter.get_total_flops() == pytest.approx(
        end_flops(config, tokens, first_channels(config)), rel=0.35 if config.convolutions else 1e-9
    )  # a convolution's taps outside the frame are counted by us
    same = [lambda query, key, value: query] * config.num_layers
    with FlopCounterMode(display=False) as counter:
        model.run_layers(x, shared, grid, Context(), same, lends=False)
    cross = 4 * tokens * (texts + config.image_tokens) * config.width  # torch does not count this on a CPU
    found = counter.get_total_flops() / config.num_layers
    expected = linear_flops(config, tokens, texts)
    assert found == pytest.approx(expected, rel=1e-9) or found + cross == pytest.approx(expected, rel=1e-9)
    with FlopCounterMode(display=False) as counter:
        model.project(x, shared.noise_BFD, grid)
    expected = end_flops(config, tokens, out_channels(config))
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.35 if config.convolutions else 1e-9)


points = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=6, unique=True).map(sorted)


@given(points, points, st.floats(1e-6, 1e6), st.floats(1e-6, 1e6))
def test_a_rate_goes_through_its_points_and_more_work_never_takes_less(
    sizes: list[float], seconds: list[float], one: float, other: float
):
    count = min(len(sizes), len(seconds))
    rate = Rate(tuple(sizes[:count]), tuple(seconds[:count]))
    for size, taken in zip(rate.sizes, rate.seconds, strict=True):
        assert rate.seconds_of(size) == pytest.approx(taken)
    low, high = sorted((one, other))
    assert rate.seconds_of(low) <= rate.seconds_of(high) * (1 + 1e-12)
    assert rate.seconds_of(0) == 0


@pytest.mark.parametrize("lanes", [{"ulysses": 2}, {"ring": 2}, {"ring": 2, "ulysses": 2}, {"ring": 4}])
def test_lanes_share_linear_work_and_attention(lanes: dict[str, int]):
    item = Item(4, 2, 2)
    alone, shared = model_of().layer(item), model_of(**lanes).layer(item)
    sharers = Lanes(**lanes).num_lanes
    text = 4 * FILM.text_tokens * TINY.width**2 / 1e9  # every lane makes the text's keys
    assert alone.linear_s - text == pytest.approx(sharers * (shared.linear_s - text))
    assert alone.attention_s == pytest.approx(sharers * shared.attention_s)
    assert alone.sent_bytes == alone.exchange_s == 0 < shared.sent_bytes


@given(st.integers(1, 16), st.integers(1, 4), st.integers(1, 4))
@settings(deadline=None)
def test_the_slowest_lane_is_never_quicker_than_an_even_share(tokens: int, ring: int, ulysses: int):
    film = replace(FILM, latent_rows=2, latent_columns=2 * tokens)
    alone = model_of(film).layer(Item(3))
    shared = model_of(film, ring=ring, ulysses=ulysses).layer(Item(3))
    assert shared.linear_s >= alone.linear_s / (ring * ulysses) * (1 - 1e-12)
    assert shared.attention_s >= alone.attention_s / (ring * ulysses) * (1 - 1e-12)


def test_ulysses_sends_each_tensor_but_the_share_at_hand():
    item, ulysses = Item(4, 2, 2), 2
    row = FILM.tokens_per_frame // ulysses * TINY.width * 4
    expected = (2 * item.window + 2 * (item.window + item.context)) * row / 2
    assert model_of(ulysses=ulysses).layer(item).sent_bytes == expected


def test_guidance_lanes_run_a_branch_each():
    alone, split = model_of(), model_of(guidance=2)
    assert (alone.runs, split.runs) == (2, 1)
    assert alone.layer(Item(4)).seconds == split.layer(Item(4)).seconds
    assert split.solver_s(Item(4)) > alone.solver_s(Item(4))


def memory_of(film: Film = FILM, stages: tuple[int, ...] = (3,), **changes: Any) -> tuple[int, ...]:
    sizes: dict[str, Any] = {"block_frames": 4, "context_frames": 2} | {
        k: v for k, v in changes.items() if k in QUEUE
    }
    lanes = Lanes(**{name: size for name, size in changes.items() if name not in QUEUE})
    topology = Topology(stages, lanes)
    table = dualparal(film.num_frames, film.num_steps, **sizes)
    held = rank_memory(CostModel(film, HARDWARE, lanes, topology.num_ranks), topology, table)
    return tuple(memory.total for memory in held)


QUEUE = {"block_frames", "context_frames", "mode", "anchor_frames"}


@pytest.mark.parametrize(
    "more",
    [
        {"film": replace(FILM, dit=replace(TINY, width=48))},
        {"film": replace(FILM, dit=replace(TINY, num_layers=6)), "stages": (6,)},
        {"film": replace(FILM, latent_rows=16)},
        {"film": replace(FILM, num_experts=2)},
        {"film": replace(FILM, decode_bytes=10**9)},
        {"block_frames": 8},
        {"context_frames": 4},
        {"mode": ContextMode.CACHE, "context_frames": 4},
        {"anchor_frames": 2},
    ],
    ids=lambda more: "+".join(more),
)
def test_memory_grows_with_what_takes_it(more: dict[str, Any]):
    assert memory_of(**more)[0] > memory_of()[0]


@pytest.mark.parametrize("more", [{"ulysses": 4}, {"ring": 4}])
def test_a_rank_of_several_lanes_holds_less_than_one_alone(more: dict[str, Any]):
    film = replace(FILM, latent_rows=64, latent_columns=64)
    *ranks, _decoder = memory_of(film, **more)
    assert max(ranks) < memory_of(film)[0]


def test_stages_share_the_weights():
    film, topology = replace(FILM, dit=replace(TINY, num_layers=30)), Topology((10, 10, 10))
    table = dualparal(33, 6, block_frames=4, context_frames=2)
    *stages, decoder = rank_memory(CostModel(film, HARDWARE, Lanes(), 3), topology, table)
    (alone,) = rank_memory(CostModel(film, HARDWARE, Lanes(), 1), Topology((30,)), table)
    assert sum(stage.weights for stage in stages) == alone.weights and decoder.weights == 0
    assert max(stage.weights for stage in stages) < 0.5 * alone.weights
    assert decoder.decoding == alone.decoding and not any(stage.decoding for stage in stages)


def test_memory_of_a_longer_queue_is_the_same():
    assert memory_of(replace(FILM, num_frames=3300))[0] == memory_of(FILM)[0]


@pytest.mark.parametrize("name", ["full", "dualparal", "cache"])
def test_memory_of_one_process_is_what_a_render_checks(name: str):
    mode = ContextMode.CACHE if name == "cache" else ContextMode.RECOMPUTE
    queue = {"timetable": "full" if name == "full" else "dualparal", "context_mode": mode}
    asked = {"prompt": "x", "num_frames": 132, "height": 64, "width": 64, "num_inference_steps": 6}
    job = resolve(parse_job({**asked, "queue": queue}), Recommended())
    table = dualparal(33, 6, block_frames=4, context_frames=2, mode=mode)
    table = full(33, 6) if name == "full" else table
    film = replace(FILM, pixels_per_frame=4 * 64 * 64)
    (held,) = rank_memory(CostModel(film, HARDWARE, Lanes(), 1), Topology((3,)), table)
    expected = memory_bytes(job, TINY, table, (4, 8), held.weights)
    assert held.total - held.process == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("name", profile_names())
def test_shipped_profiles_are_whole_and_say_where_they_come_from(name: str):
    hardware = load_hardware(name)
    assert hardware.source and hardware.memory_bytes > 2**30
    assert parse_hardware(dump_hardware(hardware), name) == hardware


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"memory_bytes": -1}, "hardware=x: memory_bytes=-1: -1 is not a number above 0"),
        ({"memory_bytes": 0.5}, "need a whole number"),
        ({"nvlink": 3}, "unknown key nvlink; known: name, source"),
        ({"link": {"latency_s": 1}}, "link={'latency_s': 1}: "),
        ({"layers": {"fp32": [[2, 1], [1, 2]]}}, "need numbers above 0, each larger than the one before"),
        ({"ends": "fast"}, "hardware=x: ends='fast': "),
        ({"measured": "yes"}, "need true or false"),
        ({"busy": [[2, 2.0], [1, 1.0]]}, "need rising numbers of ranks"),
        ({"item_s": float("nan")}, "is not a number"),
    ],
)
def test_a_broken_profile_is_refused_in_one_line(change: dict[str, Any], says: str):
    with pytest.raises(ValueError) as caught:
        parse_hardware(dump_hardware(HARDWARE) | change, "x")
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_a_profile_that_lacks_a_rate_names_it():
    values = dump_hardware(HARDWARE)
    del values["link"]
    with pytest.raises(
        ValueError, match="hardware=x: link is missing; make a profile: vidgen bench calibrate"
    ):
        parse_hardware(values, "x")
    with pytest.raises(ValueError, match="hardware=x: need a mapping"):
        parse_hardware([], "x")


def test_a_dtype_without_a_rate_is_an_error():
    with pytest.raises(ValueError, match="hardware=ideal: has no rates of dtype=bf16; it has fp32"):
        model_of(replace(FILM, dit=replace(TINY, dtype="bf16"))).layer(Item(1))


def test_ranks_slow_each_other_by_what_was_measured():
    hardware = replace(HARDWARE, busy=((1.0, 1.0), (2.0, 1.2), (4.0, 2.4)))
    assert [hardware.slowdown(count) for count in (0.5, 1, 2, 4, 8)] == [1.0, 1.0, 1.2, 2.4, 4.8]
    assert hardware.slowdown(3) == pytest.approx(1.8)
