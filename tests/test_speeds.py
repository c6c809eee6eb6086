"""Levels of speed: what they set, what they leave, and that their figures are those of the ablation."""

import json
from pathlib import Path

import pytest

from vidgen.config import dump_job, frames_digest, parse_job, resolve
from vidgen.speeds import LEVELS, describe
from vidgen.types import Recommended

PROMPT = "a red circle moving left over a gray background"
RESULTS = Path(__file__).parent.parent / "tools" / "results" / "ablate_speed.json"


def resolved(**settings):
    return resolve(parse_job({"prompt": PROMPT, **settings}), Recommended())


def test_exact_is_the_default_to_the_last_setting():
    assert resolved(speed="exact") == resolved()
    assert frames_digest(resolved(speed="exact")) == frames_digest(resolved())
    assert resolved().cache.method == "none"


@pytest.mark.parametrize("speed", LEVELS)
def test_a_level_fills_in_its_settings_and_is_then_forgotten(speed):
    job, level = resolved(speed=speed), LEVELS[speed]
    assert job.speed is None and job.cache == level.cache
    assert job.queue.residual_guidance == level.residual_guidance
    assert job.queue.block_frames == level.longer_blocks * Recommended().block_frames
    assert job.queue.stride == (1 if level.blocks_at_once is None else 20 // level.blocks_at_once)
    # what is stored goes on the same whatever a later version's levels are
    stored = dump_job(job)
    assert "speed: null" in stored and f"method: {level.cache.method}" in stored


@pytest.mark.parametrize("speed", LEVELS)
def test_what_a_job_says_itself_wins_over_its_level(speed):
    mine = {"block_frames": 3, "residual_guidance": "self", "stride": 2}
    job = resolved(speed=speed, cache={"method": "mag", "threshold": 0.01}, queue=mine)
    assert (job.cache.method, job.cache.threshold) == ("mag", 0.01)
    assert (job.queue.block_frames, job.queue.residual_guidance, job.queue.stride) == (3, "self", 2)


@pytest.mark.parametrize(
    "both", [{"parallel": {"ranks": 2, "guidance": 2}}, {"queue": {"guidance": "stacked"}}]
)
def test_branches_of_guidance_that_run_at_once_are_left_to_do_so(both):
    assert resolved(speed="fast", **both).queue.residual_guidance == "none"


@pytest.mark.parametrize("speed", LEVELS)
def test_timetables_that_have_their_own_blocks_and_strides_keep_them(speed):
    fifo = resolved(speed=speed, queue={"timetable": "fifo"}).queue
    assert (fifo.block_frames, fifo.stride) == (1, 1)
    assert resolved(speed=speed, queue={"timetable": "autoregressive"}).queue.stride == 1


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"cache": {"method": "taylor"}}, "cache=taylor"),
        ({"attention": {"sparsity": {"policy": "adaspa"}}}, "sparsity=adaspa"),
        ({"queue": {"residual_guidance": "self"}}, "residual_guidance=self"),
        ({"queue": {"static_threshold": 0.9}}, "static_threshold=0.9"),
        ({"queue": {"timetable": "pipefusion"}}, "timetable=pipefusion"),
    ],
)
def test_exact_with_an_approximation_is_refused_in_one_line(settings, named):
    with pytest.raises(ValueError, match=f"^speed=exact with {named}, an approximation: leave one"):
        resolved(speed="exact", **settings)


def test_a_level_that_is_none_is_refused_with_those_there_are():
    with pytest.raises(ValueError, match="speed='fastest'.*'exact', 'balanced' or 'fast'"):
        parse_job({"prompt": PROMPT, "speed": "fastest"})


@pytest.mark.parametrize("speed", LEVELS)
def test_a_level_says_what_the_ablation_measured(speed):
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    (row,) = [row for row in results["cells"] if row["settings"].get("speed") == speed]
    said = describe(speed)
    (exact,) = [row for row in results["cells"] if row["cell"] == "exact"]
    assert f"{row['speed_up']:.1f} times" in said
    assert f"{row['adherence_all']} windows" in said and f"exact {exact['adherence_all']}" in said
    assert row["adherence_points"] >= -2 or speed == "fast"
