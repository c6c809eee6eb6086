"""Laws of conversions: what other libraries are told is what the layout says, and comes back as it was."""

import re
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, create_mask

from vidgen.kernels.attention.convert import (
    from_block_mask_of_flex,
    from_flash4,
    mask_mod_of,
    need_window_1d,
    to_block_mask,
    to_flash4,
    window_1d,
)
from vidgen.kernels.attention.layout import BlockLayout, from_block_mask, from_rule
from vidgen.kernels.attention.tiles import sliding_tile
from vidgen.kernels.attention.windows import dense, sliding_window_3d

SIZES: dict[str, Any] = {"num_queries": 21, "num_keys": 30, "query_block": 8, "key_block": 7}


def per_head(seed: int = 0) -> BlockLayout:
    mask = torch.rand(2, 3, 3, 5, generator=torch.Generator().manual_seed(seed)) < 0.4
    mask[0, 0, 1] = False  # a row that sees nothing
    return from_block_mask(mask, **SIZES)


def with_lengths(layout: BlockLayout) -> BlockLayout:
    lengths = torch.tensor([[[7, 3, 0, 7, 1]], [[1, 7, 7, 0, 2]]], dtype=torch.int32)
    return replace(layout, key_lengths_BHC=lengths, prepared={})


def in_part() -> BlockLayout:
    return from_rule(lambda query, key: (query - key).abs() % 9 < 4, **SIZES)


LAYOUTS: dict[str, Callable[[], BlockLayout]] = {
    "dense": lambda: dense(21, 30, 8, 7),
    "per head": per_head,
    "in part": in_part,
    "lengths": lambda: with_lengths(per_head()),
    "lengths, in part": lambda: with_lengths(in_part()),
    "window": lambda: sliding_window_3d(grid=(3, 3, 5), radius=(1, 1, 2), key_frames=5, frame_offset=1),
    "ragged tiles": lambda: sliding_tile(grid=(3, 5, 4), tile=(2, 2, 3), window=(1, 3, 1)),
}
every_layout = pytest.mark.parametrize("make", LAYOUTS.values(), ids=LAYOUTS)


def batch_heads(layout: BlockLayout) -> tuple[int, int]:
    batch, heads = layout.dense_mask().shape[:2]
    return batch, heads


@every_layout
def test_the_mask_mod_says_of_every_pair_what_the_layout_does(make: Callable[[], BlockLayout]):
    layout = make()
    found = create_mask(
        mask_mod_of(layout), *batch_heads(layout), layout.num_queries, layout.num_keys, device="cpu"
    )
    assert torch.equal(found, layout.dense_mask())


@every_layout
@pytest.mark.parametrize("backward", [True, False], ids=["backward", "forward only"])
def test_a_block_mask_of_flex_comes_back_as_it_was(make: Callable[[], BlockLayout], backward: bool):
    layout = make()
    block_mask = to_block_mask(layout, "cpu", backward=backward)
    assert block_mask.seq_lengths == (layout.num_queries, layout.num_keys)
    assert block_mask.BLOCK_SIZE == (layout.query_block, layout.key_block)
    assert torch.equal(from_block_mask_of_flex(block_mask).dense_mask(), layout.dense_mask())


@every_layout
def test_lists_of_flash_attention_come_back_as_they_were(make: Callable[[], BlockLayout]):
    layout = make()
    sizes = {name: getattr(layout, name) for name in SIZES}
    found = from_flash4(to_flash4(layout), mask_mod_of(layout), **sizes)
    assert torch.equal(found.dense_mask(), layout.dense_mask())


@every_layout
def test_lists_of_flash_attention_are_of_one_shape_and_as_wide_as_there_are_blocks(
    make: Callable[[], BlockLayout],
):
    layout = make()
    blocks = to_flash4(layout)
    shape = (*batch_heads(layout), layout.num_rows)
    for counts, indices in (blocks[:2], blocks[2:]):
        assert counts.shape == shape and indices.shape == (*shape, layout.num_key_blocks)
        assert counts.dtype == indices.dtype == torch.int32
        assert counts.is_contiguous() and indices.is_contiguous()


def test_a_whole_block_without_all_its_keys_is_one_in_part_but_for_the_last():
    """Kernels know the number of keys, but no lengths of blocks; a block without any key is in no list."""
    mask = torch.ones(1, 1, 1, 4, dtype=torch.bool)
    layout = from_block_mask(
        mask, num_queries=4, num_keys=14, query_block=4, key_block=4,
        key_lengths_BHC=torch.tensor([[[4, 3, 0, 2]]], dtype=torch.int32),
    )  # fmt: skip
    blocks = to_flash4(layout)
    assert blocks.full_block_idx[0, 0, 0, : blocks.full_block_cnt.item()].tolist() == [0, 3]
    assert blocks.mask_block_idx[0, 0, 0, : blocks.mask_block_cnt.item()].tolist() == [1]


@pytest.mark.parametrize("num_queries", [32, 29], ids=["even", "ragged"])
def test_a_mask_that_flex_made_is_understood(num_queries: int):
    def near(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query - key).abs() <= 5 + 3 * head

    block_mask = create_block_mask(near, 1, 2, num_queries, 40, device="cpu", BLOCK_SIZE=(8, 4))
    mask = create_mask(near, 1, 2, num_queries, 40, device="cpu")
    assert torch.equal(from_block_mask_of_flex(block_mask).dense_mask(), mask)


def test_the_number_of_tiles_is_a_power_of_two_in_the_mask_mod():
    """A compiled kernel is for one shape of them."""
    layout = in_part()
    assert layout.partial is not None and len(layout.partial.tiles_Nqk) not in (2, 6, 14, 30)
    held = [cell.cell_contents for cell in mask_mod_of(layout).__closure__ or ()]
    sizes = [len(tensor) for tensor in held if isinstance(tensor, Tensor) and tensor.dtype == torch.bool]
    assert len(sizes) == 1 and sizes[0] & (sizes[0] - 1) == 0


def test_log_weights_are_an_error_where_lists_cannot_say_them():
    layout = replace(dense(21, 30, 8, 7), key_log_weights_BHC=torch.zeros(1, 1, 5), prepared={})
    for convert in (to_flash4, lambda layout: to_block_mask(layout, "cpu")):
        with pytest.raises(ValueError, match="log-weights"):
            convert(layout)


def test_partial_lists_without_a_mask_mod_are_an_error():
    with pytest.raises(ValueError, match="mask_mod"):
        from_flash4(to_flash4(in_part()), **SIZES)


def windowed(num_queries: int, num_keys: int, left: int, right: int, blocks: tuple[int, int]) -> BlockLayout:
    """As flash-attn defines it, -1 for no limit."""

    def sees(query: Tensor, key: Tensor) -> Tensor:
        ahead = key - (query + num_keys - num_queries)
        return ((ahead >= -left) | (left < 0)) & ((ahead <= right) | (right < 0))

    return from_rule(
        sees, num_queries=num_queries, num_keys=num_keys, query_block=blocks[0], key_block=blocks[1]
    )


@given(
    st.integers(1, 24), st.integers(1, 24), st.integers(-1, 26), st.integers(-1, 26),
    st.tuples(st.integers(1, 9), st.integers(1, 9)),
)  # fmt: skip
def test_a_window_is_found_whose_mask_is_the_same(
    num_queries: int, num_keys: int, left: int, right: int, blocks: tuple[int, int]
):
    layout = windowed(num_queries, num_keys, left, right, blocks)
    found = window_1d(layout)
    assert found is not None
    assert torch.equal(windowed(num_queries, num_keys, *found, blocks).dense_mask(), layout.dense_mask())


@pytest.mark.parametrize(("left", "right"), list(product([-1, 0, 2, 5], repeat=2)), ids=str)
def test_the_window_found_is_the_one_that_was_made(left: int, right: int):
    assert window_1d(windowed(20, 20, left, right, (7, 6))) == (left, right)


@given(st.integers(0, 1 << 16), st.integers(1, 9), st.integers(1, 9))
def test_what_is_found_in_any_layout_has_its_mask(seed: int, query_block: int, key_block: int):
    """One token more or less than a window is none, unless it is another window."""
    generator = torch.Generator().manual_seed(seed)
    size, left, right = torch.randint(1, 9, (3,), generator=generator).tolist()
    mask = windowed(size, size, left, right, (1, 1)).dense_mask()[0, 0].clone()
    query, key = torch.randint(size, (2,), generator=generator).tolist()
    mask[query, key] ^= True
    layout = from_rule(
        lambda query, key: mask[query, key], num_queries=size, num_keys=size, query_block=query_block,
        key_block=key_block,
    )  # fmt: skip
    found = window_1d(layout)
    if found is not None:
        assert torch.equal(windowed(size, size, *found, (1, 1)).dense_mask()[0, 0], mask)


def test_dense_is_a_window_without_limits_and_so_is_no_layout():
    assert window_1d(dense(21, 30, 8, 7)) == (-1, -1)
    assert need_window_1d(None, "flash") == (-1, -1)


@pytest.mark.parametrize(
    "make",
    [
        per_head,
        lambda: with_lengths(dense(21, 30, 8, 7)),
        lambda: replace(dense(21, 30, 8, 7), key_log_weights_BHC=torch.zeros(1, 1, 5), prepared={}),
        lambda: sliding_window_3d(grid=(3, 3, 5), radius=(1, 1, 2)),
        lambda: from_block_mask(torch.zeros(1, 1, 3, 5, dtype=torch.bool), **SIZES),
        # a window, but aligned at the first key, not at the last
        lambda: from_rule(lambda query, key: (query - key).abs() <= 2, **SIZES),
    ],
    ids=["blocks", "lengths", "weights", "3-D", "nothing", "aligned at the start"],
)
def test_what_is_no_window_is_an_error_that_names_who_does_blocks(make: Callable[[], BlockLayout]):
    layout = make()
    assert window_1d(layout) is None
    says = "backend=flash: does one-dimensional windows, which this layout is not; block layouts are done by"
    with pytest.raises(ValueError, match=re.escape(says)):
        need_window_1d(layout, "flash")


def test_heads_with_different_windows_are_no_window():
    heads = [windowed(16, 16, width, 1, (4, 4)) for width in (3, 7)]
    mask = torch.cat([head.block_mask() for head in heads], 1)
    assert window_1d(from_block_mask(mask, num_queries=16, num_keys=16, query_block=4, key_block=4)) is None
