"""Which cells a grid has, and what is said of one that cannot be."""

from pathlib import Path
from typing import Any

import pytest

from vidgen.ablate.pareto import best_within, front
from vidgen.ablate.scenes import prompts_of
from vidgen.ablate.settings import AblationConfig, cells_of, read_ablation
from vidgen.stepcache import settings


def ablation(**values: Any) -> AblationConfig:
    return AblationConfig.model_validate({"name": "x", **values})


def names(**values: Any) -> list[str]:
    return [cell.name for cell in cells_of(ablation(**values), "grid")]


def test_lists_are_axes_and_every_combination_is_a_cell():
    grid = {"queue.context_mode": ["recompute", "cache"], "queue.stride": [1, 2]}
    assert names(cells=[grid]) == [
        "exact", "recompute stride=1", "recompute stride=2", "cache stride=1", "cache stride=2",
    ]  # fmt: skip


def test_a_cell_that_is_there_already_is_not_there_twice():
    assert names(cells=[{"queue.stride": [1, 2]}, {"queue.stride": 2}]) == ["exact", "stride=2"]


def test_what_all_cells_share_is_in_each_and_a_cell_wins_over_it():
    config = ablation(job={"num_frames": 33, "queue.stride": 4}, cells=[{"queue.stride": 2}])
    exact, other = cells_of(config, "grid")
    assert (exact.job.num_frames, exact.job.queue.stride) == (33, 4)
    assert (other.job.num_frames, other.job.queue.stride) == (33, 2)


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        ([{"queue.strid": 2}], "did you mean stride"),
        ([{"queue.stride": 0}], "greater than or equal to 1"),
        ([{"seed": 3}], "seed: is a video's own"),
        ([{"output.path": "x.mp4"}], "output.path: is a video's own"),
        ([{"queue": "fast", "queue.stride": 2}], "queue is set as a whole as well"),
    ],
)
def test_settings_that_cannot_be_are_told_before_anything_runs(cells: Any, message: str):
    with pytest.raises(ValueError, match=message):
        cells_of(ablation(cells=cells), "grid")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a", "need a mapping"),
        ("name: x", "cells: field required"),
        ("name: x\ncells: [{}]\nvideo: 3", "video: .*known keys: name, videos"),
    ],
)
def test_a_file_that_is_no_ablation_is_told_in_one_line(tmp_path: Path, text: str, message: str):
    path = tmp_path / "grid.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        read_ablation(path)
    assert "\n" not in str(caught.value)


def test_a_cell_whose_defaults_change_is_another(monkeypatch: pytest.MonkeyPatch):
    (cell,) = cells_of(ablation(cells=[{"cache.method": ["taylor"]}]), "x")[1:]
    before = cell.digest()
    monkeypatch.setitem(settings.DEFAULTS, "taylor", (None, 4, 1, 2, 1))
    assert cell.digest() != before


def test_more_videos_have_the_prompts_of_fewer_and_further_ones():
    few, many = (prompts_of(ablation(cells=[{}], videos=count)) for count in (4, 9))
    assert many[:4] == few and len(set(many)) == 9
    given = prompts_of(ablation(cells=[{}], videos=3, prompts=["a", "b"]))
    assert given == ["a", "b", "a"]


def row(name: str, speed: float, points: float) -> dict[str, Any]:
    return {"cell": name, "speed_up": speed, "adherence_points": points}


def test_the_front_are_those_that_no_other_beats():
    rows = [
        row("exact", 1, 0),
        row("worse", 0.9, -1),
        row("fast", 3, -5),
        row("good", 2, -1),
        row("bad", 2, -4),
    ]
    assert [found["cell"] for found in front(rows, "adherence_points")] == ["exact", "good", "fast"]
    best = best_within(rows, 2)
    assert best is not None and best["cell"] == "good"
    assert best_within([row("fast", 3, -5)], 2) is None
