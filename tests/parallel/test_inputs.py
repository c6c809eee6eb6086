"""Zero stale inputs: every layer of every forward gets the very bytes that the timetable names, on any ranks.

A recording copies what layers are handed when they are handed it. It is held against the loop's recording
and, without the loop, against the versions that the timetable's reads name.
"""

import hashlib
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from vidgen.denoise import loop
from vidgen.denoise.conditions import Conditions
from vidgen.denoise.lending import Lending
from vidgen.denoise.loop import BlockState, FinishedBlock, Task, Window
from vidgen.denoise.timetable import Forward, Read, Timetable, dualparal
from vidgen.model.context import KeyValue
from vidgen.model.dit import DiT
from vidgen.parallel import first
from vidgen.parallel.pipeline import StageRun
from vidgen.types import ContextMode

Item = tuple[int, int, int]  # block, step, run
Input = tuple[Item, str]  # what a forward gets, by name

RECOMPUTE, CACHE = ContextMode.RECOMPUTE, ContextMode.CACHE
NUM_LAYERS = 4


def queue(frames: int = 9, steps: int = 3, context: int = 1, **options: Any) -> Timetable:
    return dualparal(frames, steps, block_frames=2, context_frames=context, **options)


TIMETABLES = {
    "recompute": queue(),
    "cache": queue(mode=CACHE),
    "stride-2": queue(11, 4, stride=2),
    "stride-2-cache": queue(11, 4, stride=2, mode=CACHE),
    "anchor": queue(13, anchor_frames=1),
    "anchor-cache-full-context": queue(13, context=2, anchor_frames=2, mode=CACHE),
    "shorter-than-the-row": queue(4, 5),
}


@dataclass
class Recording:
    """What layers were handed, and what they made of it."""

    inputs: dict[Input, Tensor] = field(default_factory=dict)
    order: dict[int, list[Item]] = field(default_factory=dict)  # per stage
    lent: dict[tuple[Item, int], KeyValue] = field(default_factory=dict)  # a layer's own keys and values
    versions: dict[tuple[int, int], Tensor] = field(default_factory=dict)  # (block, steps done) -> latents


def copied(tensor: Tensor) -> Tensor:
    """The bytes as they are now: a received tensor lies in a buffer that will be written again."""
    return tensor.detach().clone(memory_format=torch.contiguous_format)


def listen(
    model: DiT, layers: range, now: list[Item], recording: Recording, patch: pytest.MonkeyPatch
) -> None:
    """Record what a model's embedding and layers get; `layers` says which of the whole model's they are."""

    def embed(run: Callable[..., Any], latents: Tensor) -> Any:
        recording.inputs[now[0], "window latents"] = copied(latents)
        return run(latents)

    def condition(
        run: Callable[..., Any], own: Any, model: DiT, levels: tuple[float, ...], text: Tensor, image: Any
    ) -> Any:
        recording.inputs[now[0], "window levels"] = torch.tensor([levels])
        recording.inputs[now[0], "window text"] = copied(text)
        return run(own, model, levels, text, image)

    def layer(
        run: Callable[..., Any], index: int, tokens: Tensor, noise: Tensor, text: Tensor, positions: Any,
        before: KeyValue | None, after: KeyValue | None, attend: Any = None, log_weights: Any = None,
    ) -> Any:  # fmt: skip
        own = positions.own_tokens
        inputs = {
            "tokens": tokens, "noise": noise, "text": text, "cosines": positions.cosines,
            "sines": positions.sines, "own tokens": torch.tensor([own.start, own.stop]),
        }  # fmt: skip
        for name, kv in ("before", before), ("after", after):
            if kv is not None:
                inputs |= {f"{name} keys": kv.key_BFSHD, f"{name} values": kv.value_BFSHD}
        for name, tensor in inputs.items():
            recording.inputs[now[0], f"layer {index} {name}"] = copied(tensor)
        tokens, made = run(tokens, noise, text, positions, before, after, attend, log_weights)
        recording.lent[now[0], index] = KeyValue(copied(made.key_BFSHD), copied(made.value_BFSHD))
        return tokens, made

    # items, not attributes: undoing those would leave bound methods on a model that other tests share
    patch.setitem(model.__dict__, "embed", partial(embed, model.embed))
    if hasattr(model, "text_in"):  # the stage that conditions
        patch.setattr(Conditions, "of", partialmethod_of(condition, Conditions.of))
    for index, module in zip(layers, model.layers, strict=True):
        patch.setitem(module.__dict__, "forward", partial(layer, module.forward, index))


def partialmethod_of(method: Callable[..., Any], run: Callable[..., Any]) -> Callable[..., Any]:
    """`method(run, self, ...)` as a method."""

    def bound(own: Any, *arguments: Any) -> Any:
        return method(run, own, *arguments)

    return bound


def record_loop(task: Task) -> Recording:
    """What the single-process loop's forwards get."""
    recording, now = Recording(order={0: []}), [(0, 0, 0)]

    class Announcing(Lending):
        """The loop's forwards say here which one they are."""

        def begin(self, forward: Forward) -> None:
            self.announced = forward
            super().begin(forward)

        def context(self, branch: int) -> Any:
            now[0] = self.announced.block, self.announced.step, branch
            recording.order[0].append(now[0])
            return super().context(branch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "Lending", Announcing)
        listen(task.model, range(NUM_LAYERS), now, recording, patch)
        list(loop.denoise(task))
    return recording


def record_pipeline(
    task: Task, cut: tuple[int, ...], pipeline: Any, disturb: Callable[[StageRun], None] = lambda stage: None,
    **options: Any,
) -> Recording:  # fmt: skip
    """What the forwards of a pipeline get, each stage's layers on its own thread."""
    recording = Recording(order={index: [] for index in range(len(cut))})

    def take_step(step: Callable[..., BlockState], task: Task, forward: Forward, *state: Any) -> BlockState:
        stepped = step(task, forward, *state)
        recording.versions[forward.block, stepped.steps_done] = copied(stepped.latents_BCFYX)
        return stepped

    with pytest.MonkeyPatch.context() as patch:

        def hook(stage: StageRun) -> None:
            now = [(-1, -1, -1)]

            def work(run: Callable[..., Any], item: Any, action: Callable[[], Any]) -> Any:
                now[0] = item.block, item.step, item.run
                recording.order[stage.stage.index].append(now[0])
                return run(item, action)

            disturb(stage)
            patch.setattr(stage, "work", partial(work, stage.work))
            listen(stage.models[0], stage.stage.layers, now, recording, patch)

        patch.setattr(loop, "take_step", partial(take_step, loop.take_step))
        finished: list[FinishedBlock] = pipeline(task, cut, hook=hook, **options).watched.blocks
    assert [block.block.index for block in finished] == list(range(task.timetable.num_blocks))
    for index in range(task.timetable.num_blocks):
        block = task.timetable.block(index)
        recording.versions[index, 0] = task.noise(block)
        clean = recording.versions[index, task.timetable.num_steps]
        assert same(finished[index].latents_BCFYX, clean)
    return recording


def same(one: Tensor, other: Tensor) -> bool:
    """The same shape, type and bytes."""
    return one.shape == other.shape and one.dtype == other.dtype and digest(one) == digest(other)


def digest(tensor: Tensor) -> bytes:
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).digest()


def unlike_the_loops(found: Recording, expected: Recording) -> list[Input]:
    """The inputs that are not the loop's, in the loop's order."""
    assert found.inputs.keys() == expected.inputs.keys()
    return [name for name, tensor in expected.inputs.items() if not same(found.inputs[name], tensor)]


def stale(found: Recording, task: Task) -> list[Input]:
    """The inputs that are not the versions which the timetable names, in its order. Asks no loop."""
    timetable = task.timetable
    forwards = {(it.block, it.step): it for tick in timetable.ticks() for it in tick}
    wrong: list[Input] = []

    def latents(read: Read) -> Tensor:
        return found.versions[read.block, read.step][:, :, read.start : read.stop]

    def key_value(read: Read, run: int, layer: int) -> KeyValue:
        source = forwards[read.block, read.step].before_latents
        skipped = source.num_frames if source is not None else 0
        kv = found.lent[(read.block, read.step, run), layer]
        return kv.frames(skipped + read.start, skipped + read.stop)

    for forward in forwards.values():
        own = found.versions[forward.block, forward.step]
        read, anchor = forward.before_latents, forward.anchor_kv
        window = torch.cat([*([latents(read)] if read is not None else []), own], dim=2)
        levels = [task.noise_levels[read.step]] * read.num_frames if read is not None else []
        levels += [task.noise_levels[forward.step]] * own.shape[2]
        texts = task.run_texts(timetable.block(forward.block))
        around = {"before": [anchor, forward.before_kv], "after": [forward.after_kv]}
        for run in range(task.runs_per_forward):
            item = forward.block, forward.step, run
            expected = {
                "window latents": window, "window levels": torch.tensor([levels]), "window text": texts[run],
            }  # fmt: skip
            for layer in range(NUM_LAYERS):
                for side, reads in around.items():
                    kvs = [key_value(it, run, layer) for it in reads if it is not None]
                    if not kvs:
                        assert (item, f"layer {layer} {side} keys") not in found.inputs
                        continue
                    name = f"layer {layer} {side}"
                    expected[f"{name} keys"] = torch.cat([kv.key_BFSHD for kv in kvs], dim=1)
                    expected[f"{name} values"] = torch.cat([kv.value_BFSHD for kv in kvs], dim=1)
            wrong += [(item, what) for what, it in expected.items() if not same(found.inputs[item, what], it)]
    return wrong


def items_in_order(task: Task) -> list[Item]:
    forwards = (forward for tick in task.timetable.ticks() for forward in tick)
    return [(it.block, it.step, run) for it in forwards for run in range(task.runs_per_forward)]


@pytest.mark.parametrize("cut", [(2, 2), (1, 2, 1), (1, 1, 1, 1)], ids=str)
@pytest.mark.parametrize("timetable", TIMETABLES.values(), ids=TIMETABLES)
def test_every_layer_gets_the_very_bytes_that_it_gets_in_the_loop(
    timetable: Timetable, cut: Any, make_task: Any, pipeline: Any
):
    task = make_task(timetable, layers=NUM_LAYERS, guidance_scale=3.0)
    assert unlike_the_loops(record_pipeline(task, cut, pipeline), record_loop(task)) == []


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("timetable", TIMETABLES.values(), ids=TIMETABLES)
def test_every_read_is_of_the_version_that_the_timetable_names(
    timetable: Timetable, guidance: float, make_task: Any, pipeline: Any
):
    task = make_task(timetable, layers=NUM_LAYERS, guidance_scale=guidance)
    found = record_pipeline(task, (1, 2, 1), pipeline)
    assert stale(found, task) == []
    assert len(found.versions) == timetable.num_blocks * (timetable.num_steps + 1)


@pytest.mark.parametrize("timetable", TIMETABLES.values(), ids=TIMETABLES)
def test_every_stage_runs_the_forwards_once_in_the_timetables_order(
    timetable: Timetable, make_task: Any, pipeline: Any
):
    task = make_task(timetable, layers=NUM_LAYERS, guidance_scale=3.0)
    expected = items_in_order(task)
    assert record_loop(task).order == {0: expected}
    found = record_pipeline(task, (1, 1, 1, 1), pipeline)
    assert found.order == dict.fromkeys(range(4), expected)


def sleeping(seed: int, stage: StageRun, patch: pytest.MonkeyPatch) -> None:
    """Make a stage dawdle now and then before it computes, sends or receives."""
    dice = random.Random(seed * 100 + stage.stage.index)

    def late(run: Callable[..., Any], *arguments: Any) -> Any:
        if dice.random() < 0.5:
            time.sleep(dice.random() * 0.004)
        return run(*arguments)

    for name in "work", "send", "receive":
        patch.setattr(stage, name, partial(late, getattr(stage, name)))


@pytest.mark.parametrize(("seed", "in_flight"), [(1, None), (2, 1), (3, 3), (4, 9)])
@pytest.mark.parametrize("name", ["recompute", "anchor-cache-full-context"])
def test_stages_that_dawdle_at_random_change_nothing(
    name: str,
    seed: int,
    in_flight: int | None,
    make_task: Any,
    pipeline: Any,
    monkeypatch: pytest.MonkeyPatch,
):
    task = make_task(TIMETABLES[name], layers=NUM_LAYERS, guidance_scale=3.0)
    expected = record_loop(task)
    found = record_pipeline(
        task, (1, 1, 2), pipeline, lambda stage: sleeping(seed, stage, monkeypatch), max_in_flight=in_flight
    )
    assert unlike_the_loops(found, expected) == []
    assert stale(found, task) == []
    assert found.order == dict.fromkeys(range(3), expected.order[0])


class StaleWindows:
    """`make_window`, but one forward gets what its own block, or the one before it, was a step earlier."""

    def __init__(self, *, own_of: Item | None = None, before_of: Item | None = None) -> None:
        self.own_of, self.before_of = own_of, before_of
        self.seen: dict[tuple[int, int], BlockState] = {}

    def __call__(
        self, task: Task, blocks: dict[int, BlockState], forward: Forward, own: BlockState
    ) -> Window:
        self.seen |= {(index, block.steps_done): block for index, block in blocks.items()}
        window, at = loop.make_window(task, blocks, forward, own), (forward.block, forward.step, 0)
        older = window.latents_BCFYX.clone()
        if at == self.own_of:
            earlier = self.seen[forward.block, forward.step - 1]
            older[:, :, window.frames_before :] = earlier.latents_BCFYX
        if at == self.before_of:
            assert forward.before_latents is not None
            earlier = self.seen[forward.before_latents.block, forward.before_latents.step - 1]
            read = slice(forward.before_latents.start, forward.before_latents.stop)
            older[:, :, : window.frames_before] = earlier.latents_BCFYX[:, :, read]
        return replace(window, latents_BCFYX=older)


@pytest.mark.parametrize(
    "planted", [{"own_of": (1, 2, 0)}, {"before_of": (2, 1, 0)}, {"before_of": (4, 0, 0)}], ids=str
)
def test_a_planted_stale_window_is_found_where_it_was_planted(
    planted: Any, make_task: Any, pipeline: Any, monkeypatch: pytest.MonkeyPatch
):
    task = make_task(TIMETABLES["recompute"], layers=NUM_LAYERS)
    monkeypatch.setattr(first, "make_window", StaleWindows(**planted))
    found = record_pipeline(task, (2, 2), pipeline)
    (item,) = planted.values()
    assert unlike_the_loops(found, record_loop(task))[0] == (item, "window latents")
    # all that follows from it is as the timetable says, so that nothing else is stale
    assert stale(found, task) == [(item, "window latents")]


@pytest.mark.parametrize(
    ("side", "planted"), [("before", (2, 1, 0)), ("after", (1, 2, 1)), ("before", (4, 2, 1))], ids=str
)
def test_planted_stale_keys_and_values_of_a_later_stage_are_found_where_they_were_planted(
    side: str, planted: Item, make_task: Any, pipeline: Any, monkeypatch: pytest.MonkeyPatch
):
    task = make_task(TIMETABLES["cache"], layers=NUM_LAYERS, guidance_scale=3.0)

    def forget(stage: StageRun) -> None:
        """The last stage hands that forward the context of the step before it."""
        if not stage.stage.is_last:
            return
        lending, given, forwards = stage.lending, {}, []

        def begin(run: Callable[..., Any], forward: Forward) -> None:
            forwards.append(forward)
            run(forward)

        def context(run: Callable[..., Any], branch: int) -> Any:
            block, step = forwards[-1].block, forwards[-1].step
            given[block, step, branch] = found = run(branch)
            if (block, step, branch) != planted:
                return found
            return replace(found, **{side: getattr(given[block, step - 1, branch], side)})

        monkeypatch.setattr(lending, "begin", partial(begin, lending.begin))
        monkeypatch.setattr(lending, "context", partial(context, lending.context))

    found = record_pipeline(task, (1, 2, 1), pipeline, forget)
    expected = [(planted, f"layer 3 {side} keys"), (planted, f"layer 3 {side} values")]
    assert unlike_the_loops(found, record_loop(task))[:2] == expected
    assert stale(found, task) == expected


def test_a_guidance_branch_that_gets_the_others_keys_is_found(
    make_task: Any, pipeline: Any, monkeypatch: pytest.MonkeyPatch
):
    task = make_task(TIMETABLES["cache"], layers=NUM_LAYERS, guidance_scale=3.0)

    def swap(stage: StageRun) -> None:
        context = stage.lending.context
        monkeypatch.setattr(stage.lending, "context", lambda branch: context(1 - branch))

    found = record_pipeline(task, (2, 2), pipeline, swap)
    # the first layer's keys come before any text, so that both branches' are the same
    expected = (1, 0, 0), "layer 1 before keys"
    assert unlike_the_loops(found, record_loop(task))[0] == expected
    assert stale(found, task)[0] == expected
