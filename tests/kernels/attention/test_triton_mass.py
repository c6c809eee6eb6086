"""Laws of the Triton kernel of block mass: what the reference says, for blocks of any length."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")

from vidgen.kernels.attention.reference import attention_reference, block_mass_reference
from vidgen.kernels.attention.triton_mass import block_mass

Draw = Callable[..., Tensor]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
BLOCKS = [(16, 16), (32, 16), (24, 40), (7, 150), (144, 20), (150, 170), (200, 300)]


def inputs(
    draw: Draw, dtype: torch.dtype = torch.float32, head_dim: int = 20
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys, and the log-sum-exps of attention between them."""
    query, key = draw(2, 50, 2, head_dim, dtype=dtype), draw(2, 70, 2, head_dim, dtype=dtype)
    return query, key, attention_reference(query, key, key)[1].float()


@pytest.fixture
def holds(memory_of_nans: Any) -> Callable[..., None]:
    """Asserts that the kernel does for these inputs what the reference says."""

    def check(query: Tensor, key: Tensor, lse: Tensor, **settings: Any) -> None:
        with memory_of_nans():
            found = block_mass(query, key, lse, **settings)
        expected = block_mass_reference(query, key, lse, **settings)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), expected, rtol=2e-5, atol=1e-6)

    return check


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("blocks", BLOCKS, ids=lambda blocks: f"{blocks[0]}x{blocks[1]}")
def test_it_is_the_sum_of_what_the_queries_give_the_keys(
    blocks: tuple[int, int], dtype: torch.dtype, draw: Draw, holds: Any
):
    holds(*inputs(draw, dtype), query_block=blocks[0], key_block=blocks[1])


@pytest.mark.parametrize("head_dim", [1, 64, 96, 128])
def test_any_head_dim(head_dim: int, draw: Draw, holds: Any):
    holds(*inputs(draw, head_dim=head_dim), query_block=32, key_block=32)


@pytest.mark.parametrize("blocks", BLOCKS, ids=lambda blocks: f"{blocks[0]}x{blocks[1]}")
def test_rows_sum_to_the_number_of_their_queries(blocks: tuple[int, int], draw: Draw):
    rows = block_mass(*inputs(draw), query_block=blocks[0], key_block=blocks[1]).sum(-1)
    lengths = torch.full_like(rows, blocks[0])
    lengths[..., -1] = (50 - 1) % blocks[0] + 1
    torch.testing.assert_close(rows, lengths, rtol=1e-5, atol=1e-5)


def test_the_log_sum_exps_and_the_scale_are_those_given(draw: Draw, holds: Any):
    query, key, lse = inputs(draw)
    for scale in (0.5, 0.0, -0.3):
        holds(query, key, lse + 1, query_block=32, key_block=32, scale=scale)


def test_any_strides(draw: Draw, holds: Any):
    query, _, lse = inputs(draw)
    spread = draw(2, 2, 50, 40)[..., ::2].transpose(1, 2)
    transposed_lse = lse.transpose(1, 2).contiguous().transpose(1, 2)
    holds(
        query.transpose(1, 2).contiguous().transpose(1, 2),
        spread,
        transposed_lse,
        query_block=32,
        key_block=32,
    )


def test_what_does_not_fit_is_an_error(draw: Draw):
    query, key, lse = inputs(draw)
    with pytest.raises(ValueError, match=r"need \(2, 2, 50\)"):
        block_mass(query, key, lse[..., 1:], query_block=16, key_block=16)
    with pytest.raises(ValueError, match="at least 1"):
        block_mass(query, key, lse, query_block=0, key_block=16)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head_dim", [96, 128])
@pytest.mark.parametrize(
    "blocks", [(64, 64), (128, 128), (384, 384)], ids=lambda blocks: f"{blocks[0]}x{blocks[1]}"
)
def test_larger_sizes(blocks: tuple[int, int], head_dim: int, dtype: torch.dtype, draw: Draw, holds: Any):
    query, key = draw(1, 2111, 3, head_dim, dtype=dtype), draw(1, 3333, 3, head_dim, dtype=dtype)
    lse = attention_reference(query, key, key)[1].float()
    holds(query, key, lse, query_block=blocks[0], key_block=blocks[1])
