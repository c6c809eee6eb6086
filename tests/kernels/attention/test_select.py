"""Laws of layouts from scores, and of layouts from two others."""

import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vidgen.kernels.attention.layout import BlockLayout, from_block_mask, from_rule
from vidgen.kernels.attention.select import intersection, recall, top_k, top_p, union
from vidgen.kernels.attention.windows import dense, sliding_window_3d

SIZES: dict[str, Any] = {
    "num_queries": 37,
    "num_keys": 50,
    "query_block": 8,
    "key_block": 6,
}  # 5 rows, 9 key blocks
ROWS, COLUMNS = 5, 9

seeds = st.integers(0, 1 << 16)
masses = st.builds(
    # of few different values, so that there are ties, or of all kinds
    lambda seed, coarse: (
        drawn(seed, 2, 3, ROWS, COLUMNS).mul(4).floor() / 4 + 0.01
        if coarse
        else drawn(seed, 2, 3, ROWS, COLUMNS) ** 4
    ),
    seeds,
    st.booleans(),
)
always_blocks = st.builds(
    lambda seed, share: drawn(seed, ROWS, COLUMNS) < share, seeds, st.sampled_from([0, 0.2, 0.6])
)


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def best(mass_BHRC: Tensor, always_RC: Tensor, row: tuple[int, int, int]) -> list[int]:
    """Blocks of a row, those first that are always in, then by mass, then by number."""
    values, always = mass_BHRC[row].tolist(), always_RC[row[2]].tolist()
    return sorted(
        range(COLUMNS), key=lambda block: (not always[block], not always[block] and -values[block], block)
    )


def seen(layout: BlockLayout, row: tuple[int, int, int]) -> list[int]:
    return layout.block_mask()[row].nonzero().flatten().tolist()


ALL_ROWS = [(b, h, r) for b in range(2) for h in range(3) for r in range(ROWS)]


@given(masses, st.integers(1, COLUMNS), always_blocks)
@settings(max_examples=50)
def test_top_k_is_the_k_blocks_of_most_mass_in_every_row(mass: Tensor, k: int, always: Tensor):
    layout = top_k(mass, k, **SIZES, always_RC=always)
    for row in ALL_ROWS:
        count = max(k, int(always[row[2]].sum()))
        assert seen(layout, row) == sorted(best(mass, always, row)[:count])
    assert layout.may_see_more and layout.partial is None


@given(masses, st.integers(1, COLUMNS))
@settings(max_examples=30)
def test_top_k_sees_as_many_blocks_in_every_row(mass: Tensor, k: int):
    assert (top_k(mass, k, **SIZES).full.counts_BHR == k).all()


@given(masses, seeds, st.booleans())
@settings(max_examples=30)
def test_heads_may_have_different_k(mass: Tensor, seed: int, of_batch: bool):
    shape = (2, 3) if of_batch else (3,)
    k = torch.randint(1, COLUMNS + 1, shape, generator=torch.Generator().manual_seed(seed))
    layout = top_k(mass, k, **SIZES)
    assert layout.full.indices_BHRM.shape[-1] == k.max()
    for (batch, head), count in zip(
        [(b, h) for b in range(2) for h in range(3)], k.expand(2, 3).flatten().tolist(), strict=True
    ):
        one = top_k(mass[batch : batch + 1, head : head + 1], count, **SIZES)
        assert torch.equal(layout.block_mask()[batch, head], one.block_mask()[0, 0])


@given(masses, st.sampled_from([0.01, 0.3, 0.5, 0.9, 0.999, 1.0]), st.integers(1, 3), always_blocks)
@settings(max_examples=60)
def test_top_p_reaches_p_and_with_one_block_less_does_not(
    mass: Tensor, p: float, at_least: int, always: Tensor
):
    layout = top_p(mass, p, **SIZES, at_least=at_least, always_RC=always)
    for row in ALL_ROWS:
        order = best(mass, always, row)
        count = len(seen(layout, row))
        assert seen(layout, row) == sorted(order[:count])
        values = mass[row].double()
        assert values[order[:count]].sum() >= p * values.sum() * (1 - 1e-12)
        if count > max(at_least, int(always[row[2]].sum())):
            assert values[order[: count - 1]].sum() < p * values.sum()
        assert count >= at_least
    assert layout.may_see_more


@given(masses)
@settings(max_examples=30)
def test_all_blocks_are_dense_and_keep_everything(mass: Tensor):
    for layout in (top_k(mass, COLUMNS, **SIZES), top_p(mass + 0.1, 1.0, **SIZES)):
        assert layout.dense_mask().all()
        torch.testing.assert_close(layout.density_BH, torch.ones(2, 3))
        torch.testing.assert_close(recall(mass, layout), torch.ones(2, 3))


@given(masses)
@settings(max_examples=30)
def test_recall_grows_with_k_and_none_of_as_many_blocks_keeps_more(mass: Tensor):
    kept = torch.stack([recall(mass, top_k(mass, k, **SIZES)) for k in range(1, COLUMNS + 1)])
    assert (kept.diff(dim=0) > 0).all()
    others = top_k(drawn(0, *mass.shape), 3, **SIZES)
    assert (recall(mass, others) <= kept[2] + 1e-6).all()


def test_recall_of_blocks_seen_in_part_is_their_share_of_pairs():
    layout = from_rule(lambda query, key: key < 3, num_queries=8, num_keys=12, query_block=8, key_block=6)
    assert recall(torch.tensor([[[[4.0, 4.0]]]]), layout).item() == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("select", "says"),
    [
        (lambda mass: top_k(mass, 0, **SIZES), "k=0: need 1 to 9"),
        (lambda mass: top_k(mass, 10, **SIZES), "k=10: need 1 to 9"),
        (lambda mass: top_k(mass, torch.tensor([1, 2, 11]), **SIZES), "need 1 to 9"),
        (lambda mass: top_k(mass, torch.tensor([0.5, 1, 1]), **SIZES), "need 1 to 9"),
        (lambda mass: top_p(mass, 0.0, **SIZES), "p=0.0"),
        (lambda mass: top_p(mass, 1.1, **SIZES), "p=1.1"),
        (lambda mass: top_p(mass, 0.5, at_least=0, **SIZES), "at_least=0"),
        (lambda mass: top_k(mass, 1, **{**SIZES, "num_keys": 60}), "mass of 9 key blocks"),
        (lambda mass: top_k(mass, 1, **{**SIZES, "num_queries": 60}), "lists for 5 rows"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_is_an_error_that_says_what_can(select: Any, says: str):
    with pytest.raises(ValueError, match=re.escape(says)):
        select(drawn(0, 2, 3, ROWS, COLUMNS))


@st.composite
def pairs_of_layouts(draw: st.DrawFn) -> tuple[BlockLayout, BlockLayout]:
    size: dict[str, Any] = {
        "num_queries": draw(st.integers(1, 20)),
        "num_keys": draw(st.integers(1, 20)),
        "query_block": draw(st.integers(1, 7)),
        "key_block": draw(st.integers(1, 7)),
    }

    def one() -> BlockLayout:
        kind, seed = draw(st.sampled_from(["blocks", "heads", "batch", "tokens", "stripes"])), draw(seeds)
        rows, columns = (
            -(-size["num_queries"] // size["query_block"]),
            -(-size["num_keys"] // size["key_block"]),
        )
        if kind in ("blocks", "heads", "batch"):
            leading = {"blocks": (1, 1), "heads": (1, 3), "batch": (2, 1)}[kind]
            return from_block_mask(drawn(seed, *leading, rows, columns) < 0.5, **size)
        if kind == "stripes":
            return from_rule(lambda query, key: (query + seed % 3 - key) % 3 > 0, **size)
        tokens = drawn(seed, size["num_queries"], size["num_keys"]) < draw(st.sampled_from([0.1, 0.5, 0.9]))
        return from_rule(lambda query, key: tokens[query, key], **size)

    return one(), one()


def assert_is(layout: BlockLayout, mask: Tensor) -> None:
    """That it sees just this, and no block in part that it sees whole or not at all."""
    assert torch.equal(layout.dense_mask(), mask)
    again = [
        [
            from_rule(
                lambda query, key, tokens=tokens: tokens[query, key],
                num_queries=layout.num_queries,
                num_keys=layout.num_keys,
                query_block=layout.query_block,
                key_block=layout.key_block,
            )
            for tokens in heads
        ]
        for heads in mask
    ]
    whole = torch.stack(
        [torch.cat([one.full.mask(one.num_key_blocks)[0] for one in heads]) for heads in again]
    )
    assert torch.equal(layout.full.mask(layout.num_key_blocks), whole)


@given(pairs_of_layouts())
def test_a_union_sees_what_either_sees(pair: tuple[BlockLayout, BlockLayout]):
    a, b = pair
    assert_is(union(a, b), a.dense_mask() | b.dense_mask())


@given(pairs_of_layouts())
def test_an_intersection_sees_what_both_see(pair: tuple[BlockLayout, BlockLayout]):
    a, b = pair
    assert_is(intersection(a, b), a.dense_mask() & b.dense_mask())


@given(pairs_of_layouts())
@settings(max_examples=30)
def test_with_itself_with_everything_and_with_nothing(pair: tuple[BlockLayout, BlockLayout]):
    a, _ = pair
    sizes = (a.num_queries, a.num_keys, a.query_block, a.key_block)
    everything = dense(*sizes)
    nothing = from_block_mask(
        torch.zeros_like(everything.block_mask()), num_queries=sizes[0], num_keys=sizes[1],
        query_block=sizes[2], key_block=sizes[3],
    )  # fmt: skip
    for same in (union(a, a), intersection(a, a), union(a, nothing), intersection(a, everything)):
        assert torch.equal(same.dense_mask(), a.dense_mask())
    assert union(a, everything).dense_mask().all() and union(a, everything).partial is None
    assert not intersection(a, nothing).block_mask().any()


def test_equal_tiles_of_a_union_are_kept_once():
    narrow = sliding_window_3d(grid=(5, 4, 4), radius=(1, 1, 1))
    wide = sliding_window_3d(grid=(5, 4, 4), radius=(0, 2, 2))
    partial = union(narrow, wide).partial
    assert partial is not None and len(partial.tiles_Nqk) == 2


def test_a_union_may_see_more_only_if_both_may():
    size = {"num_queries": 4, "num_keys": 4, "query_block": 2, "key_block": 2}
    strict, choice = (
        from_block_mask(torch.eye(2).bool().view(1, 1, 2, 2), **size, may_see_more=may)
        for may in (False, True)
    )
    assert not union(strict, choice).may_see_more and not intersection(choice, strict).may_see_more
    assert union(choice, choice).may_see_more


def test_layouts_of_different_sizes_or_lengths_are_an_error():
    with pytest.raises(ValueError, match="need equal ones"):
        union(dense(8, 8, 4, 4), dense(8, 8, 4, 2))
    mask = torch.ones(1, 1, 2, 2, dtype=torch.bool)
    size = {"num_queries": 8, "num_keys": 8, "query_block": 4, "key_block": 4}
    cut = from_block_mask(mask, **size, key_lengths_BHC=torch.tensor([[[4, 1]]], dtype=torch.int32))
    with pytest.raises(ValueError, match="key_lengths_BHC of both layouts differ"):
        union(dense(8, 8, 4, 4), cut)
    assert torch.equal(union(cut, cut).dense_mask(), cut.dense_mask())
