"""Laws of parts of layouts: they say of their queries, keys and heads what the whole one says."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from vidgen.kernels.attention.api import attention
from vidgen.kernels.attention.cut import cut, heads, tokens_of
from vidgen.kernels.attention.layout import BlockLayout, from_block_mask, from_rule
from vidgen.kernels.attention.merge import merge
from vidgen.kernels.attention.reference import attention_reference
from vidgen.kernels.attention.select import intersection

SIZES = ("num_queries", "num_keys", "query_block", "key_block")
layouts = st.builds(
    lambda seed, share, *sizes, **more: drawn_layout(seed, share, named(*sizes), **more),
    st.integers(0, 1 << 16), st.sampled_from([0.0, 0.2, 0.7, 1.0]),
    st.integers(1, 23), st.integers(1, 29), st.integers(1, 9), st.integers(1, 11),
    has_lengths=st.booleans(), has_weights=st.booleans(), per_head=st.booleans(),
)  # fmt: skip


def named(*sizes: int) -> dict[str, Any]:
    return dict(zip(SIZES, sizes, strict=True))


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def drawn_layout(
    seed: int, share: float, size: dict[str, Any], *, has_lengths: bool, has_weights: bool, per_head: bool
) -> BlockLayout:
    """Blocks seen whole, in part and not at all, for a batch of 2 and 3 heads."""
    rows, columns = -(-size["num_queries"] // size["query_block"]), -(-size["num_keys"] // size["key_block"])
    tokens_QK = drawn(seed, size["num_queries"], size["num_keys"]) < max(share, 0.3)
    tokens_QK |= drawn(seed + 1, rows, columns).repeat_interleave(size["query_block"], 0).repeat_interleave(
        size["key_block"], 1
    )[: size["num_queries"], : size["num_keys"]] < share  # fmt: skip
    layout = from_rule(lambda query, key: tokens_QK[query, key], **size)
    if per_head:
        layout = intersection(layout, from_block_mask(drawn(seed + 2, 2, 3, rows, columns) < 0.7, **size))
    if has_lengths:
        lengths = torch.minimum((drawn(seed + 3, 1, 3, columns) * 12).int(), layout.lengths_BHC)
        layout = replace(layout, key_lengths_BHC=lengths, prepared={})
    if has_weights:
        layout = replace(layout, key_log_weights_BHC=drawn(seed + 4, 2, 1, columns), prepared={})
    return layout


def some_of(total: int, start: float, stop: float) -> range:
    """A run of at least one."""
    first = min(int(start * total), total - 1)
    return range(first, max(first + 1, round(stop * total)))


shares = st.floats(0, 1)


@given(layouts, shares, shares, shares, shares)
def test_a_cut_layout_is_the_mask_cut(layout: BlockLayout, a: float, b: float, c: float, d: float):
    rows, blocks = some_of(layout.num_rows, a, b), some_of(layout.num_key_blocks, c, d)
    queries = tokens_of(rows, layout.query_block, layout.num_queries)
    keys = tokens_of(blocks, layout.key_block, layout.num_keys)
    part = cut(layout, rows, blocks)
    mask = layout.dense_mask()[..., queries.start : queries.stop, keys.start : keys.stop]
    assert torch.equal(part.dense_mask().expand_as(mask), mask)
    assert torch.equal(part.lengths_BHC, layout.lengths_BHC[..., blocks.start : blocks.stop])
    lists = [part.full] if part.partial is None else [part.full, part.partial.lists]
    for each in lists:
        assert torch.equal(each.mask(part.num_key_blocks).sum(-1, dtype=torch.int32), each.counts_BHR)
        is_listed = torch.arange(each.indices_BHRM.shape[-1]) < each.counts_BHR.unsqueeze(-1)
        assert not each.indices_BHRM[~is_listed].any()
    assert cut(layout, rows, blocks) is part


@given(layouts, st.integers(0, 2), st.integers(1, 3))
def test_the_layout_of_some_heads_is_the_mask_of_these(layout: BlockLayout, first: int, count: int):
    of = range(first, min(first + count, 3))
    part, mask = heads(layout, of), layout.dense_mask().expand(-1, 3, -1, -1)
    assert torch.equal(part.dense_mask().expand(-1, len(of), -1, -1), mask[:, of.start : of.stop])
    part.check(2, len(of), layout.num_queries, layout.num_keys)
    is_alike = layout.dense_mask().shape[1] == 1 and layout.key_lengths_BHC is None
    assert (part is layout) == is_alike and heads(layout, of) is part


@given(layouts, st.integers(1, 4), st.integers(0, 1 << 16))
def test_attention_is_that_of_its_cuts_merged(layout: BlockLayout, num_cuts: int, seed: int):
    query, key, value = (
        drawn(seed + number, 2, length, 3, 4) - 0.5
        for number, length in enumerate((layout.num_queries, layout.num_keys, layout.num_keys))
    )
    bounds = [layout.num_key_blocks * number // num_cuts for number in range(num_cuts + 1)]
    parts = []
    for start, stop in zip(bounds, bounds[1:], strict=False):
        if start < stop:
            keys = tokens_of(range(start, stop), layout.key_block, layout.num_keys)
            here = slice(keys.start, keys.stop)
            part = cut(layout, range(layout.num_rows), range(start, stop))
            parts.append(attention(query, key[:, here], value[:, here], layout=part, return_lse=True))
    out, lse = merge(parts)
    exact, exact_lse = attention_reference(query, key, value, layout)
    torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("rows", "blocks", "says"),
    [
        (range(0), range(2), "rows=range(0, 0): need at least one of the 3 there are"),
        (range(1, 4), range(2), "rows=range(1, 4): need at least one of the 3"),
        (range(3), range(2, 2), "key_blocks=range(2, 2): need at least one of the 2"),
        (range(0, 3, 2), range(2), "consecutive"),
    ],
    ids=["no rows", "too many", "no keys", "gaps"],
)
def test_what_is_not_there_cannot_be_cut_out(rows: range, blocks: range, says: str):
    mask = torch.ones(1, 1, 3, 2, dtype=torch.bool)
    layout = from_block_mask(mask, num_queries=6, num_keys=7, query_block=2, key_block=4)
    with pytest.raises(ValueError) as caught:
        cut(layout, rows, blocks)
    assert says in str(caught.value)
