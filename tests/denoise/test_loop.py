"""Laws of the loop: one result per task, resumable between any two ticks, state that does not grow."""

import copy
import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from vidgen.denoise.loop import LoopState, Task, denoise, run_tick
from vidgen.denoise.timetable import Timetable, dualparal, full
from vidgen.model.context import Context, KeyValue
from vidgen.types import ContextMode, GuidanceMode

MakeTask = Callable[..., Task]
Latents = Callable[..., list[Tensor]]

BASE = dualparal(8, 4, block_frames=2, context_frames=1)
QUEUES = {
    "recompute": BASE,
    "cache": replace(BASE, mode=ContextMode.CACHE),
    "no-context": replace(BASE, context_frames=0),
    "short-last-block": replace(BASE, num_frames=7, context_frames=2),
    "stride": replace(BASE, stride=2, mode=ContextMode.CACHE),
    "one-after-another": replace(BASE, stride=4),
    "anchor": replace(BASE, anchor_frames=2),
    "anchor-cache": replace(BASE, anchor_frames=1, mode=ContextMode.CACHE),
}
queues = pytest.mark.parametrize("timetable", QUEUES.values(), ids=QUEUES)


def assert_same_bits(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected)
    for index, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert torch.equal(one, other), f"block {index}"


def tensors(value: Any) -> Iterator[Tensor]:
    """All tensors in a state."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from itertools.chain.from_iterable(map(tensors, value.values()))
    elif isinstance(value, list | tuple):
        yield from itertools.chain.from_iterable(map(tensors, value))
    elif isinstance(value, KeyValue):
        yield from (value.key_BFSHD, value.value_BFSHD)
    elif hasattr(value, "__dict__"):
        yield from tensors(vars(value))


@pytest.mark.parametrize("mode", ContextMode)
def test_what_comes_before_and_after_a_block_changes_its_velocity(
    mode: ContextMode, dit: Any, task: MakeTask
):
    """Without this the other laws would hold for a model that ignores its context."""
    model = dit()
    made = task(BASE)
    own, level = made.noise(BASE.block(1)), torch.full((1, 2), 0.5)
    text = made.texts(BASE.block(1))[0]
    alone = model(own, level, text)
    _, lent = model.forward_and_lend(made.noise(BASE.block(0)), level, text)
    if mode is ContextMode.CACHE:
        before = model(own, level, text, Context(before=lent))
    else:
        window = torch.cat((made.noise(BASE.block(0)), own), dim=2)
        before = model(window, torch.full((1, 4), 0.5), text)[:, :, 2:]
    after = model(own, level, text, Context(after=lent))
    other_text = model(own, level, made.texts(BASE.block(2))[0])
    for other in (before, after, other_text):
        assert (other - alone).abs().max() > 0.05 * alone.abs().max()
    assert (before - after).abs().max() > 0.05 * alone.abs().max()


@queues
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_the_same_task_twice_gives_the_same_bits(timetable, guidance_scale, task: MakeTask, latents: Latents):
    expected = latents(task(timetable, guidance_scale=guidance_scale))
    torch.manual_seed(123)
    assert_same_bits(latents(task(timetable, guidance_scale=guidance_scale)), expected)


@pytest.mark.parametrize("mode", ContextMode)
@pytest.mark.parametrize("block_frames", [5, 9])
def test_a_queue_of_one_block_is_full_bit_for_bit(mode, block_frames, task: MakeTask, latents: Latents):
    def noise(block):
        return torch.randn(1, 3, 5, 4, 6, generator=torch.Generator().manual_seed(1))

    queue = dualparal(5, 3, block_frames=block_frames, context_frames=2, mode=mode, anchor_frames=1)
    expected = latents(replace(task(full(5, 3), guidance_scale=2.0), noise=noise))
    assert_same_bits(latents(replace(task(queue, guidance_scale=2.0), noise=noise)), expected)


@queues
def test_a_state_saved_between_any_two_ticks_continues_to_the_same_bits(
    timetable, task: MakeTask, latents: Latents
):
    made = task(timetable, guidance_scale=2.0)
    expected = latents(made)
    state, num_finished = LoopState(), 0
    for _ in range(timetable.num_ticks):
        saved = copy.deepcopy(state)
        resumed = latents(task(timetable, guidance_scale=2.0), saved)
        assert_same_bits(resumed, expected[num_finished:])
        num_finished += len(run_tick(made, state))  # saving and continuing the copy changed nothing here
    assert num_finished == timetable.num_blocks
    assert latents(made, state) == []


@queues
def test_blocks_come_out_in_order_in_the_tick_of_their_last_step(timetable: Timetable, task: MakeTask):
    made, state = task(timetable), LoopState()
    for tick in range(timetable.num_ticks):
        assert state.next_tick == tick
        for finished in run_tick(made, state):
            assert timetable.last_tick(finished.block.index) == tick
            assert finished.block == timetable.block(finished.block.index)
            assert finished.latents_BCFYX.shape == (1, 3, finished.block.num_frames, 4, 6)
            assert finished.latents_BCFYX.isfinite().all()


@queues
def test_state_holds_at_most_one_block_more_than_are_live(timetable: Timetable, task: MakeTask):
    made, state = task(timetable, guidance_scale=2.0), LoopState()
    for tick in range(timetable.num_ticks):
        run_tick(made, state)
        bound = len(timetable.live(tick)) + 1
        assert len(state.blocks) <= bound
        assert len(state.lent.for_later) <= bound
        assert set(state.lent.for_later) <= set(state.blocks) == set(timetable.kept_after(tick))
        for index, block in state.blocks.items():
            assert block.steps_done == min(timetable.num_steps, tick + 1 - timetable.admission_tick(index))
    assert not state.blocks and not state.lent.for_later


@queues
def test_state_keeps_alive_no_memory_beyond_its_tensors(timetable: Timetable, task: MakeTask):
    """K,V of a few frames must not be a view that holds on to those of the whole block."""
    made, state = task(timetable, guidance_scale=2.0), LoopState()
    for _ in range(timetable.num_ticks):
        run_tick(made, state)
        for tensor in tensors(state):
            assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


def test_state_of_a_long_job_is_no_larger_than_of_a_short_one(task: MakeTask):
    sizes = []
    for num_frames in (12, 36):
        timetable = replace(BASE, num_frames=num_frames, mode=ContextMode.CACHE, anchor_frames=1)
        made, state, largest = task(timetable), LoopState(), 0
        for _ in range(timetable.num_ticks):
            run_tick(made, state)
            largest = max(largest, sum(tensor.nbytes for tensor in tensors(state)))
        sizes.append(largest)
    assert sizes[0] == sizes[1]


class Recorder:
    """A DiT that writes down the noise levels it is given."""

    def __init__(self, model: Any) -> None:
        self.model, self.levels = model, []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def forward_and_lend(
        self, latents: Tensor, levels: Tensor, text: Tensor, context: Context, **options: Any
    ) -> Any:
        options.pop("conditioning")  # else these levels would decide nothing
        self.levels.append(levels[0].tolist())
        return self.model.forward_and_lend(latents, levels, text, context, **options)


@queues
def test_own_frames_are_at_their_steps_level_and_recomputed_ones_at_their_own(
    timetable, dit: Any, task: MakeTask
):
    recorder = Recorder(dit())
    made = task(timetable, model=recorder)
    list(denoise(made))
    level, seen = made.noise_levels, iter(recorder.levels)
    for tick in range(timetable.num_ticks):
        for block in reversed(timetable.live(tick)):
            step = tick - timetable.stride * block
            expected = [level[step]] * timetable.block(block).num_frames
            if block and timetable.mode is ContextMode.RECOMPUTE:
                steps_of_before = min(timetable.num_steps, step + timetable.stride)
                expected = [level[steps_of_before]] * timetable.context_frames + expected
            assert next(seen) == pytest.approx(expected, abs=1e-7)
    assert next(seen, None) is None


def sizes(queue: Timetable) -> str:
    numbers = f"F{queue.num_frames}-C{queue.context_frames}-s{queue.stride}-A{queue.anchor_frames}"
    return f"{numbers}-{queue.mode}"


@pytest.mark.parametrize(
    ("timetable", "num_unchanged"),
    [
        (BASE, 1),
        (replace(BASE, num_frames=14), 4),
        (replace(BASE, num_frames=14, mode=ContextMode.CACHE), 4),
        (replace(BASE, num_frames=13), 3),  # the last block is short, and grows in the longer job
        (replace(BASE, num_frames=6), 0),  # block 0 is still live when a fourth block enters
        (replace(BASE, num_frames=14, anchor_frames=2), 4),
        (replace(BASE, num_frames=8, stride=2), 3),
        (replace(BASE, num_frames=8, stride=3, mode=ContextMode.CACHE), 3),
        (replace(BASE, num_frames=6, stride=4), 3),
        (replace(BASE, num_frames=6, stride=4, mode=ContextMode.CACHE), 3),
        (replace(BASE, num_frames=8, context_frames=0), 4),
        (replace(BASE, num_frames=7, context_frames=0), 3),
    ],
    ids=lambda value: sizes(value) if isinstance(value, Timetable) else f"{value}-unchanged",
)
def test_exactly_the_blocks_finished_before_the_first_new_one_enters_equal_those_of_a_longer_job(
    timetable: Timetable, num_unchanged: int, dit: Any, task: MakeTask, latents: Latents
):
    """Within a tick a change travels back one block per layer: this model reaches all live blocks."""
    model = dit(num_layers=4)
    short = latents(task(timetable, model=model))
    long = latents(task(replace(timetable, num_frames=timetable.num_frames + 3), model=model))
    same = [
        index for index, block in enumerate(short)
        if block.shape == long[index].shape and torch.equal(block, long[index])
    ]  # fmt: skip
    assert same == list(range(num_unchanged))


def test_a_guidance_scale_of_one_never_looks_at_the_negative_prompt(task: MakeTask, latents: Latents):
    made = task(BASE)
    expected = latents(made)
    poisoned = replace(made, texts=lambda block: (made.texts(block)[0], made.texts(block)[1] * torch.nan))
    assert_same_bits(latents(poisoned), expected)


def test_equal_prompts_make_guidance_do_nothing(task: MakeTask, latents: Latents):
    made = task(BASE, guidance_scale=3.0)
    same_texts = replace(made, texts=lambda block: (made.texts(block)[0],) * 2)
    for one, other in zip(latents(same_texts), latents(task(BASE)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_each_block_sees_its_own_prompt(task: MakeTask, latents: Latents):
    """Without context, which would carry it on, another prompt for block 2 changes block 2 alone."""
    made = task(replace(BASE, context_frames=0))
    other = {2: 9}
    changed = replace(
        made, texts=lambda block: made.texts(replace(block, index=other.get(block.index, block.index)))
    )
    same = [torch.equal(a, b) for a, b in zip(latents(made), latents(changed), strict=True)]
    assert same == [True, True, False, True]


def test_guidance_without_a_negative_text_is_an_error(task: MakeTask):
    made = task(BASE, guidance_scale=3.0)
    with pytest.raises((ValueError, AssertionError)):
        list(denoise(replace(made, texts=lambda block: made.texts(block)[:1])))


def test_noise_levels_that_do_not_fit_the_number_of_steps_are_an_error(task: MakeTask):
    made = task(BASE)
    with pytest.raises((ValueError, AssertionError)):
        list(denoise(replace(made, noise_levels=[*made.noise_levels[:-1], 0.01, 0.0])))


@pytest.mark.parametrize("mode", GuidanceMode)
def test_a_text_is_placed_and_projected_once(mode: GuidanceMode, task: MakeTask):
    """What was made of a text is found again by the tensor, which must therefore stay the same."""
    plain = task(BASE, guidance_scale=3.0)
    texts = plain.texts(plain.timetable.block(0))
    made = replace(plain, guidance_mode=mode, texts=lambda block: texts)
    block = made.timetable.block(0)
    first, again = made.run_texts(block), made.run_texts(block)
    assert [one is other for one, other in zip(first, again, strict=True)] == [True] * made.runs_per_forward
    one, other = (made.conditioning(0, (1.0,), first[0]).text_BND for _ in range(2))
    assert one is other


@pytest.mark.parametrize(("timetable", "collected"), [(full(4, 2), 0), (QUEUES["no-context"], 0), (BASE, 12)])
def test_keys_and_values_are_collected_only_where_somebody_reads_them(
    timetable: Timetable, collected: int, task: MakeTask, monkeypatch: pytest.MonkeyPatch
):
    """Those of all layers at once are the largest thing that a forward could keep."""
    made, lent = task(timetable), []
    plain = type(made.model).run_layers

    def run_layers(*arguments: Any, **options: Any) -> Any:
        tokens, own = plain(*arguments, **options)
        lent.append(len(own))
        return tokens, own

    monkeypatch.setattr(type(made.model), "run_layers", run_layers)
    list(denoise(made))
    assert len(lent) == timetable.num_forwards
    num_lending = sum(bool(f.lends) for tick in timetable.ticks() for f in tick)
    assert sum(lent) == num_lending * made.model.config.num_layers
    assert bool(collected) == bool(num_lending)
