"""Nothing finished is ever lost: a job that was stopped or killed ends in the frames it would have had."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from vidgen.config import parse_job
from vidgen.journal import JobInUse, Journal
from vidgen.media.source import VideoSource
from vidgen.render import render, resume
from vidgen.run import Interrupted

NUM_KILLS = 4
QUEUES = {
    "recompute": {"block_frames": 2, "context_frames": 1},
    "cache": {"block_frames": 2, "context_frames": 2, "context_mode": "cache"},
    "cache-anchor-stride": {
        "block_frames": 2,
        "context_frames": 1,
        "context_mode": "cache",
        "anchor_frames": 2,
        "stride": 2,
    },
    "full": {"timetable": "full"},
}


def job(output: Path, queue: dict[str, Any], **settings: Any) -> Any:
    return parse_job(
        {
            "prompt": "a blue square moving up over a white background",
            "num_frames": 37,
            "num_inference_steps": 3,
            "state_every": 2,
            "queue": queue,
            "output": {"path": output, "sheet": False},
            **settings,
        }
    )


def frames(video: Path) -> np.ndarray:
    with VideoSource(video) as source:
        return source.frames(range(source.num_frames))


def test_killed_at_random_points_the_job_resumes_to_the_same_frames(tmp_path: Path) -> None:
    script = Path(__file__).with_name("killed_render.py")
    done = subprocess.run(
        [sys.executable, script, tmp_path, "0", str(NUM_KILLS)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) == NUM_KILLS
    for row in rows:
        assert row["killed"] == -9 and row["resumed"] == 0 and row["same"], row
    assert any(row["playable"] for row in rows), "some kill leaves a file that plays"
    assert all(row["playable"] != 0 for row in rows), rows


SMALL_BLOCKS = {"query_block": 16, "key_block": 16, "dense_above": 1.0, "search_at": [0.2, 0.6]}
SPARSITIES = {
    "adaspa": {"policy": "adaspa", "density": 0.5, "restore": True, "restore_drift": 0.1, **SMALL_BLOCKS},
    "svg2": {"policy": "svg2", "top_p": 0.5, "query_clusters": 3, "key_clusters": 4, **SMALL_BLOCKS},
}


@pytest.mark.parametrize(
    ("queue", "settings"),
    [
        *((queue, {}) for queue in QUEUES.values()),
        *((QUEUES["recompute"], {"attention": {"sparsity": sparsity}}) for sparsity in SPARSITIES.values()),
    ],
    ids=[*QUEUES, *SPARSITIES],
)
def test_stopped_after_every_tick_the_job_resumes_to_the_same_file(
    tmp_path: Path, queue: Any, settings: Any
) -> None:
    settings = settings and {"num_inference_steps": 5, **settings}
    render(job(tmp_path / "whole.mp4", queue, **settings))
    config, folder = job(tmp_path / "cut.mp4", queue, **settings), tmp_path / "cut.job"
    with pytest.raises(Interrupted):
        render(config, should_stop=lambda: True)
    stops = 1
    while not (tmp_path / "cut.mp4").exists():
        try:
            resume(folder, should_stop=lambda: True)
        except Interrupted:
            stops += 1
    assert stops >= 2
    for part in ("latents", "segments"):  # where they part first says what to look at
        for whole in sorted((tmp_path / "whole.job" / part).iterdir()):
            assert (folder / part / whole.name).read_bytes() == whole.read_bytes(), whole.name
    assert np.array_equal(frames(tmp_path / "cut.mp4"), frames(tmp_path / "whole.mp4"))


def test_a_damaged_segment_is_made_again_from_its_latents(tmp_path: Path) -> None:
    render(job(tmp_path / "whole.mp4", QUEUES["recompute"]))
    ticks = iter(range(100))
    with pytest.raises(Interrupted):
        render(job(tmp_path / "cut.mp4", QUEUES["recompute"]), should_stop=lambda: next(ticks) == 4)
    segment = tmp_path / "cut.job" / "segments" / "000001.m4s"
    segment.write_bytes(segment.read_bytes()[:-7] + b"damaged")
    resume(tmp_path / "cut.job")
    assert np.array_equal(frames(tmp_path / "cut.mp4"), frames(tmp_path / "whole.mp4"))


def test_a_damaged_state_falls_back_to_the_one_before(tmp_path: Path) -> None:
    render(job(tmp_path / "whole.mp4", QUEUES["cache"]))
    ticks = iter(range(100))
    with pytest.raises(Interrupted):
        render(job(tmp_path / "cut.mp4", QUEUES["cache"]), should_stop=lambda: next(ticks) == 4)
    newest = max((tmp_path / "cut.job" / "state").iterdir())
    newest.write_bytes(b"damaged")
    resume(tmp_path / "cut.job")
    assert np.array_equal(frames(tmp_path / "cut.mp4"), frames(tmp_path / "whole.mp4"))


def test_a_job_folder_serves_one_process_at_a_time(tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        render(job(tmp_path / "cut.mp4", QUEUES["recompute"]), should_stop=lambda: True)
    with Journal(tmp_path / "cut.job"), pytest.raises(JobInUse, match="in use"):
        resume(tmp_path / "cut.job")


def test_a_finished_job_resumes_to_itself(tmp_path: Path) -> None:
    render(job(tmp_path / "out.mp4", QUEUES["recompute"]))
    before = (tmp_path / "out.mp4").read_bytes()
    resume(tmp_path / "out.job")
    assert (tmp_path / "out.mp4").read_bytes() == before


def test_a_job_folder_may_be_moved(tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        render(job(tmp_path / "out.mp4", QUEUES["recompute"]), should_stop=lambda: True)
    (tmp_path / "out.job").rename(tmp_path / "elsewhere.job")
    assert resume(tmp_path / "elsewhere.job").output == tmp_path / "out.mp4"


@pytest.mark.parametrize(
    ("key", "changed", "is_refused"),
    [
        ("seed", 9, True),
        ("num_inference_steps", 4, True),
        ("state_every", 3, False),
        ("parallel", {"ranks": 1}, False),
    ],
)
def test_a_job_whose_settings_changed_is_refused_if_they_decide_a_frame(
    tmp_path: Path, key: str, changed: Any, is_refused: bool
) -> None:
    with pytest.raises(Interrupted):
        render(job(tmp_path / "v.mp4", QUEUES["recompute"]), should_stop=lambda: True)
    file = tmp_path / "v.job" / "job.yaml"
    values = yaml.safe_load(file.read_text())
    file.write_text(yaml.safe_dump(values | {key: changed}))
    if not is_refused:
        resume(tmp_path / "v.job")
        return
    before = {path: path.read_bytes() for path in (tmp_path / "v.job").rglob("*.*") if path.is_file()}
    with pytest.raises(ValueError, match="not those that this job began with"):
        resume(tmp_path / "v.job")
    assert before == {path: path.read_bytes() for path in before}
