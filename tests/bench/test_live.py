"""The bench of low delay runs at small sizes, and what it says adds up. No time is judged."""

import math

import pytest

from vidgen.bench import live
from vidgen.engine import Engine


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine.from_pretrained()


def test_guidance_rows_count_the_runs_and_compare_with_both_branches(engine: Engine):
    rows = {row["guidance"]: row for row in live.bench_guidance(1, 3, engine)}
    runs = {name: row["runs"] for name, row in rows.items()}
    assert (runs["both branches"], runs["onetime"], runs["self"], runs["no guidance"]) == (6, 4, 3, 3)
    assert rows["both branches"]["PSNR"] == math.inf and rows["both branches"]["speed-up"] == 1
    assert all(10 < row["PSNR"] < 60 for name, row in rows.items() if name != "both branches")
    assert all(row["all"] in ("0/1", "1/1") and row["ms a clip"] > 0 for row in rows.values())


def test_still_rows_repeat_blocks_of_still_scenes_only(engine: Engine, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(live, "THRESHOLDS", (None, 0.7))
    monkeypatch.setattr(live, "VIDEO_STEPS", 3)
    monkeypatch.setattr(live, "VIDEO_FRAMES", 96)
    still, still_filtered, moving, moving_filtered = live.bench_still(1, engine)
    assert still["repeated"] == moving["repeated"] == moving_filtered["repeated"] == "0/6"
    assert int(still_filtered["repeated"].split("/")[0]) > 0
    assert moving_filtered["PSNR"] == math.inf > still_filtered["PSNR"] > 20


def test_timetable_rows_tell_the_delays_of_a_full_queue(engine: Engine, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(live, "VIDEO_STEPS", 4)
    monkeypatch.setattr(live, "VIDEO_FRAMES", 48)
    rows = {row["timetable"]: row for row in live.bench_timetables(1, engine)}
    assert rows.keys() == live.TIMETABLES.keys()
    by_block = rows["autoregressive"]
    # 3 blocks of 4 steps: a change waits for two of them, the first frames for one
    assert by_block["change ms"] == pytest.approx(2 * by_block["first frames ms"], abs=2)
    assert by_block["ms a frame"] * 48 == pytest.approx(3 * by_block["first frames ms"], rel=0.05)
    for row in rows.values():
        assert row["windows right"].endswith("/3") and row["border jump"] > 0
