"""The shipped model shows what it is asked for, with room to spare below its card's figures."""

from vidgen.builtin import load_small
from vidgen.measure.report import measure_adherence


def test_the_builtin_model_shows_what_it_is_asked_for() -> None:
    found = measure_adherence(load_small(), num_prompts=16, seed=0)["all"]
    right = {factor: int(count.split("/")[0]) for factor, count in found.items()}
    assert right["colour"] >= 14 and right["background"] >= 14
    assert right["motion"] >= 11 and right["shape"] >= 6 and right["all"] >= 6
