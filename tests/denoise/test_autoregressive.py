"""A block at a time: blocks never overlap, so that what is asked for shows in the next one."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from vidgen.conditioning.prompts import BlockTexts, PromptChange, Timeline
from vidgen.config import frames_digest, parse_job
from vidgen.denoise.loop import LoopState, Task, denoise, run_tick
from vidgen.denoise.timetable import Timetable, autoregressive, dualparal
from vidgen.engine import Engine
from vidgen.live import Live, Wish
from vidgen.media.source import VideoSource
from vidgen.render import render
from vidgen.types import ContextMode, Segment

MakeTask = Callable[..., Task]
modes = pytest.mark.parametrize("mode", ContextMode)


def made(mode: ContextMode = ContextMode.RECOMPUTE, frames: int = 7, steps: int = 3) -> Timetable:
    return autoregressive(frames, steps, block_frames=2, context_frames=1, mode=mode)


@modes
def test_it_is_the_queue_whose_stride_is_the_number_of_steps(mode: ContextMode):
    queue = dualparal(7, 3, block_frames=2, context_frames=1, stride=3, mode=mode)
    assert made(mode) == queue
    assert list(made(mode).ticks()) == list(queue.ticks())


@modes
def test_one_block_runs_in_a_tick_and_reads_only_what_is_finished(mode: ContextMode):
    timetable = made(mode)
    for tick in timetable.ticks():
        (forward,) = tick
        assert forward.after_kv is None
        if forward.block and mode is ContextMode.RECOMPUTE:
            assert forward.before_latents is not None
            assert forward.before_latents.step == timetable.num_steps  # clean
        elif forward.block:
            assert forward.before_kv is not None
            assert forward.before_kv.step == timetable.num_steps - 1  # the last forward's, not a clean pass's


@pytest.mark.parametrize("change_after", [0, 1, 3, 4, 6, 7])
@modes
def test_another_prompt_shows_in_the_next_block_to_begin_and_in_none_before(
    mode: ContextMode, change_after: int, task: MakeTask, latents: Any
):
    plain = task(made(mode), guidance_scale=2.0)
    timetable = plain.timetable
    one, other = plain.texts(timetable.block(0))[0], plain.texts(timetable.block(1))[0]

    def with_timeline() -> tuple[Task, Timeline]:
        segments = (Segment(prompt="one", num_frames=timetable.num_frames),)
        timeline = Timeline(segments, first_frame=lambda block: block * timetable.block_frames)
        texts = BlockTexts(timeline, "", {"one": one, "other": other, "": torch.zeros_like(one)})
        return replace(plain, texts=texts), timeline

    unchanged = latents(with_timeline()[0])
    changed, timeline = with_timeline()
    state, found = LoopState(), list[Tensor]()
    for _ in range(change_after):
        found += [done.latents_BCFYX for done in run_tick(changed, state)]
    first = -(-change_after // timetable.stride)  # the first block that has not begun
    timeline.change(PromptChange(prompt="other", first_block=first))
    found += [done.latents_BCFYX for done in denoise(changed, state)]
    same = [torch.equal(a, b) for a, b in zip(found, unchanged, strict=True)]
    assert same == [block < first for block in range(timetable.num_blocks)]


def frames(video: Path) -> Any:
    with VideoSource(video) as source:
        return source.frames(range(source.num_frames))


def test_a_wish_during_a_render_shows_one_block_later(tmp_path: Path):
    engine, seen = Engine.from_pretrained(), dict[str, int]()

    def job(name: str) -> Any:
        return parse_job(
            {
                "prompt": "a red circle moving left over a gray background",
                "num_frames": 64,
                "num_inference_steps": 2,
                "queue": {"timetable": "autoregressive"},
                "output": {"path": tmp_path / name, "sheet": False, "crf": 0},
            }
        )

    asked = [0]

    def wishes() -> list[Wish]:  # asked after every tick; the third is the first of block 1
        asked[0] += 1
        return [Wish(id="blue", prompt="a blue square moving up")] if asked[0] == 3 else []

    live = Live(
        engine=engine, wishes=wishes, applied=lambda wish, block, frame: seen.update({wish.id: frame})
    )
    render(job("changed.mp4"), live=live)
    render(job("plain.mp4"), live=Live(engine=engine))
    assert seen == {"blue": 32}
    changed, plain = frames(tmp_path / "changed.mp4"), frames(tmp_path / "plain.mp4")
    assert (changed[:32] == plain[:32]).all()
    assert (changed[32:48] != plain[32:48]).any()


def test_a_job_says_it_by_name_and_another_stride_is_refused():
    engine = Engine.from_pretrained(with_dit=False)
    values = {"prompt": "a red circle", "num_frames": 40, "num_inference_steps": 4}

    def timetable(**queue: Any) -> Timetable:
        return engine.plan(parse_job({**values, "queue": queue})).task.timetable

    assert timetable(timetable="autoregressive") == timetable(timetable="dualparal", stride=4)
    assert timetable(timetable="autoregressive", stride=4) == timetable(timetable="autoregressive")
    with pytest.raises(ValueError, match=r"^stride=2: timetable=autoregressive .* every 4 ticks"):
        timetable(timetable="autoregressive", stride=2)


def test_its_frames_digest_is_its_own():
    values = {"prompt": "a red circle", "num_frames": 40}
    digests = {
        frames_digest(parse_job({**values, "queue": {"timetable": name}}))
        for name in ("dualparal", "autoregressive")
    }
    assert len(digests) == 2
