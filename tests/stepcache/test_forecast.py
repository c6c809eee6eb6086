"""Forecasts: exact for polynomials of their order, whatever the spacing."""

import math

import pytest
import torch

from vidgen.stepcache.kept import forecast
from vidgen.stepcache.methods import magnitude_at, relative_change

PLACES = (0.31, 0.5, 0.62, 0.93)  # newest first, as levels fall


@pytest.mark.parametrize("order", range(4))
def test_a_forecast_of_an_order_is_exact_for_polynomials_of_that_degree(order: int):
    coefficients = torch.tensor([0.7, -1.3, 2.1, 0.4], dtype=torch.float64)[: order + 1]

    def value(at: float) -> torch.Tensor:
        return sum((c * at**power for power, c in enumerate(coefficients)), torch.zeros(2).double())

    found = forecast(tuple(value(at) for at in PLACES), PLACES, 0.1, order)
    assert torch.allclose(found, value(0.1), rtol=1e-12)


def test_a_forecast_from_too_few_is_of_what_there_is():
    values = (torch.ones(1), torch.zeros(1))
    assert torch.equal(forecast(values[:1], PLACES[:1], 0.1, 3), torch.ones(1))
    assert torch.equal(forecast(values, PLACES[:2], 0.12, 3), torch.tensor([2.0]))


def test_order_0_says_the_newest_again_bit_for_bit():
    value = torch.randn(5)
    assert forecast((value, torch.randn(5)), PLACES[:2], 0.1, 0) is value


def test_a_curve_is_lines_between_its_points_and_flat_beyond_them():
    curve = ((1.0, 2.0), (0.5, 1.0), (0.25, 3.0))
    for level, expected in {1.0: 2.0, 0.75: 1.5, 0.5: 1.0, 0.375: 2.0, 0.0: 3.0, 2.0: 2.0}.items():
        assert magnitude_at(curve, level) == pytest.approx(expected)


def test_change_is_relative_and_infinite_from_nothing():
    assert relative_change(torch.tensor([3.0, -1.0]), torch.tensor([2.0, -2.0])) == pytest.approx(0.5)
    assert relative_change(torch.ones(2), torch.zeros(2)) == math.inf
