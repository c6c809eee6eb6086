"""Laws of fused RMSNorm and RoPE: what the model does step by step, for any width, heads and strides."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")

from vidgen.kernels.rope import reference
from vidgen.kernels.rope.api import norm_rope
from vidgen.kernels.rope.reference import rotate
from vidgen.model.rope import rotations

Draw = Callable[..., Tensor]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
GRID = (2, 3, 2)
TOKENS = 12
WIDTHS = [(1, 2), (3, 6), (2, 10), (3, 64), (2, 96), (5, 128), (64, 128)]  # heads, of so many channels
EPS = 1e-6


def widths_id(widths: tuple[int, int]) -> str:
    return f"{widths[0]}heads-of-{widths[1]}"


def inputs(
    draw: Draw, device: torch.device, heads: int, head_width: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tokens, weight, cosines, signed sines."""
    width = heads * head_width
    angles = rotations(GRID, head_width, 100.0, device)
    return 3 * draw(2, TOKENS, width, dtype=dtype), 1 + 0.3 * draw(width, dtype=dtype), *angles


def stepwise(
    x: Tensor, weight: Tensor, cosines: Tensor, sines: Tensor, heads: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Plain torch, each step rounded to a dtype; what is turned is given rounded to the tokens' own."""
    x, weight, cosines, sines = (values.to(dtype) for values in (x, weight, cosines, sines))
    normed = (x * (x.square().mean(-1, keepdim=True) + EPS).rsqrt() * weight).unflatten(-1, (heads, -1))
    return normed, turned(normed, cosines, sines)


def turned(normed: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    return normed * cosines + normed.unflatten(-1, (-1, 2)).flip(-1).flatten(-2) * sines


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("widths", WIDTHS, ids=widths_id)
def test_error_at_most_twice_that_of_plain_torch(
    widths: tuple[int, int],
    dtype: torch.dtype,
    draw: Draw,
    device: torch.device,
    at_most_twice: Any,
    memory_of_nans: Any,
):
    given = inputs(draw, device, *widths, dtype)
    with memory_of_nans():
        found = norm_rope(*given, widths[0], EPS, backend="triton")
    exact = stepwise(*given, widths[0], torch.float64)
    for fast, slow, right in zip(found, stepwise(*given, widths[0], dtype), exact, strict=True):
        assert fast is not None and fast.dtype == dtype
        at_most_twice(fast, slow, right)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_turned_is_what_is_kept(dtype: torch.dtype, draw: Draw, device: torch.device):
    """A queue that turns kept keys anew has the keys that this step used, up to the last rounding."""
    x, weight, cosines, sines = inputs(draw, device, 3, 10, dtype)
    normed, rotated = norm_rope(x, weight, cosines, sines, 3, EPS, backend="triton")
    assert normed is not None
    rounding = torch.finfo(dtype).eps
    torch.testing.assert_close(rotated, rotate(normed, cosines, sines), rtol=2 * rounding, atol=4 * rounding)


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_without_the_normed_the_rotated_are_the_same(backend: str, draw: Draw, device: torch.device):
    given = inputs(draw, device, 3, 10)
    normed, rotated = norm_rope(*given, 3, EPS, keep_normed=False, backend=backend)
    assert normed is None
    assert torch.equal(rotated, norm_rope(*given, 3, EPS, backend=backend)[1])


def test_no_turn_at_all_leaves_the_normed(draw: Draw, device: torch.device):
    x, weight, cosines, sines = inputs(draw, device, 3, 10)
    cosines, sines = torch.ones_like(cosines), torch.zeros_like(sines)
    normed, rotated = norm_rope(x, weight, cosines, sines, 3, EPS, backend="triton")
    assert normed is not None and torch.equal(normed, rotated)


def test_any_strides(draw: Draw, device: torch.device):
    x, weight, cosines, sines = inputs(draw, device, 3, 10)
    fused = torch.cat((x, x, x), dim=-1)[..., 30:60]
    spread = torch.stack((x, x), dim=-1).flatten(-2)[..., ::2]
    transposed = x.transpose(0, 1).contiguous().transpose(0, 1)
    expected = reference.norm_rope(x, weight, cosines, sines, 3, EPS)
    cosines, sines = (torch.cat((values, values), dim=-1)[..., :10] for values in (cosines, sines))
    for given in (fused, spread, transposed):
        found = norm_rope(given, weight, cosines, sines, 3, EPS, backend="triton")
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_the_reference_turns_each_pair_of_channels_by_its_angle(draw: Draw, device: torch.device):
    """Written out pair by pair, and what the model turns kept keys with gives the same bits."""
    x, weight, cosines, sines = inputs(draw, device, 3, 10)
    normed, rotated = norm_rope(x, weight, cosines, sines, 3, EPS, backend="reference")
    assert normed is not None and torch.equal(rotated, rotate(normed, cosines, sines))
    first, second, cosine, sine = normed[..., ::2], normed[..., 1::2], cosines[..., ::2], sines[..., 1::2]
    torch.testing.assert_close(rotated[..., ::2], first * cosine - second * sine, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(rotated[..., 1::2], second * cosine + first * sine, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("widths", WIDTHS, ids=widths_id)
def test_turned_as_complex_numbers_or_written_out_the_bits_are_the_same(
    widths: tuple[int, int], dtype: torch.dtype, draw: Draw
):
    heads, head_width = widths
    cosines, sines = rotations(GRID, head_width, 100.0, torch.device("cpu"))
    tokens = draw(2, TOKENS, heads, head_width).to(dtype)
    moved = torch.cat((tokens.flatten()[:1], tokens.flatten()))[1:].view_as(tokens)  # from an odd address on
    transposed = tokens.transpose(1, 2).contiguous().transpose(1, 2)
    wide = tokens.to(torch.promote_types(dtype, torch.float32))
    written_out = turned(wide, cosines, sines).to(dtype)
    for given in (tokens, moved, transposed):
        assert torch.equal(rotate(given, cosines, sines), written_out)


@pytest.mark.parametrize("widths", WIDTHS, ids=widths_id)
def test_with_and_without_gradients_the_bits_are_the_same(widths: tuple[int, int], draw: Draw):
    given = inputs(draw, torch.device("cpu"), *widths)
    before = [values.clone() for values in given]
    without = norm_rope(*given, widths[0], EPS)
    assert all(torch.equal(*pair) for pair in zip(given, before, strict=True)), "the inputs stay as they are"
    given[1].requires_grad_()
    for found, expected in zip(norm_rope(*given, widths[0], EPS), without, strict=True):
        assert found is not None and expected is not None
        assert found.requires_grad and torch.equal(found, expected)


def test_no_tokens_give_none(draw: Draw, device: torch.device):
    _, weight, cosines, sines = inputs(draw, device, 3, 10)
    nothing = draw(2, 0, 30)
    _, rotated = norm_rope(nothing, weight, cosines[:0], sines[:0], 3, EPS, backend="triton")
    assert rotated.shape == (2, 0, 3, 10)


def test_gradients_flow_unless_triton_is_named(draw: Draw, device: torch.device):
    x, weight, cosines, sines = inputs(draw, device, 3, 10)
    weight.requires_grad_()
    norm_rope(x, weight, cosines, sines, 3, EPS)[1].sum().backward()
    assert weight.grad is not None and weight.grad.abs().sum() > 0
    with pytest.raises(ValueError, match="gradients"):
        norm_rope(x, weight, cosines, sines, 3, EPS, backend="triton")


def test_what_does_not_fit_is_an_error(draw: Draw, device: torch.device):
    x, weight, cosines, sines = inputs(draw, device, 3, 10)
    with pytest.raises(ValueError, match="width 30 with 2 heads: need an even number of channels"):
        norm_rope(x, weight, cosines, sines, 2, EPS)
    with pytest.raises(ValueError, match=r"sines of shape \(11, 1, 10\): these tokens need \(12, 1, 10\)"):
        norm_rope(x, weight, cosines, sines[1:], 3, EPS)
    with pytest.raises(ValueError, match=r"these tokens need \(30,\)"):
        norm_rope(x, weight[1:], cosines, sines, 3, EPS)
    with pytest.raises(ValueError, match=r"need \[batch, tokens, width\]"):
        norm_rope(x[0], weight, cosines, sines, 3, EPS)
    with pytest.raises(ValueError, match="backend='flash': need one of auto, triton, reference"):
        norm_rope(x, weight, cosines, sines, 3, EPS, backend="flash")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("widths", [(12, 128), (24, 128), (40, 128), (30, 64), (16, 96)], ids=widths_id)
def test_larger_sizes(
    widths: tuple[int, int], dtype: torch.dtype, draw: Draw, device: torch.device, at_most_twice: Any
):
    heads, head_width = widths
    cosines, sines = rotations((3, 30, 52), head_width, 10000.0, device)
    x, weight = 3 * draw(2, len(cosines), heads * head_width, dtype=dtype), 1 + 0.3 * draw(heads * head_width)
    found = norm_rope(x, weight, cosines, sines, heads, EPS)
    slow = stepwise(x, weight, cosines, sines, heads, dtype)
    exact = stepwise(x, weight, cosines, sines, heads, torch.float64)
    for fast, eager, right in zip(found, slow, exact, strict=True):
        assert fast is not None
        at_most_twice(fast, eager, right)
