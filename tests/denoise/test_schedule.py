"""Laws of the noise levels, of the Euler solver and of guidance."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vidgen.denoise.guidance import combine, num_branches
from vidgen.denoise.schedule import noise_levels, shift_noise_level
from vidgen.denoise.solver import Euler

steps, shifts = st.integers(1, 200), st.floats(0.05, 50)


@given(steps, shifts)
def test_levels_fall_from_pure_noise_to_clean(num_steps: int, shift: float):
    levels = noise_levels(num_steps, shift)
    assert len(levels) == num_steps + 1
    assert levels[0] == pytest.approx(1, abs=1e-12)
    assert levels[-1] == 0
    assert all(earlier > later for earlier, later in pairwise(levels))


@given(steps)
def test_without_shift_levels_are_evenly_spaced(num_steps: int):
    assert noise_levels(num_steps) == pytest.approx([1 - i / num_steps for i in range(num_steps + 1)])


@given(st.floats(0.01, 0.99), st.floats(1.01, 50))
def test_a_shift_above_one_raises_levels_and_its_inverse_undoes_it(level: float, shift: float):
    shifted = shift_noise_level(level, shift)
    assert level < shifted < 1
    assert shift_noise_level(shifted, 1 / shift) == pytest.approx(level)


@pytest.mark.parametrize("arguments", [(0, 1.0), (-3, 1.0), (4, 0.0), (4, -1.0), (4, float("nan"))])
def test_bad_steps_and_shifts_are_errors_that_say_the_value(arguments: tuple[int, float]):
    bad = arguments[0] if arguments[0] < 1 else arguments[1]
    with pytest.raises(ValueError, match=f"={bad}: need"):
        noise_levels(*arguments)


@given(st.integers(1, 20), shifts)
def test_euler_reaches_the_clean_latents_along_a_straight_line(num_steps: int, shift: float):
    clean, noise = torch.randn(
        2, 1, 2, 1, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    solver, latents, history = Euler(noise_levels(num_steps, shift)), noise, ()
    for step in range(num_steps):
        latents, history = solver.step(latents, noise - clean, step, history)
    torch.testing.assert_close(latents, clean)
    assert history == ()


def test_euler_is_first_order():
    """Halving the steps' size halves the error on dx/dt = x."""
    errors = []
    for num_steps in (50, 100, 200):
        solver, x = Euler(noise_levels(num_steps)), torch.ones(1, dtype=torch.float64)
        for step in range(num_steps):
            x, _ = solver.step(x, x, step, ())
        errors.append(abs(float(x) - torch.e**-1))
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.05)
    assert errors[1] / errors[2] == pytest.approx(2, rel=0.05)


def test_guidance_of_one_is_the_prompt_alone_and_of_zero_the_negative_one():
    positive, negative = torch.randn(2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert [num_branches(scale) for scale in (0.0, 0.5, 1.0, 1, 3.0)] == [2, 2, 1, 1, 2]
    assert combine([positive], 1.0) is positive
    torch.testing.assert_close(combine([positive, negative], 1.0), positive)
    assert torch.equal(combine([positive, negative], 0.0), negative)
    torch.testing.assert_close(combine([positive, negative], 3.0), 3 * positive - 2 * negative)
