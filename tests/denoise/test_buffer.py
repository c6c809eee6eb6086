"""The moving buffer: all live blocks, each at its own level, in one window that is one forward."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from vidgen.config import parse_job
from vidgen.denoise.attending import Sparsity
from vidgen.denoise.loop import LoopState, Task, run_tick
from vidgen.denoise.timetable import Timetable, autoregressive, dualparal, full, moving_buffer
from vidgen.engine import Engine
from vidgen.journal import Journal
from vidgen.limits import memory_bytes
from vidgen.sparsity.making import make_policy
from vidgen.sparsity.settings import SparsitySettings
from vidgen.types import ContextMode, ResidualGuidance

MakeTask = Callable[..., Task]
TOLERANCE = 3e-6  # as in test_specification.py
BUFFERS = {
    "two-chunks": moving_buffer(9, 4, block_frames=2, context_frames=0, stride=2),
    "context": moving_buffer(9, 4, block_frames=2, context_frames=1, stride=2),
    "every-tick": moving_buffer(7, 3, block_frames=2, context_frames=2),
    "uneven": moving_buffer(8, 5, block_frames=2, context_frames=1, stride=2),
    "frame-by-frame": moving_buffer(5, 4, block_frames=1, context_frames=1),
    "short": moving_buffer(3, 6, block_frames=4, context_frames=2),
}
buffers = pytest.mark.parametrize("timetable", BUFFERS.values(), ids=BUFFERS)


@st.composite
def timetables(draw: st.DrawFn) -> Timetable:
    steps, block = draw(st.integers(1, 7)), draw(st.integers(1, 4))
    return moving_buffer(
        draw(st.integers(1, 25)), steps, block_frames=block,
        context_frames=draw(st.integers(0, block)), stride=draw(st.integers(1, steps)),
    )  # fmt: skip


@given(timetables())
def test_each_block_takes_each_step_once_in_the_tick_of_the_queue(timetable: Timetable):
    taken: dict[int, list[int]] = {}
    for tick, forwards in enumerate(timetable.ticks()):
        (forward,) = forwards
        assert [block for block, _ in forward.parts] == list(timetable.live(tick))
        for block, step in forward.parts:
            assert tick == timetable.admission_tick(block) + step
            taken.setdefault(block, []).append(step)
    assert taken == {block: list(range(timetable.num_steps)) for block in range(timetable.num_blocks)}
    assert timetable.num_forwards == timetable.num_ticks
    assert timetable.forwards(timetable.num_ticks) == ()


@given(timetables())
def test_the_buffer_fills_by_a_block_a_shift_moves_and_empties(timetable: Timetable):
    most = -(-timetable.num_steps // timetable.stride)
    sizes = [len(forward.parts) for (forward,) in timetable.ticks()]
    assert max(sizes) == min(most, timetable.num_blocks)
    assert sizes[0] == sizes[-1] == 1
    for tick, (forward,) in enumerate(timetable.ticks()):
        levels = [step for _, step in forward.parts]
        assert levels == sorted(levels, reverse=True)  # oldest cleanest
        assert all(a - b == timetable.stride for a, b in zip(levels, levels[1:], strict=False))
        read = forward.before_latents
        if read is not None:  # of the block that left last, which is clean
            assert (read.block, read.step) == (forward.block - 1, timetable.num_steps)
            assert timetable.last_tick(read.block) < tick
            assert read.block in timetable.kept_after(tick - 1)
        assert (read is not None) == (forward.block > 0 and timetable.context_frames > 0)


def plain_latents(plain: Any, made: Task, scale: float) -> list[Tensor]:
    """The paper's buffer written out: a list of chunks, micro-steps, then a shift. Slow, in float64."""
    timetable, levels = made.timetable, made.noise_levels
    model = copy.deepcopy(made.model).double()
    num_blocks, context = timetable.num_blocks, timetable.context_frames
    buffer: list[tuple[int, int, Tensor]] = []  # (block, steps done, latents [C, F, Y, X])
    clean: list[Tensor] = []
    entered = tick = 0
    while len(clean) < num_blocks:
        if tick % timetable.stride == 0 and entered < num_blocks:
            buffer.append((entered, 0, made.noise(timetable.block(entered))[0].double()))
            entered += 1
        before = clean[-1][:, -context:] if clean and context else buffer[0][2][:, :0]
        window = torch.cat([before, *(latents for _, _, latents in buffer)], dim=1)
        window_levels = [0.0] * before.shape[1]
        for _, done, latents in buffer:
            window_levels += [levels[done]] * latents.shape[1]
        texts = [text[0].double() for text in made.texts(timetable.block(buffer[-1][0]))]
        said = [plain.plain_forward(model, window, window_levels, text, [], [])[0] for text in texts]
        velocity = said[1] + scale * (said[0] - said[1])
        parts = velocity[:, before.shape[1] :].split([latents.shape[1] for _, _, latents in buffer], dim=1)
        buffer = [
            (block, done + 1, latents + (levels[done + 1] - levels[done]) * part)
            for (block, done, latents), part in zip(buffer, parts, strict=True)
        ]
        if buffer[0][1] == timetable.num_steps:
            clean.append(buffer.pop(0)[2])
        tick += 1
    return clean


@buffers
def test_the_loop_equals_the_buffer_written_out(
    timetable: Timetable, task: MakeTask, latents: Any, plain: Any
):
    made = task(timetable, guidance_scale=2.0)
    found, expected = latents(made), plain_latents(plain, made, 2.0)
    largest = max(block.abs().max() for block in expected)
    for one, other in zip(found, expected, strict=True):
        assert (one[0] - other).abs().max() < TOLERANCE * largest


def test_chunks_in_a_buffer_see_one_another(task: MakeTask, latents: Any, plain: Any):
    """Else the law above would hold of a model that looks at nothing."""
    joint = task(BUFFERS["two-chunks"])
    apart = replace(joint, timetable=replace(joint.timetable, joint=False))
    for one, other in zip(latents(joint), latents(apart), strict=True):
        assert (one - other).abs().max() > 0.01 * other.abs().max()


@pytest.mark.parametrize("context", [0, 1, 2])
def test_a_buffer_of_one_chunk_is_autoregressive_bit_for_bit(context: int, task: MakeTask, latents: Any):
    sizes: dict[str, Any] = {"block_frames": 2, "context_frames": context}
    one = task(moving_buffer(7, 3, stride=3, **sizes), guidance_scale=2.0)
    assert_same_bits(latents(one), latents(replace(one, timetable=autoregressive(7, 3, **sizes))))


def test_a_video_of_one_chunk_is_full_bit_for_bit(task: MakeTask, latents: Any):
    one = task(moving_buffer(5, 3, block_frames=5, context_frames=0), guidance_scale=2.0)
    assert_same_bits(latents(one), latents(replace(one, timetable=full(5, 3))))


def assert_same_bits(found: list[Tensor], expected: list[Tensor]) -> None:
    assert [torch.equal(a, b) for a, b in zip(found, expected, strict=True)] == [True] * len(expected)


@pytest.mark.parametrize("kind", ResidualGuidance)
@buffers
def test_stopped_after_any_tick_and_resumed_from_the_journal_the_bits_are_the_same(
    timetable: Timetable, kind: ResidualGuidance, task: MakeTask, latents: Any, tmp_path: Path
):
    made = replace(task(timetable, guidance_scale=2.0), residual_guidance=kind)
    expected, state, num_finished = latents(made), LoopState(), 0
    with Journal(tmp_path / "job", create=parse_job({"prompt": "a red circle"})) as journal:
        for tick in range(timetable.num_ticks):
            num_finished += len(run_tick(made, state))
            assert set(state.blocks) == set(timetable.kept_after(tick))
            if tick % 3 == 1:
                journal.save_state(state)
                assert_same_bits(latents(made, journal.load_state()), expected[num_finished:])


def test_another_prompt_is_seen_by_all_that_is_not_finished_and_by_nothing_else(task: MakeTask, latents: Any):
    made = task(replace(BUFFERS["two-chunks"], num_frames=12))
    other = {3: 9}
    changed = replace(
        made, texts=lambda block: made.texts(replace(block, index=other.get(block.index, block.index)))
    )
    same = [torch.equal(a, b) for a, b in zip(latents(made), latents(changed), strict=True)]
    assert same == [True, True, False, False, False, False]


def test_what_makes_no_buffer_is_refused(task: MakeTask):
    sizes: dict[str, Any] = {"block_frames": 2, "context_frames": 1}
    for more in ({"mode": ContextMode.CACHE}, {"anchor_frames": 1}, {"switch_step": 2}):
        with pytest.raises(ValueError, match="^timetable=buffer: "):
            moving_buffer(8, 4, **sizes, **more)
    policy = make_policy(SparsitySettings(policy="radial"))
    assert policy is not None
    with pytest.raises(ValueError, match="^timetable=buffer: .*leave sparsity out"):
        replace(task(BUFFERS["context"]), sparsity=Sparsity(policy=policy))


def test_a_job_says_it_on_one_rank_and_its_memory_is_counted():
    engine = Engine.from_pretrained(with_dit=False)
    values = {"prompt": "a red circle", "num_frames": 400, "num_inference_steps": 4}

    def plan(name: str, **settings: Any) -> Any:
        return engine.plan(parse_job({**values, "queue": {"timetable": name, "stride": 2}, **settings}))

    made, queue = plan("buffer"), plan("dualparal")
    sizes: dict[str, Any] = {"block_frames": 4, "context_frames": 2, "stride": 2}
    assert queue.task.timetable == dualparal(100, 4, **sizes)
    assert made.task.timetable == moving_buffer(100, 4, **sizes)
    needed = [memory_bytes(p.job, engine.config, p.task.timetable, p.strides, 0) for p in (queue, made)]
    assert needed[0] < needed[1]
