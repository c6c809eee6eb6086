"""Every backend agrees with the reference on every kind of layout, type and size, or says why it cannot.

The rule is flash-attention's: the error against fp64 is at most twice that of plain PyTorch in the same type.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor

from vidgen.kernels.attention.api import attention, attention_backend
from vidgen.kernels.attention.backends import BACKENDS, Need, Request, able, absent, why_not
from vidgen.kernels.attention.fastest import chosen, forget
from vidgen.kernels.attention.layout import BlockLayout, from_block_mask, from_rule
from vidgen.kernels.attention.merge import merge
from vidgen.kernels.attention.reference import attention_reference, masked_logits

HEADS = 2
SIZES = [(64, 64), (77, 131), (33, 20)]  # queries, keys


def blocks(num_queries: int, num_keys: int, batch: int = 1, heads: int = 1, block: int = 16) -> BlockLayout:
    rows, columns = -(-num_queries // block), -(-num_keys // block)
    mask = torch.rand(batch, heads, rows, columns, generator=torch.Generator().manual_seed(rows)) < 0.5
    return from_block_mask(
        mask, num_queries=num_queries, num_keys=num_keys, query_block=block, key_block=block
    )


def window(num_queries: int, num_keys: int) -> BlockLayout:
    def near(query: Tensor, key: Tensor) -> Tensor:
        return (query - key).abs() <= 21

    return from_rule(near, num_queries=num_queries, num_keys=num_keys, query_block=16, key_block=32)


def no_row_sees_a_key(num_queries: int, num_keys: int) -> BlockLayout:
    mask = torch.zeros(1, 1, -(-num_queries // 16), -(-num_keys // 16), dtype=torch.bool)
    return from_block_mask(mask, num_queries=num_queries, num_keys=num_keys, query_block=16, key_block=16)


def with_lengths(num_queries: int, num_keys: int) -> BlockLayout:
    plain = blocks(num_queries, num_keys)
    lengths = torch.randint(0, 17, (1, 1, plain.num_key_blocks), generator=torch.Generator().manual_seed(1))
    lengths = torch.minimum(lengths, plain.lengths_BHC).to(torch.int32)
    return BlockLayout(
        num_queries=num_queries, num_keys=num_keys, query_block=16, key_block=16, full=plain.full,
        key_lengths_BHC=lengths,
    )  # fmt: skip


def with_weights(num_queries: int, num_keys: int) -> BlockLayout:
    plain = blocks(num_queries, num_keys)
    return BlockLayout(
        num_queries=num_queries, num_keys=num_keys, query_block=16, key_block=16, full=plain.full,
        key_log_weights_BHC=torch.randn(1, HEADS, plain.num_key_blocks),
    )  # fmt: skip


LAYOUTS: dict[str, Callable[[int, int], BlockLayout | None]] = {
    "dense": lambda q, k: None,
    "blocks": blocks,
    "blocks per head": lambda q, k: blocks(q, k, heads=HEADS),
    "blocks per batch": lambda q, k: blocks(q, k, batch=2, heads=HEADS),
    "tiles": window,
    "nothing": no_row_sees_a_key,
    "lengths": with_lengths,
    "weights": with_weights,
}
# flex compiles for seconds per shape: these stand for all
COMPILED = {("flex", "dense"), ("flex", "tiles"), ("flex", "blocks per head")}


def draw(
    num_queries: int, num_keys: int, head_dim: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(num_keys)
    query, key, value = (
        torch.randn(2, length, HEADS, head_dim, generator=generator).to(dtype)
        for length in (num_queries, num_keys, num_keys)
    )
    return query, key, value


def plain(query: Tensor, key: Tensor, value: Tensor, layout: BlockLayout | None) -> Tensor:
    """Plain PyTorch in the tensors' own type."""
    logits = masked_logits(query, key, layout, None, query.dtype)
    weights = logits.softmax(-1).nan_to_num(0)
    return torch.einsum("bhqk,bkhd->bqhd", weights, value)


def error(found: Tensor, exact: Tensor) -> float:
    return (found.double() - exact).abs().max().item()


CASES = [
    (name, kind, head_dim, dtype)
    for name, kind, head_dim, dtype in product(
        BACKENDS, LAYOUTS, (64, 96, 128, 20), (torch.float32, torch.float16, torch.bfloat16)
    )
    if name != "flex" or ((name, kind) in COMPILED and head_dim == 64 and dtype == torch.float32)
]


@pytest.mark.parametrize(("name", "kind", "head_dim", "dtype"), CASES, ids=lambda value: str(value))
def test_error_is_at_most_twice_that_of_plain_torch_or_the_request_is_refused(
    name: str, kind: str, head_dim: int, dtype: torch.dtype
):
    for num_queries, num_keys in SIZES[1:2] if name == "flex" else SIZES:
        layout = LAYOUTS[kind](num_queries, num_keys)
        qkv = draw(num_queries, num_keys, head_dim, dtype)
        if why_not(BACKENDS[name], Request.of(qkv[0], layout, False)) is not None:
            with pytest.raises(ValueError, match=f"backend={name}: .*; able here: "):
                attention(*qkv, layout=layout, backend=name)
            continue
        exact, _ = attention_reference(*qkv, layout)
        found = attention(*qkv, layout=layout, backend=name)
        assert found.dtype == dtype and found.shape == qkv[0].shape
        assert not found.isnan().any()
        assert error(found, exact) <= 2 * error(plain(*qkv, layout), exact) + 1e-6


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("name", ["native", "cpu", "reference"])
def test_lse_is_that_of_the_logits_and_minus_infinity_where_nothing_is_seen(name: str, kind: str):
    for num_queries, num_keys in SIZES:
        layout = LAYOUTS[kind](num_queries, num_keys)
        qkv = draw(num_queries, num_keys, 64)
        if why_not(BACKENDS[name], Request.of(qkv[0], layout, True)) is not None:
            continue
        exact, exact_lse = attention_reference(*qkv, layout)
        found, lse = attention(*qkv, layout=layout, backend=name, return_lse=True)
        assert lse.dtype == torch.float32
        assert torch.equal(lse == -math.inf, exact_lse == -math.inf)
        torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize(("num_queries", "num_keys"), SIZES)
def test_every_block_listed_is_dense_attention(num_queries: int, num_keys: int):
    mask = torch.ones(1, 1, -(-num_queries // 16), -(-num_keys // 32), dtype=torch.bool)
    layout = from_block_mask(mask, num_queries=num_queries, num_keys=num_keys, query_block=16, key_block=32)
    assert layout.work == 1 and torch.equal(layout.density_BH, torch.ones(1, 1))
    qkv = draw(num_queries, num_keys, 64)
    torch.testing.assert_close(attention(*qkv, layout=layout), attention(*qkv), rtol=1e-5, atol=2e-6)


def test_asking_for_the_lse_does_not_change_the_output():
    """A sparsity search asks for it in the midst of steps that must be what they would be without."""
    for num_queries, num_keys in SIZES:
        for head_dim in (20, 32, 64, 128):
            qkv = draw(num_queries, num_keys, head_dim)
            assert torch.equal(attention(*qkv), attention(*qkv, return_lse=True)[0])


@pytest.mark.parametrize("num_parts", [2, 3, 5])
def test_lse_merges_of_disjoint_keys_equal_the_whole(num_parts: int):
    query, key, value = draw(37, 90, 64)
    cuts = torch.arange(90).tensor_split(num_parts)
    parts = [attention(query, key[:, cut], value[:, cut], return_lse=True) for cut in cuts]
    seen_by_none = (torch.zeros_like(query), torch.full((2, HEADS, 37), -math.inf))
    found, lse = merge([*parts, seen_by_none])
    whole, whole_lse = attention(query, key, value, return_lse=True)
    torch.testing.assert_close(found, whole, rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(lse, whole_lse, rtol=1e-5, atol=1e-5)
    empty, empty_lse = merge([seen_by_none, seen_by_none])
    assert not empty.any() and (empty_lse == -math.inf).all()


@pytest.mark.parametrize("size", [1e-3, 1.0, 30.0, 1e3])
def test_logits_of_any_size_give_what_the_reference_gives(size: float):
    query, key, value = draw(77, 131, 64)
    for kind in ("blocks per head", "tiles", "nothing"):
        layout = LAYOUTS[kind](77, 131)
        exact, exact_lse = attention_reference(query * size, key, value, layout)
        found, lse = attention(query * size, key, value, layout=layout, backend="cpu", return_lse=True)
        torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-5, atol=1e-5)
        assert error(found, exact) <= 2 * error(plain(query * size, key, value, layout), exact) + 1e-6


def test_values_of_keys_that_nobody_sees_may_be_anything():
    for kind in ("blocks per head", "tiles", "lengths"):
        layout = LAYOUTS[kind](77, 131)
        assert layout is not None
        query, key, value = draw(77, 131, 64)
        unseen = ~layout.dense_mask().any(2).any(1).any(0)
        if not unseen.any():
            continue
        poisoned_key, poisoned_value = key.clone(), value.clone()
        poisoned_key[:, unseen], poisoned_value[:, unseen] = 1e30, 7.0
        found = attention(query, poisoned_key, poisoned_value, layout=layout, backend="cpu")
        assert torch.equal(found, attention(query, key, value, layout=layout, backend="cpu")), kind


def test_any_strides_give_the_same(monkeypatch: pytest.MonkeyPatch):
    query, key, value = draw(77, 131, 64)
    layout = blocks(77, 131, heads=HEADS)
    stretched = [torch.stack((t, t), dim=-1)[..., 0] for t in (query, key, value)]
    heads_first = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (query, key, value)]
    expected = attention(query, key, value, layout=layout, backend="cpu")
    for qkv in (stretched, heads_first):
        assert torch.equal(attention(*qkv, layout=layout, backend="cpu"), expected)


def test_a_layout_for_other_sizes_is_refused():
    query, key, value = draw(64, 64, 64)
    with pytest.raises(ValueError, match=r"64 queries and 64 keys: this layout needs \(77, 131\)"):
        attention(query, key, value, layout=blocks(77, 131))
    with pytest.raises(ValueError, match="batch 2 with 2 heads: this layout is for batch 1 with 3 heads"):
        attention(query, key, value, layout=blocks(64, 64, heads=3))
    with pytest.raises(ValueError, match="need equal batch, heads and head dimension"):
        attention(query, key[..., :32], value[..., :32])


def test_an_unknown_backend_is_refused_with_the_names_there_are():
    with pytest.raises(ValueError, match="attention backend fast: there are native, .*, and auto"):
        attention(*draw(8, 8, 16), backend="fast")
    with pytest.raises(ValueError, match="attention backend fast"), attention_backend("fast"):
        attention(*draw(8, 8, 16))


def test_a_request_is_refused_by_name_of_what_is_missing():
    qkv = draw(64, 64, 64)
    with pytest.raises(ValueError, match=r"backend=native: does not do block layouts; able here: cpu"):
        attention(*qkv, layout=blocks(64, 64), backend="native")


def test_within_a_backend_calls_take_it_and_afterwards_no_more():
    qkv, layout = draw(64, 64, 64), blocks(64, 64)
    with attention_backend("native"):
        with pytest.raises(ValueError, match="backend=native"):
            attention(*qkv, layout=layout)
        with attention_backend("cpu"):
            attention(*qkv, layout=layout)
        with pytest.raises(ValueError, match="backend=native"):
            attention(*qkv, layout=layout)
    attention(*qkv, layout=layout)


def test_auto_measures_once_and_takes_dense_only_where_a_layout_may_see_more(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(
        BACKENDS, "flex", BACKENDS["reference"]
    )  # which is taken by name only: no compiling here
    forget()
    qkv = draw(64, 64, 64)
    exact = blocks(64, 64)
    expected, _ = attention_reference(*qkv, exact)
    for _ in range(2):
        found = attention(*qkv, layout=exact, backend="auto")
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=2e-6)
    assert len(chosen()) == 1
    loose = BlockLayout(
        num_queries=64, num_keys=64, query_block=16, key_block=16, full=exact.full, may_see_more=True
    )
    found = attention(*qkv, layout=loose, backend="auto")
    (name, is_dense), *_ = [choice for kind, choice in chosen().items() if kind[-1]]
    expected = attention_reference(*qkv, None if is_dense else loose)[0]
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=2e-6)
    forget()


def test_a_package_that_is_missing_or_broken_is_a_reason_and_no_crash(monkeypatch: pytest.MonkeyPatch):
    def broken() -> None:
        raise OSError("undefined symbol: _ZN3c10")

    monkeypatch.setitem(
        BACKENDS, "flash", replace(BACKENDS["flash"], load=broken, devices=frozenset({"cpu"}))
    )
    absent.cache_clear()
    assert absent("flash") == "is not there: undefined symbol: _ZN3c10"
    absent.cache_clear()


def test_what_is_able_is_in_order_of_preference():
    query = draw(64, 64, 64)[0]
    assert able(Request.of(query, None, False))[0].name == "native"
    assert able(Request.of(query, blocks(64, 64), False))[0].name == "cpu"
    assert Need.LSE in Request.of(query, None, True).needs


@pytest.mark.parametrize("kind", ["blocks per head", "tiles", "weights", "lengths"])
def test_gradients_are_those_of_the_reference(kind: str):
    layout = LAYOUTS[kind](77, 131)

    def gradients(name: str) -> list[Tensor]:
        qkv = [tensor.requires_grad_() for tensor in draw(77, 131, 20)]
        attention(*qkv, layout=layout, backend=name).square().sum().backward()
        return [tensor.grad for tensor in qkv if tensor.grad is not None]

    for found, exact in zip(gradients("cpu"), gradients("reference"), strict=True):
        torch.testing.assert_close(found, exact.nan_to_num(0), rtol=1e-4, atol=1e-5)


def test_a_backend_without_gradients_is_refused_where_they_are_needed():
    qkv = [tensor.requires_grad_() for tensor in draw(64, 64, 64)]
    with pytest.raises(ValueError, match="backend=flex: does not do gradients; able here: native, cpu"):
        attention(*qkv, backend="flex")
    with torch.no_grad():
        assert why_not(BACKENDS["native"], Request.of(qkv[0], None, False)) is None
