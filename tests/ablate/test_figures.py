"""Figures of a cell: seconds are compared at the same pace of the machine."""

from typing import Any

import pytest

from vidgen.ablate.figures import cell_figures

SEEN: dict[str, Any] = {
    "first_frame_s": 1.0, "skipped": 0.0, "density": None, "tflops": 0.1, "sent_mib": 0.0, "memory_mib": 1,
    "psnr": "inf",
}  # fmt: skip


def row(seconds: float, pace_s: float | None) -> dict[str, Any]:
    return {**SEEN, "seconds": seconds, "pace_s": pace_s}


def test_a_slow_minute_of_the_machine_does_not_make_a_cell_slower():
    exact = [row(2.0, 0.01), row(2.4, 0.012)]
    assert cell_figures(exact, exact)["speed_up"] == 1
    slow_minute = [row(2.0, 0.02), row(2.0, 0.02)]  # half as quick as it was, so the cell is twice as quick
    assert cell_figures(slow_minute, exact)["speed_up"] == pytest.approx(2.0)
    assert cell_figures(slow_minute, exact)["seconds"] == 2.0


@pytest.mark.parametrize("unknown", [None, "left out"])
def test_where_the_pace_of_one_is_not_known_plain_seconds_count(unknown: str | None):
    exact = [row(2.0, 0.01)]
    cell = [row(1.0, None)]
    if unknown:
        del cell[0]["pace_s"]
    assert cell_figures(cell, exact)["speed_up"] == 2.0


def test_words_for_what_is_no_number_are_not_in_means():
    rows = [row(1.0, 0.01) | {"boundary_jump": "nan"}, row(1.0, 0.01) | {"boundary_jump": 1.5}]
    assert cell_figures(rows, rows)["boundary_jump"] == 1.5
