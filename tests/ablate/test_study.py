"""Ablations of the built-in model from grid to report, and what is left of one that was stopped."""

import json
from pathlib import Path
from typing import Any

import pytest

from vidgen.ablate.report import write_report
from vidgen.ablate.settings import AblationConfig, cells_of
from vidgen.ablate.study import Stopped, Study

SMALL = {"num_frames": 17, "num_inference_steps": 6}
GRID = [
    {"cache.method": "taylor", "cache.warm_up_steps": 1},
    {"queue.timetable": "buffer", "cache.method": "taylor"},
]


def study(folder: Path, videos: int, grid: list[dict[str, Any]] = GRID, timeout_s: float = 300) -> Study:
    config = AblationConfig.model_validate({"name": "small", "videos": videos, "job": SMALL, "cells": grid})
    return Study(config, cells_of(config, "grid"), folder, timeout_s)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Study, list[dict[str, Any]]]:
    made = study(tmp_path_factory.mktemp("ablation") / "out", 2)
    rows = made.run(lambda row: None)
    write_report(made, rows)
    return made, rows


def test_each_cell_has_its_figures_and_an_impossible_one_its_reason(done: Any):
    exact, cached, impossible = done[1]
    assert (exact["psnr"], exact["speed_up"], exact["skipped"]) == (None, 1.0, 0.0)
    assert exact["adherence_points"] == 0 and exact["tflops"] > 0 and exact["memory_mib"] > 0
    assert 0 < cached["skipped"] < 1 and cached["psnr"] > 0
    assert cached["tflops"] == pytest.approx(exact["tflops"] * (1 - cached["skipped"]), rel=0.01)
    assert impossible["state"] == "impossible" and "buffer" in impossible["why"]


def test_the_report_stands_alone_and_names_every_cell(done: Any):
    made, rows = done
    page = (made.folder / "report.html").read_text()
    assert all(row["cell"] in page for row in rows)
    assert "data:image/png;base64," in page and 'src="http' not in page and "href=" not in page
    found = json.loads((made.folder / "results.json").read_text())
    assert [row["cell"] for row in found["cells"]] == [row["cell"] for row in rows]
    assert len((made.folder / "results.csv").read_text().splitlines()) == 1 + len(rows)
    assert (made.folder / "sheet_1.png").read_bytes()[:4] == b"\x89PNG"


def test_made_again_it_renders_nothing_again(done: Any, monkeypatch: pytest.MonkeyPatch):
    made, rows = done
    monkeypatch.setattr("vidgen.ablate.rendering.Worker._start", pytest.fail)
    again = study(made.folder, 2, GRID[:1]).run(lambda row: None)
    assert again == rows[:2]


def test_stopped_it_goes_on_with_the_videos_that_are_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    asked = iter([False, False, False, True])  # three videos: the exact cell's, and one of the next
    with pytest.raises(Stopped):
        study(tmp_path / "out", 2, GRID[:1]).run(lambda row: None, lambda: next(asked))
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.safetensors")}
    assert len(kept) == 3
    rows = study(tmp_path / "out", 2, GRID[:1]).run(lambda row: None)
    assert [row["state"] for row in rows] == ["done", "done"]
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in kept.items())


def test_a_cell_that_takes_too_long_fails_and_says_so(tmp_path: Path):
    with pytest.raises(ValueError, match=r"exact cell.*no video after 0.01 s"):
        study(tmp_path / "out", 1, GRID[:1], timeout_s=0.01).run(lambda row: None)


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="not an ablation's folder"):
        study(tmp_path, 1)
