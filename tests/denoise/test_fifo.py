"""FIFO: the queue with blocks of one frame, each at a step of its own."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vidgen.config import parse_job
from vidgen.denoise.timetable import dualparal, fifo
from vidgen.engine import Engine
from vidgen.types import ContextMode


@given(st.integers(1, 20), st.integers(1, 7))
def test_every_frame_is_at_a_step_of_its_own_and_as_many_live_as_there_are_steps(frames: int, steps: int):
    timetable = fifo(frames, steps)
    assert timetable == dualparal(frames, steps, block_frames=1, context_frames=1)
    for tick, forwards in enumerate(timetable.ticks()):
        at = {forward.block: forward.step for forward in forwards}
        assert at == {frame: tick - frame for frame in range(frames) if 0 <= tick - frame < steps}
        if steps - 1 <= tick < frames:  # full: one enters as noise, one leaves clean
            assert sorted(at.values()) == list(range(steps))


@given(st.integers(0, 1), st.sampled_from(ContextMode), st.integers(0, 1))
def test_it_takes_what_the_queue_takes(context: int, mode: ContextMode, anchor: int):
    more: dict[str, Any] = {"context_frames": context, "mode": mode, "anchor_frames": anchor}
    assert fifo(9, 4, **more) == dualparal(9, 4, block_frames=1, **more)


def test_a_job_says_it_in_one_word_and_one_line_says_what_does_not_go_with_it():
    engine = Engine.from_pretrained(with_dit=False)

    def plan(**queue: Any) -> Any:
        values = {"prompt": "a red circle", "num_frames": 65, "num_inference_steps": 4}
        return engine.plan(parse_job({**values, "queue": {"timetable": "fifo", **queue}}))

    made = plan()
    assert made.task.timetable == fifo(17, 4)
    assert (made.job.queue.block_frames, made.job.queue.context_frames) == (1, 1)
    assert plan(**made.job.queue.model_dump(exclude={"timetable"})).task.timetable == fifo(17, 4)
    assert plan(context_frames=0, stride=2).task.timetable == fifo(17, 4, context_frames=0, stride=2)
    with pytest.raises(
        ValueError, match="^block_frames=4: timetable=fifo has blocks of one frame; leave it out$"
    ):
        plan(block_frames=4)
    with pytest.raises(ValueError, match="^context_frames=2: allowed is 0 to 1$"):
        plan(context_frames=2)
