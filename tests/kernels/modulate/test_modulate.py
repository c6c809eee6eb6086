"""Laws of fused LayerNorm and modulation: what a DiT block does step by step, for any width and strides."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")

from vidgen.kernels.modulate import reference
from vidgen.kernels.modulate.api import gate_residual, gate_residual_norm_modulate, norm_modulate

Draw = Callable[..., Tensor]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(2, 3, 5, 24), (1, 1, 1, 1), (1, 2, 7, 33), (3, 1, 2, 512), (1, 2, 3, 1536), (1, 1, 2, 5120)]
EPS = 1e-6


def stepwise(x: Tensor, scale: Tensor, shift: Tensor, dtype: torch.dtype) -> Tensor:
    """Plain torch, each step rounded to a dtype."""
    x, scale, shift = x.to(dtype), scale.to(dtype), shift.to(dtype)
    return torch.nn.functional.layer_norm(x, x.shape[-1:], eps=EPS) * (1 + scale) + shift


def inputs(draw: Draw, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Tokens away from zero, a branch, and gate, scale and shift per frame."""
    per_frame = (*shape[:2], 1, shape[3])
    branch, *modulation = (draw(*size, dtype=dtype) for size in (shape, *[per_frame] * 3))
    return 3 * draw(*shape, dtype=dtype) + 5, branch, *modulation


def shape_id(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
def test_error_at_most_twice_that_of_plain_torch(
    shape: tuple[int, ...], dtype: torch.dtype, draw: Draw, at_most_twice: Any, memory_of_nans: Any
):
    x, branch, gate, scale, shift = inputs(draw, shape, dtype)
    exact = stepwise(x, scale, shift, torch.float64)
    eager = stepwise(x, scale, shift, dtype)
    with memory_of_nans():
        found = norm_modulate(x, scale, shift, EPS, backend="triton")
        total, modulated = gate_residual_norm_modulate(x, branch, gate, scale, shift, EPS, backend="triton")
    assert found.dtype == total.dtype == modulated.dtype == dtype
    at_most_twice(found, eager, exact)
    at_most_twice(total, x + branch * gate, x.double() + branch.double() * gate.double())
    at_most_twice(
        modulated, stepwise(total, scale, shift, dtype), stepwise(total, scale, shift, torch.float64)
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_second_of_the_fused_pair_is_the_norm_of_the_first(dtype: torch.dtype, draw: Draw):
    x, branch, gate, scale, shift = inputs(draw, (2, 3, 5, 24), dtype)
    for backend in ("triton", "reference"):
        total, modulated = gate_residual_norm_modulate(x, branch, gate, scale, shift, EPS, backend=backend)
        assert torch.equal(modulated, norm_modulate(total, scale, shift, EPS, backend=backend))


STRIDES: dict[str, Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]]] = {
    "one-modulation-for-the-batch": lambda of: (*of[:2], *(values[:1] for values in of[2:])),
    "one-modulation-for-all-frames": lambda of: (*of[:2], *(values[:, :1] for values in of[2:])),
    "expanded-over-the-batch": lambda of: (*of[:2], *(values[:1].expand_as(values) for values in of[2:])),
    "parts-of-one-tensor": lambda of: (*of[:2], *torch.cat(of[2:], dim=2).split(1, dim=2)),
    "tokens-transposed": lambda of: (
        *(tokens.transpose(1, 2).contiguous().transpose(1, 2) for tokens in of[:2]),
        *of[2:],
    ),
    "channels-apart": lambda of: tuple(
        torch.stack((values, values), -1).flatten(-2)[..., ::2] for values in of
    ),
    "modulation-in-fp32": lambda of: (*(tokens.half() for tokens in of[:2]), *of[2:]),
}


@pytest.mark.parametrize("strides", STRIDES)
def test_any_strides_and_shared_modulation(strides: str, draw: Draw):
    x, branch, gate, scale, shift = STRIDES[strides](inputs(draw, (2, 3, 5, 24), torch.float32))
    tolerance: dict[str, Any] = (
        {"rtol": 1e-5, "atol": 1e-5} if x.dtype == torch.float32 else {"rtol": 2e-3, "atol": 2e-3}
    )
    found = norm_modulate(x, scale, shift, EPS, backend="triton")
    torch.testing.assert_close(found, reference.norm_modulate(x, scale, shift, EPS), **tolerance)
    pair = gate_residual_norm_modulate(x, branch, gate, scale, shift, EPS, backend="triton")
    expected = reference.gate_residual_norm_modulate(x, branch, gate, scale, shift, EPS)
    torch.testing.assert_close(pair, expected, **tolerance)


def test_tokens_all_alike_become_the_shift(draw: Draw):
    x = draw(1, 2, 3, 1).expand(1, 2, 3, 24)
    scale, shift = draw(1, 2, 1, 24), draw(1, 2, 1, 24)
    found = norm_modulate(x, scale, shift, EPS, backend="triton")
    torch.testing.assert_close(
        found, shift.expand_as(x), rtol=0, atol=2e-3
    )  # the mean's rounding, over sqrt(eps)


def test_the_reference_is_the_block_step_by_step_bit_for_bit(draw: Draw):
    x, branch, gate, scale, shift = inputs(draw, (2, 3, 5, 24), torch.float32)
    total, modulated = gate_residual_norm_modulate(x, branch, gate, scale, shift, EPS, backend="reference")
    assert torch.equal(total, x + branch * gate)
    assert torch.equal(modulated, stepwise(total, scale, shift, torch.float32))


@pytest.mark.parametrize("strides", STRIDES)
def test_with_and_without_gradients_the_bits_are_the_same(strides: str, draw: Draw):
    x, branch, gate, scale, shift = STRIDES[strides](inputs(draw, (2, 3, 5, 24), torch.float32))
    before = x.clone()
    expected = norm_modulate(x, scale, shift, EPS), gate_residual(x, branch.clone(), gate)
    assert torch.equal(x, before), "tokens stay as they are"
    scale.requires_grad_()
    gate.requires_grad_()
    for found, without in zip(
        (norm_modulate(x, scale, shift, EPS), gate_residual(x, branch, gate)), expected, strict=True
    ):
        assert found.requires_grad and torch.equal(found, without)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_gated_branch_is_added_in_fp32_and_rounded_once(dtype: torch.dtype, draw: Draw):
    x, branch, gate, *_ = inputs(draw, (2, 3, 5, 24), dtype)
    gate = gate.float()  # as modulation is
    expected = (x.float() + branch.float() * gate).to(dtype)
    assert torch.equal(gate_residual(x, branch, gate), expected)


def test_no_tokens_give_none(draw: Draw):
    scale = draw(2, 3, 1, 8)
    assert norm_modulate(draw(2, 3, 0, 8), scale, scale, EPS, backend="triton").shape == (2, 3, 0, 8)


def test_gradients_flow_unless_triton_is_named(draw: Draw):
    x, branch, gate, scale, shift = inputs(draw, (1, 2, 3, 8), torch.float32)
    scale.requires_grad_()
    norm_modulate(x, scale, shift, EPS).sum().backward()
    assert scale.grad is not None and scale.grad.abs().sum() > 0
    with pytest.raises(ValueError, match="gradients"):
        gate_residual_norm_modulate(x, branch, gate, scale, shift, EPS, backend="triton")
    with torch.no_grad():
        norm_modulate(x, scale, shift, EPS, backend="triton")


def test_what_does_not_fit_is_an_error(draw: Draw):
    x, branch, gate, scale, shift = inputs(draw, (2, 3, 5, 8), torch.float32)
    with pytest.raises(ValueError, match=r"scale \(2, 2, 1, 8\): these tokens need \(2, 3, 1, 8\)"):
        norm_modulate(x, scale[:, 1:], shift, EPS)
    with pytest.raises(ValueError, match="equal shapes"):
        gate_residual(x, branch[:1], gate)
    with pytest.raises(ValueError, match=r"gate \(2, 2, 1, 8\): these tokens need \(2, 3, 1, 8\)"):
        gate_residual(x, branch, gate[:, 1:])
    with pytest.raises(ValueError, match="equal shapes"):
        gate_residual_norm_modulate(x, branch[:, :, 1:], gate, scale, shift, EPS)
    with pytest.raises(ValueError, match=r"need \[batch, frames, tokens, width\]"):
        norm_modulate(x[0], scale, shift, EPS)
    with pytest.raises(ValueError, match="backend='cuda': need one of auto, triton, reference"):
        norm_modulate(x, scale, shift, EPS, backend="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1536, 3072, 5120, 8192])
def test_larger_sizes(width: int, dtype: torch.dtype, draw: Draw, at_most_twice: Any):
    x, branch, gate, scale, shift = inputs(draw, (2, 3, 390, width), dtype)
    total, modulated = gate_residual_norm_modulate(x, branch, gate, scale, shift, EPS)
    at_most_twice(total, x + branch * gate, x.double() + branch.double() * gate.double())
    at_most_twice(
        modulated, stepwise(total, scale, shift, dtype), stepwise(total, scale, shift, torch.float64)
    )
