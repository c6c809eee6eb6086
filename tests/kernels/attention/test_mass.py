"""Block mass on a CPU against the written-out sum."""

from typing import Any

import pytest
import torch

from vidgen.kernels.attention import mass
from vidgen.kernels.attention.reference import attention_reference, block_mass_reference

CASES = {  # batch, queries, keys, heads, head dimension, query block, key block
    "whole blocks": (1, 64, 96, 2, 16, 16, 32),
    "ragged ends": (2, 77, 131, 3, 20, 16, 24),
    "one block": (1, 5, 7, 1, 8, 128, 128),
    "block of one": (1, 6, 9, 2, 8, 1, 1),
    "ragged queries": (1, 33, 64, 2, 8, 16, 16),
}


def tensors(case: str, dtype: torch.dtype = torch.float32):
    batch, queries, keys, heads, dim, query_block, key_block = CASES[case]
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(batch, queries, heads, dim, generator=generator).to(dtype)
    key = torch.randn(batch, keys, heads, dim, generator=generator).to(dtype)
    _, lse = attention_reference(query, key, key)
    blocks: dict[str, Any] = {"query_block": query_block, "key_block": key_block}
    return query, key, lse.float(), blocks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_mass_is_that_of_the_reference(case, dtype):
    query, key, lse, blocks = tensors(case, dtype)
    found = mass.block_mass(query, key, lse, **blocks)
    assert found.dtype == torch.float32
    torch.testing.assert_close(
        found.double(), block_mass_reference(query, key, lse, **blocks), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("case", CASES)
def test_a_row_sums_to_its_queries(case):
    query, key, lse, blocks = tensors(case)
    rows = mass.block_mass(query, key, lse, **blocks).sum(-1)
    starts = torch.arange(0, query.shape[1], blocks["query_block"])
    lengths = (query.shape[1] - starts).clamp(max=blocks["query_block"]).float()
    torch.testing.assert_close(rows, lengths.expand_as(rows))


def test_chunks_do_not_show(monkeypatch):
    query, key, lse, blocks = tensors("ragged ends")
    whole = mass.block_mass(query, key, lse, **blocks)
    monkeypatch.setattr(mass, "CHUNK_WEIGHTS", 1)
    torch.testing.assert_close(mass.block_mass(query, key, lse, **blocks), whole)


def test_a_scale_and_an_lse_of_other_tokens_are_taken_as_given():
    query, key, lse, blocks = tensors("ragged ends")
    found = mass.block_mass(query, key, lse + 1, scale=0.5, **blocks)
    expected = block_mass_reference(query, key, lse + 1, scale=0.5, **blocks)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


def test_an_lse_of_other_shape_is_an_error():
    query, key, lse, blocks = tensors("whole blocks")
    with pytest.raises(ValueError, match=r"these queries need \(1, 2, 64\)"):
        mass.block_mass(query, key, lse[..., 1:], **blocks)
    with pytest.raises(ValueError, match="query_block=0"):
        mass.block_mass(query, key, lse, query_block=0, key_block=16)
