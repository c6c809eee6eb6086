"""A prompt that changes mid-way: the verdicts are of the blocks and scenes they say, and come out the same
again."""

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from vidgen.builtin import SmallModel, load_small
from vidgen.measure import switch
from vidgen.measure.adherence import FACTORS
from vidgen.measure.generate import Queue, generate, generate_segments
from vidgen.measure.switch import measure_switch, pick_pairs
from vidgen.types import Segment
from vidgen.world import parse_caption, render_clips


@pytest.fixture(scope="module")
def model() -> SmallModel:
    return load_small()


def test_scenes_before_and_after_differ_in_every_factor():
    pairs = pick_pairs(40, seed=3)
    assert all(getattr(old, f) != getattr(new, f) for old, new in pairs for f in FACTORS)
    assert pairs == pick_pairs(40, seed=3) != pick_pairs(40, seed=4)


def real(late_by: int, spoils_old: bool = False):
    """Instead of a model: real clips of the two scenes, the second one late by so many blocks of 16
    frames."""

    def make(_model, segments: tuple[Segment, ...], *, seed: int, **_) -> Tensor:
        old, new = (parse_caption(segment.prompt) for segment in segments)
        frames_each = segments[0].num_frames
        parts = [
            render_clips([scene], num_frames=num_frames, size=32, rng=random.Random(seed))[0]
            for scene, num_frames in ((old, frames_each + 16 * late_by), (new, frames_each - 16 * late_by))
            if num_frames
        ]
        video = torch.cat(parts, dim=1)
        if spoils_old:
            video[:, frames_each - 8 : frames_each] = 0
        return video

    return make


@pytest.mark.parametrize(
    ("late_by", "in_time", "shown"),
    [(0, "3/3", {"1": 3}), (1, "3/3", {"2": 3}), (2, "0/3", {"3": 3}), (4, "0/3", {"never": 3})],
)
def test_a_prompt_shows_in_the_block_in_which_it_shows(monkeypatch, model, late_by, in_time, shown):
    monkeypatch.setattr(switch, "generate_segments", real(late_by))
    found = measure_switch(model, num_prompts=3, seed=0, blocks_each=4)
    assert found["in_time"] == in_time and found["shown"] == shown
    assert found["old_before"] == "3/3" and found["old_blocks"] == ["3/3"] * 4
    assert found["new_blocks"] == [f"{3 * (place >= late_by)}/3" for place in range(4)]


def test_an_old_prompt_that_is_spoiled_before_the_change_is_told(monkeypatch, model):
    monkeypatch.setattr(switch, "generate_segments", real(0, spoils_old=True))
    found = measure_switch(model, num_prompts=3, seed=0, blocks_each=4)
    assert found["old_before"] == "0/3" and found["old_blocks"] == ["3/3", "3/3", "3/3", "0/3"]
    assert found["in_time"] == "3/3"


def test_the_models_own_videos_are_judged_and_kept(model, tmp_path: Path):
    path = tmp_path / "kept.jsonl"
    quick = replace(model.recommended, num_inference_steps=4)
    found = measure_switch(model, num_prompts=1, seed=0, blocks_each=2, settings=quick, keep=path)
    assert found["prompts"] == 1 and len(found["old_blocks"]) == len(found["new_blocks"]) == 2
    assert measure_switch(model, num_prompts=1, seed=0, blocks_each=2, settings=quick, keep=path) == found
    with pytest.raises(ValueError, match="give another file"):
        measure_switch(model, num_prompts=1, seed=1, blocks_each=2, settings=quick, keep=path)


def test_blocks_too_short_to_judge_are_an_error(model):
    with pytest.raises(ValueError, match="block_frames=1: need 8 pixel frames"):
        measure_switch(
            model,
            num_prompts=1,
            seed=0,
            settings=replace(model.recommended, block_frames=1, context_frames=1),
        )


def test_one_segment_is_the_video_of_its_prompt(model):
    settings = replace(model.recommended, num_inference_steps=3)
    segment = Segment(prompt="a red circle moving left over a gray background", num_frames=30)
    one = generate_segments(model, (segment,), seed=5, settings=settings)
    same = generate(model, segment.prompt, num_frames=30, seed=5, settings=settings, long=True)
    assert one.shape == (3, 30, 32, 32) and torch.equal(one, same)


@pytest.mark.parametrize(
    "queue",
    [
        Queue(timetable="autoregressive"),
        Queue(timetable="buffer", stride=2),
        Queue(stride=2),
        Queue(transition_blocks=1),
    ],
)
def test_every_queue_makes_a_video_of_its_own(model, queue):
    settings = replace(model.recommended, num_inference_steps=4)
    segments = tuple(
        Segment(prompt=f"a red circle moving {way} over a gray background", num_frames=16)
        for way in ("left", "up")
    )
    plain = generate_segments(model, segments, seed=0, settings=settings)
    other = generate_segments(model, segments, seed=0, settings=settings, queue=queue)
    assert other.shape == plain.shape and not torch.equal(other, plain)


def test_an_unknown_timetable_is_an_error(model):
    with pytest.raises(ValueError, match="timetable=fifo: there are dualparal, autoregressive, buffer, full"):
        generate_segments(
            model, (Segment(prompt="a red circle", num_frames=16),), seed=0, settings=model.recommended,
            queue=Queue(timetable="fifo"),
        )  # fmt: skip
