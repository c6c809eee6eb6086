"""`vidgen bench redundancy`: its files, its words, and what it refuses."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SMALL = ("bench", "redundancy", "--num-frames", 9, "--num-inference-steps", 4, "--prompt", "a red circle")


def test_figures_and_plots_are_written_once(
    run: Callable[..., Any], refused: Callable[..., str], tmp_path: Path
):
    ran = run(*SMALL, "--timetable", "full", "--seed", 3, "-o", "found")
    assert ran.code == 0 and "noise level" in ran.out and "written  found/redundancy.png" in ran.out
    found = json.loads((tmp_path / "found" / "redundancy.json").read_text())
    assert found.keys() == {
        "machine", "settings", "model_sha256", "num_series", "branches", "noise_levels", "curves", "layers",
        "attention", "says",
    }  # fmt: skip
    assert found["settings"]["seed"] == 3 and found["settings"]["prompts"] == ["a red circle"]
    assert found["num_series"] == 2 and len(found["noise_levels"]) == 4
    assert found["curves"]["output_change"].keys() == {"mean", "least", "most", "prompt", "no prompt"}
    assert [len(row) for row in found["layers"]["residual_change"]] == [4] * 6
    assert all(sentence in ran.out for sentence in found["says"]) and 2 <= len(found["says"]) <= 4
    assert {path.name for path in (tmp_path / "found").iterdir()} == {"redundancy.json", "redundancy.png"}
    said = refused(*SMALL, "-o", "found")
    assert "--output found: is not empty; choose another name or add --overwrite" in said


def test_overwriting_replaces_these_two_files_only(
    run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from vidgen.bench import redundancy_plot

    monkeypatch.setattr(redundancy_plot, "draw", lambda found: b"new")  # it takes a second
    folder = tmp_path / "found"
    folder.mkdir()
    (folder / "redundancy.json").write_text("old")
    (folder / "mine.txt").write_text("mine")
    assert run(*SMALL, "-o", folder, "--overwrite").code == 0
    assert (folder / "mine.txt").read_text() == "mine"
    assert json.loads((folder / "redundancy.json").read_text())["num_series"] == 2
    assert (folder / "redundancy.png").read_bytes() == b"new"


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (("--model", "other"), "model=other: needs --prompt TEXT"),
        (("--timetable", "none"), "queue.timetable"),
        (("-o", "file"), "--output file: is a file; give a folder"),
    ],
    ids=lambda value: str(value),
)
def test_what_cannot_be_is_refused_in_a_line(
    flags: tuple[str, ...], reason: str, refused: Callable[..., str], tmp_path: Path
):
    (tmp_path / "file").touch()
    assert reason in refused("bench", "redundancy", "-o", "found", *flags)
