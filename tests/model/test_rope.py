"""Laws of the rotary embedding: scores see relative places only, lengths are kept."""

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from vidgen.kernels.rope.reference import rotate
from vidgen.model.rope import axis_widths, rotations

GRID, HEAD_WIDTH, THETA = (5, 4, 3), 16, 50.0
NUM_TOKENS = 5 * 4 * 3
CPU = torch.device("cpu")


def scores(query_D: Tensor, key_D: Tensor) -> Tensor:
    """[f, y, x, f', y', x']: scores of one query at every place with one key at every place."""
    turns = rotations(GRID, HEAD_WIDTH, THETA, CPU)
    everywhere = (1, NUM_TOKENS, 1, HEAD_WIDTH)
    queries, keys = (rotate(x.expand(everywhere), *turns)[0, :, 0] for x in (query_D, key_D))
    return (queries @ keys.T).view(*GRID, *GRID)


@pytest.mark.parametrize("axis", range(3), ids=["frame", "row", "column"])
def test_scores_depend_on_relative_place_only(axis: int, draw: Any):
    score = scores(draw(HEAD_WIDTH), draw(HEAD_WIDTH))
    length = GRID[axis]
    low, high = slice(0, length - 1), slice(1, length)
    earlier, later = [slice(None)] * 6, [slice(None)] * 6
    earlier[axis] = earlier[axis + 3] = low
    later[axis] = later[axis + 3] = high
    torch.testing.assert_close(score[tuple(earlier)], score[tuple(later)], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("axis", range(3), ids=["frame", "row", "column"])
def test_scores_do_depend_on_the_distance_along_each_axis(axis: int, draw: Any):
    score = scores(draw(HEAD_WIDTH), draw(HEAD_WIDTH))
    by_distance = score[0, 0, 0][tuple(slice(None) if i == axis else 0 for i in range(3))]
    gaps = (by_distance[:, None] - by_distance).abs() + torch.eye(GRID[axis])
    assert gaps.min() > 1e-3


def test_each_axis_turns_channels_of_its_own(draw: Any):
    """Moving along one axis leaves the other axes' channels as they were."""
    x = draw(HEAD_WIDTH)
    turned = rotate(x.expand(1, NUM_TOKENS, 1, -1), *rotations(GRID, HEAD_WIDTH, THETA, CPU))
    turned = turned.view(*GRID, HEAD_WIDTH)
    frame, row, column = axis_widths(HEAD_WIDTH)
    assert torch.equal(turned[0, 0, 0], x)
    assert torch.equal(turned[3, 0, 0, frame:], x[frame:])
    assert torch.equal(turned[0, 3, 0, :frame], x[:frame])
    assert torch.equal(turned[0, 3, 0, frame + row :], x[frame + row :])
    assert torch.equal(turned[0, 0, 2, : frame + row], x[: frame + row])


def test_rotation_is_complex_multiplication_and_keeps_lengths(draw: Any):
    tokens = draw(2, NUM_TOKENS, 3, HEAD_WIDTH)
    turned = rotate(tokens, *rotations(GRID, HEAD_WIDTH, THETA, CPU))
    for number, place in enumerate(product(*map(range, GRID))):
        angles = [
            at * THETA ** (-2 * i / width)
            for at, width in zip(place, axis_widths(HEAD_WIDTH), strict=True)
            for i in range(width // 2)
        ]
        turn = torch.polar(torch.ones(len(angles)), torch.tensor(angles))
        expected = torch.view_as_complex(tokens[:, number].unflatten(-1, (-1, 2))) * turn
        torch.testing.assert_close(turned[:, number], torch.view_as_real(expected).flatten(-2))
    torch.testing.assert_close(turned.norm(dim=-1), tokens.norm(dim=-1))


@pytest.mark.parametrize("head_width", [2, 4, 6, 8, 12, 16, 32, 64, 80, 128])
def test_axis_widths_are_even_and_fill_the_head(head_width: int):
    widths = axis_widths(head_width)
    assert sum(widths) == head_width
    assert all(width % 2 == 0 for width in widths)
    tokens = torch.ones(1, 8, 1, head_width)
    assert rotate(tokens, *rotations((2, 2, 2), head_width, THETA, CPU)).shape == tokens.shape


def test_a_forward_in_inference_mode_does_not_keep_a_later_one_from_training(dit: Any, draw: Any):
    rotations.cache_clear()
    model = dit(width=36)
    arguments = draw(1, 3, 2, 4, 6), torch.full((1, 2), 0.5), draw(1, 5, 7)
    try:
        with torch.inference_mode():
            model(*arguments)
        model.requires_grad_(True)
        model(*arguments).square().mean().backward()
    finally:
        rotations.cache_clear()
