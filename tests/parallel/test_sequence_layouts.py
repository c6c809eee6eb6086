"""Laws of layouts on the sequence axis: a layout is cut along with its queries, keys and heads."""

import importlib.util
from pathlib import Path
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vidgen.kernels.attention.api import attention
from vidgen.kernels.attention.layout import BlockLayout
from vidgen.kernels.attention.reference import attention_reference
from vidgen.kernels.attention.select import top_k
from vidgen.kernels.attention.windows import dense, sliding_window_3d
from vidgen.parallel.topology import Lanes


def _load() -> Any:
    spec = importlib.util.spec_from_file_location("together", Path(__file__).with_name("together.py"))
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


together = _load()


few, blocks = st.integers(0, 2), st.integers(1, 7)


@given(together.sizes, together.lane_counts, few, blocks, blocks, few)
@settings(max_examples=80)
def test_under_a_window_all_are_attention_of_one_process(
    size: dict[str, int], lanes: tuple[int, int], near: int, query_block: int, key_block: int, before: int
):
    case = together.tensors(size)
    rows = next(rows for rows in (3, 2, 1) if not size["tokens"] % rows)
    layout = sliding_window_3d(
        grid=(size["frames"], rows, size["tokens"] // rows), radius=(near, 1, 1),
        key_frames=size["frames"] + size["more"], frame_offset=min(before, size["more"]),
        query_block=query_block, key_block=key_block,
    )  # fmt: skip
    found = together.attended(
        Lanes(ring=lanes[0], ulysses=lanes[1]), *case, lambda q, k, v: attention(q, k, v, layout=layout),
        layout=layout,
    )  # fmt: skip
    together.close(found, together.whole(*case, layout))


def chosen(size: dict[str, int], query_block: int, key_block: int) -> BlockLayout:
    """The blocks of most mass for each head, where heads differ in how many."""
    num_queries = size["frames"] * size["tokens"]
    num_keys = (size["frames"] + size["more"]) * size["tokens"]
    rows, columns = -(-num_queries // query_block), -(-num_keys // key_block)
    mass = together.drawn(size["seed"] + 3, size["batch"], size["heads"], rows, columns).exp()
    counts = torch.arange(size["heads"]) % columns + 1
    return top_k(
        mass, counts, num_queries=num_queries, num_keys=num_keys, query_block=query_block, key_block=key_block
    )


@given(together.sizes, together.lane_counts, blocks, blocks)
@settings(max_examples=80)
def test_under_a_layout_of_each_head_all_are_attention_of_one_process(
    size: dict[str, int], lanes: tuple[int, int], query_block: int, key_block: int
):
    case, layout = together.tensors(size), chosen(size, query_block, key_block)
    found = together.attended(Lanes(ring=lanes[0], ulysses=lanes[1]), *case, layout=layout)
    together.close(found, together.whole(*case, layout))


def test_a_query_that_sees_no_key_has_zeros_also_from_a_ring():
    case = together.drawn_case(1, 2, 6, 2, 4)
    layout = dense(12, 12, 3, 5)
    counts = layout.full.counts_BHR.clone()
    counts[..., 1] = 0
    layout.full.counts_BHR.copy_(counts)
    found = together.attended(Lanes(ring=3), *case, layout=layout)
    flat = [tensor.flatten(1, 2) for tensor in case]
    exact, _ = attention_reference(flat[0], flat[1], flat[2], layout)
    together.close(found.flatten(1, 2), exact)
    assert not found.flatten(1, 2)[:, 3:6].any()


def test_adaptive_sparsity_gets_whole_frames_of_the_heads_at_hand_in_order():
    case = together.drawn_case(1, 2, 5, 3, 4)

    def policy(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        assert query.shape[1] == 10 and query.shape[2] in (1, 2)
        return query + torch.arange(10.0).view(1, 10, 1, 1)

    found = together.attended(Lanes(ulysses=2), *case, policy, is_plain=False, layout=chosen(
        {"batch": 1, "frames": 2, "more": 0, "tokens": 5, "heads": 3, "seed": 0}, 5, 5
    ))  # fmt: skip
    assert torch.equal(found, case[0] + torch.arange(10.0).view(1, 2, 5, 1, 1))
