"""The shipped model shows what it is asked for, with room to spare below its card's figures."""

from vidgen.builtin import load_small
from vidgen.measure.report import measure_adherence, measure_long, pick_scenes
from vidgen.world import WORLDS


def test_the_builtin_model_shows_what_it_is_asked_for() -> None:
    found = measure_adherence(load_small(), num_prompts=16, seed=0)["all"]
    right = {factor: int(count.split("/")[0]) for factor, count in found.items()}
    assert right["colour"] >= 14 and right["background"] >= 14
    assert right["motion"] >= 11 and right["shape"] >= 6 and right["all"] >= 6


def test_long_videos_are_judged_window_by_window() -> None:
    found = measure_long(load_small(), num_prompts=2, num_frames=128, seed=0)
    assert found["all"]["all"].endswith("/16") and len(found["quarters"]) == 4
    assert all(quarter.endswith("/4") for quarter in found["quarters"])
    right = [int(count.split("/")[0]) for count in (found["all"]["all"], *found["quarters"])]
    assert right[0] == sum(right[1:]) and found["border_jump"] > 0
    assert found["steps"]["block"] > found["steps"]["inside"] > 0


def test_scenes_are_trained_ones_then_held_out_ones() -> None:
    trained, held_out = WORLDS["small"].split()
    picked = pick_scenes(7, seed=0)
    assert set(picked[:4]) <= set(trained) and set(picked[4:]) <= set(held_out)
    assert picked == pick_scenes(7, seed=0) != pick_scenes(7, seed=1)
