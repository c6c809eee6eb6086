"""Laws of the layouts: what lists, tiles and lengths say is what the mask written out says."""

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vidgen.kernels.attention.layout import BlockLayout, BlockLists, from_block_mask, from_rule

sizes = st.fixed_dictionaries(
    {
        "num_queries": st.integers(1, 23),
        "num_keys": st.integers(1, 29),
        "query_block": st.integers(1, 9),
        "key_block": st.integers(1, 11),
    }
)
seeds = st.integers(0, 1 << 16)
shares = st.sampled_from([0.0, 0.1, 0.5, 0.95, 1.0])


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def of_tokens(tokens_QK: Tensor, size: dict[str, int], **more: Any) -> BlockLayout:
    return from_rule(lambda query, key: tokens_QK[query, key], **size, **more)


def num_blocks(size: dict[str, int]) -> tuple[int, int]:
    rows, columns = -(-size["num_queries"] // size["query_block"]), -(-size["num_keys"] // size["key_block"])
    return rows, columns


@given(seeds, shares, st.integers(1, 7), st.integers(1, 9))
def test_lists_of_a_mask_are_ascending_and_give_it_back(seed: int, share: float, rows: int, columns: int):
    mask = drawn(seed, 2, 3, rows, columns) < share
    lists = BlockLists.of_mask(mask)
    assert torch.equal(lists.mask(columns), mask)
    for count, indices in zip(lists.counts_BHR.flatten(), lists.indices_BHRM.flatten(0, 2), strict=True):
        assert indices[:count].tolist() == sorted(set(indices[:count].tolist()))
        assert not indices[count:].any()


@given(seeds, shares, sizes)
def test_a_rule_becomes_the_mask_that_it_says(seed: int, share: float, size: dict[str, int]):
    tokens = drawn(seed, size["num_queries"], size["num_keys"]) < share
    assert torch.equal(of_tokens(tokens, size).dense_mask()[0, 0], tokens)


@given(seeds, shares, sizes)
def test_blocks_seen_in_part_are_neither_whole_nor_empty_and_equal_tiles_are_kept_once(
    seed: int, share: float, size: dict[str, int]
):
    rows, columns = num_blocks(size)
    coarse = drawn(seed, rows, columns).repeat_interleave(size["query_block"], 0)
    coarse = coarse.repeat_interleave(size["key_block"], 1)[: size["num_queries"], : size["num_keys"]]
    tokens = (coarse < share) ^ (torch.arange(size["num_keys"]) % 7 == 3)
    layout = of_tokens(tokens, size)
    whole = layout.full.mask(columns)[0, 0]
    parts = torch.zeros_like(whole)
    if layout.partial is not None:
        parts = layout.partial.lists.mask(columns)[0, 0]
        tiles = layout.partial.tiles_Nqk.flatten(1)
        assert len(tiles.unique(dim=0)) == len(tiles)
    for row in range(rows):
        queries = slice(row * size["query_block"], (row + 1) * size["query_block"])
        for column in range(columns):
            block = tokens[queries, column * size["key_block"] : (column + 1) * size["key_block"]]
            assert whole[row, column] == block.all()
            assert parts[row, column] == (block.any() and not block.all())


@given(seeds, shares, sizes)
def test_a_rule_is_asked_about_its_candidates_only(seed: int, share: float, size: dict[str, int]):
    candidates = drawn(seed, *num_blocks(size)) < share
    everything = torch.ones(size["num_queries"], size["num_keys"], dtype=torch.bool)
    found = of_tokens(everything, size, candidates_RC=candidates)
    assert torch.equal(found.full.mask(candidates.shape[1])[0, 0], candidates)
    assert found.partial is None


@given(seeds, shares, sizes, st.booleans())
@settings(max_examples=150)
def test_density_is_the_share_of_pairs_of_queries_and_keys_that_are_there(
    seed: int, share: float, size: dict[str, int], has_lengths: bool
):
    layout = of_tokens(drawn(seed, size["num_queries"], size["num_keys"]) < share, size)
    if has_lengths:
        lengths = torch.minimum((drawn(seed, 1, 2, num_blocks(size)[1]) * 12).int(), layout.lengths_BHC)
        lengths[..., 0] = 1
        layout = replace(layout, key_lengths_BHC=lengths, prepared={})
    pairs = layout.dense_mask().sum((-1, -2))
    expected = pairs / (size["num_queries"] * layout.lengths_BHC.sum(-1))
    torch.testing.assert_close(layout.density_BH, expected.expand_as(layout.density_BH))


def test_keys_beyond_the_length_of_their_block_are_seen_by_none():
    size = {"num_queries": 5, "num_keys": 11, "query_block": 2, "key_block": 4}
    plain = from_block_mask(torch.ones(1, 1, 3, 3, dtype=torch.bool), **size)
    assert plain.dense_mask().all() and plain.lengths_BHC.flatten().tolist() == [4, 4, 3]
    cut = replace(plain, key_lengths_BHC=torch.tensor([[[4, 1, 0]]], dtype=torch.int32), prepared={})
    assert cut.dense_mask()[0, 0, 0].nonzero().flatten().tolist() == [0, 1, 2, 3, 4]


def test_work_counts_whole_blocks_and_density_pairs():
    size = {"num_queries": 4, "num_keys": 8, "query_block": 2, "key_block": 2}
    tokens = torch.zeros(4, 8, dtype=torch.bool)
    tokens[0, 0] = tokens[2:, 2:4] = True
    layout = of_tokens(tokens, size)
    assert layout.work == 2 / 8
    assert layout.density_BH.tolist() == [[pytest.approx(5 / 32)]]


@pytest.mark.parametrize(
    ("size", "batch_heads", "says"),
    [
        ({"num_queries": 5}, (2, 3), "5 queries and 9 keys: this layout needs (6, 9)"),
        ({"num_keys": 8}, (2, 3), "6 queries and 8 keys: this layout needs (6, 9)"),
        ({}, (3, 3), "batch 3 with 3 heads: this layout is for batch 2 with 3 heads"),
        ({}, (2, 4), "batch 2 with 4 heads: this layout is for batch 2 with 3 heads"),
    ],
    ids=["queries", "keys", "batch", "heads"],
)
def test_tensors_that_do_not_fit_are_an_error_that_says_what_does(
    size: dict[str, int], batch_heads: tuple[int, int], says: str
):
    mask = torch.ones(2, 3, 2, 3, dtype=torch.bool)
    layout = from_block_mask(mask, num_queries=6, num_keys=9, query_block=3, key_block=3)
    layout.check(2, 3, 6, 9)
    with pytest.raises(ValueError, match=re.escape(says)):
        layout.check(*batch_heads, *{"num_queries": 6, "num_keys": 9, **size}.values())


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"num_keys": 0}, "num_keys=0: need at least 1"),
        ({"query_block": -1}, "query_block=-1: need at least 1"),
        ({"num_queries": 12}, "lists for 2 rows"),
        ({"num_keys": 12}, "a mask of 3 key blocks"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_sizes_that_a_mask_does_not_have_are_an_error(wrong: dict[str, int], says: str):
    size = {"num_queries": 6, "num_keys": 9, "query_block": 3, "key_block": 3, **wrong}
    with pytest.raises(ValueError, match=says):
        from_block_mask(torch.ones(1, 1, 2, 3, dtype=torch.bool), **size)
