"""Laws of the cut: every layer on one rank, and the slowest rank as fast as any cut could make it."""

from collections.abc import Iterator, Sequence
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vidgen.parallel.topology import Topology, balanced, by_hand, check_num_ranks

# eighths: sums and squares of so few bits are exact, so that costs can be compared for equality
COSTS = st.integers(0, 40).map(lambda eighths: eighths / 8)
LAYER_COSTS = st.integers(1, 24).map(lambda eighths: eighths / 8)
SIZES = st.integers(1, 9).flatmap(lambda layers: st.tuples(st.just(layers), st.integers(1, layers)))


def compositions(num_layers: int, num_ranks: int) -> Iterator[tuple[int, ...]]:
    """Every way to give all layers, in order, to ranks of at least one layer."""
    for inner in combinations(range(1, num_layers), num_ranks - 1):
        ends = (0, *inner, num_layers)
        yield tuple(stop - start for start, stop in zip(ends, ends[1:], strict=False))


def rank_costs(cut: Sequence[int], layer: float, first: float, last: float) -> list[float]:
    costs = [count * layer for count in cut]
    costs[0] += first
    costs[-1] += last
    return costs


def slowest_and_squares(cut: Sequence[int], layer: float, first: float, last: float) -> tuple[float, float]:
    costs = rank_costs(cut, layer, first, last)
    return max(costs), sum(cost**2 for cost in costs)


@given(SIZES, LAYER_COSTS, COSTS, COSTS)
def test_no_cut_has_a_faster_slowest_rank_nor_among_equals_a_more_even_load(
    sizes: tuple[int, int], layer: float, first: float, last: float
):
    found = balanced(*sizes, layer=layer, first=first, last=last).layers_per_stage
    best = min(slowest_and_squares(cut, layer, first, last) for cut in compositions(*sizes))
    assert slowest_and_squares(found, layer, first, last) == best


@given(SIZES, LAYER_COSTS, COSTS, COSTS)
def test_every_layer_is_used_once_in_order_and_every_stage_has_one(
    sizes: tuple[int, int], layer: float, first: float, last: float
):
    num_layers, num_ranks = sizes
    topology = balanced(num_layers, num_ranks, layer=layer, first=first, last=last)
    stages = topology.stages()
    assert [index for stage in stages for index in stage.layers] == list(range(num_layers))
    assert all(len(stage.layers) >= 1 for stage in stages)
    assert topology.num_stages == num_ranks == len(stages)
    assert topology.num_layers == num_layers
    assert [stage.index for stage in stages] == list(range(num_ranks))
    assert {stage.num_stages for stage in stages} == {num_ranks}
    assert [stage.is_first for stage in stages] == [True] + [False] * (num_ranks - 1)
    assert [stage.is_last for stage in stages] == [False] * (num_ranks - 1) + [True]


@pytest.mark.parametrize(("num_layers", "num_ranks"), [(1, 1), (30, 4), (30, 8), (40, 7), (40, 40)])
def test_without_extra_costs_stages_differ_by_one_layer_at_most(num_layers: int, num_ranks: int):
    cut = balanced(num_layers, num_ranks).layers_per_stage
    assert max(cut) - min(cut) <= 1


@given(SIZES, LAYER_COSTS, st.integers(0, 4), st.integers(0, 4), st.booleans())
def test_an_end_that_costs_more_than_m_layers_extra_has_m_layers_fewer(
    sizes: tuple[int, int], layer: float, first: int, last: int, over: bool
):
    num_layers, num_ranks = sizes
    more = layer / 2 if over else 0.0  # exactly so many layers' cost, or some more
    cut = balanced(
        num_layers, num_ranks, layer=layer, first=first * layer + more, last=last * layer + more
    ).layers_per_stage
    for end, extra in (cut[0], first), (cut[-1], last):
        for middle in cut[1:-1]:
            assert end == 1 or end <= middle - extra + (0 if over else 1)


def test_embedding_as_dear_as_two_layers_leaves_the_first_stage_two_layers_fewer():
    assert balanced(10, 3, first=2.0).layers_per_stage == (2, 4, 4)
    assert balanced(10, 3, last=2.0).layers_per_stage == (4, 4, 2)
    assert balanced(10, 3, first=2.0, last=3.0).layers_per_stage == (3, 5, 2)
    assert sorted(balanced(6, 3, first=50.0).layers_per_stage[1:]) == [2, 3]


@given(st.lists(st.integers(1, 5), min_size=1, max_size=6))
def test_a_cut_by_hand_is_taken_as_it_is(cut: list[int]):
    assert by_hand(cut, sum(cut)) == Topology(tuple(cut))


@pytest.mark.parametrize(
    "cut", [[], [0], [6, 0], [0, 6], [7, -1], [3, 2], [3, 4], [5]], ids=lambda cut: str(cut).replace(" ", "")
)
def test_a_cut_by_hand_that_leaves_out_or_repeats_layers_is_refused_in_one_line(cut: list[int]):
    with pytest.raises(ValueError) as caught:
        by_hand(cut, 6)
    message = str(caught.value)
    assert "\n" not in message
    assert f"layers_per_rank={cut}" in message
    assert "above 0" in message and "6 layers" in message


@pytest.mark.parametrize("num_ranks", [-1, 0, 7, 1000])
def test_ranks_without_a_layer_are_refused_in_one_line_that_names_the_limits(num_ranks: int):
    for refuse in (check_num_ranks, lambda ranks, layers: balanced(layers, ranks)):
        with pytest.raises(ValueError) as caught:
            refuse(num_ranks, 6)
        message = str(caught.value)
        assert "\n" not in message
        assert f"ranks={num_ranks}:" in message
        assert "6 layers" in message and "1 to 6" in message


@pytest.mark.parametrize("num_ranks", [1, 2, 6])
def test_any_number_of_ranks_up_to_the_number_of_layers_is_allowed(num_ranks: int):
    check_num_ranks(num_ranks, 6)
    assert balanced(6, num_ranks).num_stages == num_ranks
