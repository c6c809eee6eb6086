"""Still scenes: which blocks are shown again, what it saves, and that it is the same every time."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from vidgen.config import frames_digest, parse_job
from vidgen.denoise.given import Given
from vidgen.denoise.loop import LoopState, Task, denoise, run_tick
from vidgen.denoise.state import Stillness
from vidgen.denoise.still import MOST_IN_A_ROW, StillFilter, cosine
from vidgen.denoise.timetable import Timetable, autoregressive, dualparal, full
from vidgen.engine import Engine
from vidgen.journal import Journal
from vidgen.live import Live
from vidgen.render import render, resume
from vidgen.run import Interrupted
from vidgen.types import Block, ContextMode

MakeTask = Callable[..., Task]
NUM_STEPS = 2
modes = pytest.mark.parametrize("mode", ContextMode)


def queue(blocks: int, context: int = 0, mode: ContextMode = ContextMode.RECOMPUTE) -> Timetable:
    """Blocks of two frames, the last of one."""
    return autoregressive(2 * blocks - 1, NUM_STEPS, block_frames=2, context_frames=context, mode=mode)


def still(made: Task, threshold: float = 0.5, prompts: str = "") -> Task:
    """The task with the same noise in every block; `prompts` has a letter per block, all "a" by default."""
    first, text = made.timetable.block(0), made.texts

    def noise(block: Block) -> Tensor:
        return made.noise(first)[:, :, : block.num_frames]

    def texts(block: Block) -> tuple[Tensor, ...]:
        letter = prompts[block.index] if prompts else "a"
        return text(replace(block, index=ord(letter)))

    return replace(made, noise=noise, texts=texts, still=StillFilter(threshold=threshold, seed=3))


def follow(made: Task) -> tuple[list[Tensor], list[bool]]:
    """(latents of all blocks, whether each was shown again)."""
    state, found, again = LoopState(), list[Tensor](), list[bool]()
    while state.next_tick < made.timetable.num_ticks:
        before = state.still.total
        for finished in run_tick(made, state):
            found.append(finished.latents_BCFYX)
            again.append(state.still.total > before)
    return found, again


def assert_same_bits(found: list[Tensor], expected: list[Tensor]) -> None:
    assert [torch.equal(a, b) for a, b in zip(found, expected, strict=True)] == [True] * len(expected)


def test_a_repeat_is_as_likely_as_the_paper_says():
    chooser = StillFilter(threshold=0.6, seed=1)
    assert [chooser.probability(s) for s in (-1.0, 0.6, 0.8, 0.9, 1.0)] == pytest.approx([0, 0, 0.5, 0.75, 1])
    for similarity in (0.7, 0.9):
        share = sum(chooser.repeats(block, Stillness(similarity)) for block in range(2000)) / 2000
        assert share == pytest.approx(chooser.probability(similarity), abs=0.04)
    others = [StillFilter(threshold=0.6, seed=seed) for seed in (1, 2)]
    drawn = [[it.repeats(block, Stillness(0.8)) for block in range(50)] for it in others]
    assert drawn[0] == [chooser.repeats(block, Stillness(0.8)) for block in range(50)] != drawn[1]


def test_similarity_is_the_cosine():
    one = torch.tensor([3.0, 4.0, 0.0])
    assert cosine(one, one * 7) == pytest.approx(1) and cosine(one, -one) == pytest.approx(-1)
    assert cosine(one, torch.tensor([4.0, -3.0, 9.0])) == pytest.approx(0)
    assert cosine(one, torch.zeros(3)) == 0


def test_blocks_that_are_alike_are_shown_again_until_there_are_too_many_in_a_row(
    task: MakeTask, monkeypatch: pytest.MonkeyPatch
):
    made = still(task(queue(17), guidance_scale=2.0))
    runs, forward = [0], type(made.model).forward_and_lend

    def counted(*arguments: Any, **options: Any) -> Any:
        runs[0] += 1
        return forward(*arguments, **options)

    monkeypatch.setattr(type(made.model), "forward_and_lend", counted)
    found, again = follow(made)
    # the first two are compared; after the longest row one is denoised, and is still alike
    assert again == [False, False, *[True] * MOST_IN_A_ROW, False, *[True] * 4]
    assert runs[0] == again.count(False) * NUM_STEPS * 2
    whole = list(denoise(replace(made, still=None)))
    assert_same_bits(found[:-1], [block.latents_BCFYX for block in whole[:-1]])
    assert torch.equal(found[-1], found[-2][:, :, :1])  # the last block is shorter


@modes
def test_another_prompt_is_denoised_at_once_and_the_two_after_it_are_compared(
    mode: ContextMode, task: MakeTask
):
    _, again = follow(still(task(queue(10, 1, mode)), threshold=0.0, prompts="aaaabbbbab"))
    assert again[:2] == [False, False]
    assert again[4:6] == [False, False]  # b, and the b of which there was one before
    assert again[8:] == [False, False]


def test_what_is_not_alike_is_denoised(task: MakeTask):
    made = task(queue(6, 1))
    plain = list(denoise(made))
    alike = cosine(plain[0].latents_BCFYX, plain[1].latents_BCFYX)
    assert alike < 0.99
    found, again = follow(replace(made, still=StillFilter(threshold=0.99, seed=0)))
    assert not any(again)
    assert_same_bits(found, [block.latents_BCFYX for block in plain])


@modes
def test_stopped_after_any_tick_and_resumed_from_the_journal_the_bits_are_the_same(
    mode: ContextMode, task: MakeTask, latents: Any, tmp_path: Path
):
    made = still(task(queue(12, 1, mode), guidance_scale=2.0))
    state = LoopState()
    while state.next_tick < 2 * NUM_STEPS:
        run_tick(made, state)
    assert state.still.similarity is not None
    even = StillFilter(threshold=2 * state.still.similarity - 1, seed=3)
    assert even.probability(state.still.similarity) == pytest.approx(0.5)
    made = replace(made, still=even)
    expected, again = follow(made)
    assert 2 < again.count(True) < 10, "the die decides"
    state, num_finished = LoopState(), 0
    with Journal(tmp_path / "job", create=parse_job({"prompt": "a red circle"})) as journal:
        while state.next_tick < made.timetable.num_ticks:
            num_finished += len(run_tick(made, state))
            journal.save_state(state)
            read = journal.load_state()
            assert read.still == state.still
            assert_same_bits(latents(made, read), expected[num_finished:])
            assert_same_bits(latents(made, copy.deepcopy(state)), expected[num_finished:])
    assert state.still.total == again.count(True)


def test_keys_and_values_of_a_repeat_are_those_of_the_block_that_it_shows(task: MakeTask):
    made, state = still(task(queue(5, 1, ContextMode.CACHE)), threshold=-1e9), LoopState()
    while state.next_tick < 2 * NUM_STEPS:
        run_tick(made, state)
    (shown,) = state.lent.for_later.values()
    run_tick(made, state)
    assert state.still.total == 1 and state.next_tick == 3 * NUM_STEPS
    assert list(state.blocks) == list(state.lent.for_later) == [2]
    assert state.lent.for_later[2] is shown


def test_given_frames_are_never_covered_by_a_repeat(task: MakeTask):
    made = still(task(queue(8)), threshold=-1e9)
    known = torch.zeros(3, 9, 4, 6)
    _, again = follow(replace(made, given=Given(pinned_CFYX=known)))
    assert again == [False] * 5 + [True] * 3


def test_an_error_before_a_repeat_leaves_the_state_as_it_was(task: MakeTask):
    made, state = still(task(queue(4))), LoopState()
    while state.next_tick < 2 * NUM_STEPS:
        run_tick(made, state)
    before = copy.deepcopy(state)

    def give_up() -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        run_tick(made, state, give_up)
    assert (state.next_tick, state.still) == (before.next_tick, before.still)
    assert state.blocks.keys() == before.blocks.keys()


@pytest.mark.parametrize(
    "timetable",
    [dualparal(8, 3, block_frames=2, context_frames=1, stride=2), full(8, 3)],
    ids=["dualparal", "full"],
)
def test_it_is_refused_where_a_block_begins_before_the_last_has_ended(timetable: Timetable, task: MakeTask):
    made = task(timetable)
    with pytest.raises(ValueError, match="^static_threshold=0.9: .* take timetable=autoregressive"):
        replace(made, still=StillFilter(threshold=0.9, seed=0))


JOB: dict[str, Any] = {
    "prompt": "a red circle staying still over a gray background",
    "num_frames": 130,
    "num_inference_steps": 3,
    "state_every": 2,
    "queue": {"timetable": "autoregressive", "static_threshold": 0.8},
}


def test_ranks_are_refused():
    engine = Engine.from_pretrained(with_dit=False)
    assert engine.plan(parse_job(JOB)).task.still == StillFilter(threshold=0.8, seed=0)
    with pytest.raises(ValueError, match=r"^static_threshold=0.8: .* one process only, and ranks=2"):
        engine.plan(parse_job({**JOB, "parallel": {"ranks": 2}}))


@pytest.mark.parametrize("threshold", [-0.1, 1.0, float("nan")])
def test_a_threshold_that_is_none_is_refused(threshold: float):
    with pytest.raises(ValueError, match="^job: queue.static_threshold="):
        parse_job({**JOB, "queue": {"static_threshold": threshold}})


def test_a_job_begun_before_there_was_such_a_setting_goes_on():
    values = {name: value for name, value in JOB.items() if name != "queue"}
    plain = frames_digest(parse_job(values))
    assert plain == frames_digest(parse_job({**values, "queue": {"static_threshold": None}}))
    assert plain != frames_digest(parse_job({**values, "queue": {"static_threshold": 0.5}}))


def job(output: Path) -> Any:
    return parse_job({**JOB, "output": {"path": output, "sheet": False}})


def test_a_render_of_a_still_scene_stopped_anywhere_resumes_to_the_same_files(tmp_path: Path):
    live = Live(engine=Engine.from_pretrained())
    render(job(tmp_path / "whole.mp4"), live=live)
    with Journal(tmp_path / "whole.job") as journal:
        records = journal.written()
        kept = [journal.load_latents(record.block) for record in records]
    repeats = sum(torch.equal(a[:, :, : b.shape[2]], b) for a, b in pairwise(kept))
    assert 1 <= repeats < len(kept) - 2
    for after in (4, 7, 10):
        asked = count(1)

        def should_stop(asked: Iterator[int] = asked, after: int = after) -> bool:
            return next(asked) >= after

        with pytest.raises(Interrupted):
            render(job(tmp_path / f"stopped{after}.mp4"), should_stop=should_stop, live=live)
        resume(tmp_path / f"stopped{after}.job", live=live)
        with Journal(tmp_path / f"stopped{after}.job") as journal:
            assert [(r.block, r.sha256) for r in journal.written()] == [(r.block, r.sha256) for r in records]
