"""Laws of the sequence axis: Ulysses, ring and both give what one process gives, whatever divides by what."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vidgen.kernels.attention.api import attention
from vidgen.model.context import Context, KeyValue
from vidgen.model.dit import DiT, DiTConfig
from vidgen.parallel.lanes.sequence import SplitSequence
from vidgen.parallel.lanes.splits import DIMS, SCHEME, Cut
from vidgen.parallel.topology import Lanes, parts
from vidgen.parallel.transport import TransportError


def _load() -> Any:
    spec = importlib.util.spec_from_file_location("together", Path(__file__).with_name("together.py"))
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


together = _load()


@given(together.sizes, st.integers(2, 6))
@settings(max_examples=60)
def test_ulysses_gives_each_head_bit_for_bit(size: dict[str, int], ulysses: int):
    case = together.tensors(size)
    assert torch.equal(together.attended(Lanes(ulysses=ulysses), *case), together.whole(*case))


@given(together.sizes, together.lane_counts)
@settings(max_examples=100)
def test_ring_and_both_are_attention_of_one_process(size: dict[str, int], lanes: tuple[int, int]):
    case = together.tensors(size)
    together.close(together.attended(Lanes(ring=lanes[0], ulysses=lanes[1]), *case), together.whole(*case))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_a_ring_errs_at_most_twice_as_much_as_one_process(dtype: torch.dtype):
    query, key, value = (tensor.to(dtype) for tensor in together.drawn_case(1, 3, 37, 2, 16))
    exact = together.whole(query.double(), key.double(), value.double())
    errors = [
        (out.double() - exact).abs().max().item()
        for out in (together.attended(Lanes(ring=4), query, key, value), together.whole(query, key, value))
    ]
    assert errors[0] <= 2 * errors[1] + 1e-6
    assert torch.equal(
        together.attended(Lanes(ulysses=2), query, key, value), together.whole(query, key, value)
    )


@given(st.integers(1, 9), together.lane_counts, st.integers(0, 99))
@settings(max_examples=40)
def test_what_is_cut_is_gathered_again_on_every_rank(tokens: int, lanes: tuple[int, int], seed: int):
    axes, x_BFSD = Lanes(ring=lanes[0], ulysses=lanes[1]), together.drawn(seed, 2, 3, tokens, 5)
    split_parts = together.split(axes, tokens)
    cuts = [part.cut(x_BFSD) for part in split_parts]
    assert torch.equal(torch.cat(cuts, dim=2), x_BFSD)
    for part, mine, wanted in zip(split_parts, cuts, parts(tokens, axes.sequence), strict=True):
        assert torch.equal(mine, x_BFSD[:, :, part.tokens])
        assert (part.tokens.start, part.tokens.stop) == (wanted.start, wanted.stop)
    for gathered in together.on_each(axes.num_lanes, lambda lane: split_parts[lane].gather(cuts[lane])):
        assert torch.equal(gathered, x_BFSD)


def test_one_rank_is_the_identity_and_says_nothing():
    (part,) = together.split(Lanes(), 6)
    x_BFSD = together.drawn(0, 1, 2, 6, 4)
    assert part.cut(x_BFSD) is x_BFSD and part.gather(x_BFSD) is x_BFSD
    assert part.around(attention, 2, query_frames=2) is attention and part.tokens == slice(0, 6)
    assert part.bytes_sent == 0


def test_a_rank_sends_what_the_papers_say():
    """Ulysses 4 L d / u (u-1) / u elements, a ring 2 L d / r (r-1), where everything divides."""
    case = together.drawn_case(1, 3, 8, 4, 4)
    elements = case[0].numel()
    for lanes in (Lanes(ulysses=4), Lanes(ring=4)):
        split_parts = together.split(lanes, 8)

        def work(lane: int, split_parts: Sequence[SplitSequence] = split_parts) -> int:
            part = split_parts[lane]
            mine = [tensor[:, :, part.tokens].flatten(1, 2) for tensor in case]
            part.around(attention, 3, query_frames=3)(mine[0], mine[1], mine[2])
            return part.bytes_sent

        expected = 4 * elements // 4 * 3 // 4 if lanes.ulysses > 1 else 2 * elements // 4 * 3
        assert together.on_each(lanes.num_lanes, work) == [expected * 4] * 4  # fp32


def test_a_ring_with_adaptive_sparsity_is_an_error_that_says_what_to_take():
    part = together.split(Lanes(ring=2, ulysses=2), 8)[0]
    with pytest.raises(ValueError, match="ring=2 with adaptive sparsity: .* take ring=1 and ulysses=4"):
        part.around(lambda query, key, value: query, 1, query_frames=1, is_plain=False)
    ulysses = together.split(Lanes(ulysses=2), 8)[0]
    assert callable(ulysses.around(lambda query, key, value: query, 1, query_frames=1, is_plain=False))


@pytest.mark.parametrize("axis", ["ulysses", "ring"])
def test_a_rank_that_stops_within_attention_is_named(axis: str):
    lanes = Lanes(**{axis: 3})
    split_parts = together.split(lanes, 6, timeout_s=0.2)

    def work(lane: int) -> Any:
        if lane == 1:
            return None
        mine = together.drawn(lane, 1, 4, 3, 4)
        return split_parts[lane].around(attention, 2, query_frames=2)(mine, mine, mine)

    results = together.on_each(lanes.num_lanes, work)
    assert isinstance(results[2], TransportError)
    assert str(results[2]).startswith("rank 2: rank 1 sent nothing for 0.2 s") and results[2].peer == 1


def test_the_scheme_says_a_way_back_for_every_cut():
    ways = [(boundary.axis, boundary.before, boundary.after) for boundary in SCHEME.values()]
    for axis, before, after in ways:
        assert (axis, after, before) in ways
    assert {cut for _, before, after in ways for cut in (before, after)} == set(Cut)
    assert set(DIMS) == set(Cut) - {Cut.NOT, Cut.BLOCKS}


@torch.no_grad()
@pytest.mark.parametrize("window", [None, (1, 1, 1)], ids=["dense", "window"])
@pytest.mark.parametrize(
    "lanes", [Lanes(ulysses=3), Lanes(ring=4), Lanes(ring=2, ulysses=2), Lanes(ring=2, ulysses=4)],
    ids=["ulysses", "ring", "usp", "empty"],
)  # fmt: skip
def test_a_models_layers_in_a_context_are_those_of_one_process(lanes: Lanes, window: Any):
    """Also what they lend, which is a part of each frame's; 6 tokens a frame, 3 heads."""
    config = DiTConfig(
        latent_channels=3, width=24, num_layers=2, num_heads=3, ffn_width=40, text_width=7,
        num_frequencies=16, window=window,
    )  # fmt: skip
    torch.manual_seed(0)
    model = DiT(config).eval()
    grid, head = (3, 2, 3), (3, 8)
    conditioning = model.condition(torch.rand(1, 3), torch.randn(1, 5, 7))
    before, after = (
        tuple(KeyValue(*torch.randn(2, 1, frames, 6, *head)) for _ in range(2)) for frames in (2, 1)
    )
    x_BFSD = torch.randn(1, 3, 6, 24)
    wanted, wanted_lent = model.run_layers(x_BFSD, conditioning, grid, Context(before, after))
    split_parts = together.split(lanes, 6)

    @torch.no_grad()
    def work(lane: int) -> Any:
        part = split_parts[lane]

        def here(layers: Any) -> Any:
            return tuple(
                KeyValue(kv.key_BFSHD[:, :, part.tokens], kv.value_BFSHD[:, :, part.tokens]) for kv in layers
            )

        context = Context(here(before), here(after))
        out, lent = model.run_layers(part.cut(x_BFSD), conditioning, grid, context, part=part)
        return part.gather(out), lent

    results = together.on_each(lanes.num_lanes, work)
    for out, _ in together.right(results):
        together.close(out, wanted)
    for layer, kv in enumerate(wanted_lent):
        for name in ("key_BFSHD", "value_BFSHD"):
            found = torch.cat([getattr(lent[layer], name) for _, lent in results], dim=2)
            together.close(found, getattr(kv, name))
