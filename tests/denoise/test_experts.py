"""Two experts of one schedule: each takes its own steps, and neither reads the other's keys and values."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from vidgen.denoise.guidance import combine
from vidgen.denoise.loop import Task
from vidgen.denoise.timetable import Lender, Timetable, dualparal, full
from vidgen.types import ContextMode

MakeTask = Callable[..., Task]
BASE = dualparal(9, 6, block_frames=2, context_frames=1, switch_step=2)
QUEUES: dict[str, Timetable] = {
    "recompute": BASE,
    "cache": replace(BASE, mode=ContextMode.CACHE),
    "cache-stride": replace(BASE, stride=2, mode=ContextMode.CACHE),
    "anchor": replace(BASE, anchor_frames=1),
    "anchor-late-switch": replace(BASE, anchor_frames=2, switch_step=5, mode=ContextMode.CACHE),
}
queues = pytest.mark.parametrize("timetable", QUEUES.values(), ids=QUEUES)


def two(task: MakeTask, timetable: Timetable, model: Any, **options: Any) -> Task:
    one = task(replace(timetable, switch_step=None), **options)
    return replace(one, timetable=timetable, second_model=model, second_guidance_scale=1.5)


@queues
def test_no_read_of_keys_and_values_crosses_the_switch(timetable: Timetable):
    crossing = 0
    plain = replace(timetable, switch_step=None)
    for tick in range(timetable.num_ticks):
        for forward, other in zip(timetable.forwards(tick), plain.forwards(tick), strict=True):
            assert forward.before_latents == other.before_latents
            for name in ("before_kv", "after_kv", "anchor_kv"):
                read, wanted = getattr(forward, name), getattr(other, name)
                same = wanted is not None and timetable.expert(wanted.step) == timetable.expert(forward.step)
                assert read == (wanted if same else None)
                crossing += wanted is not None and not same
    assert crossing, "the law holds of nothing"


@queues
def test_what_is_lent_is_read(timetable: Timetable):
    for tick in range(timetable.num_ticks):
        forwards = timetable.forwards(tick)
        after = {f.after_kv.block for f in forwards if f.after_kv}
        assert after == {f.block for f in forwards for lend in f.lends if lend.to == Lender.EARLIER_BLOCK}
        if tick + 1 < timetable.num_ticks:
            later = {f.block for f in forwards for lend in f.lends if lend.to == Lender.LATER_BLOCK}
            before = {f.before_kv.block for f in timetable.forwards(tick + 1) if f.before_kv}
            if timetable.stride == 1:
                assert later == before
            assert later <= before | {f.block for f in forwards}


def test_each_expert_takes_its_own_steps_at_its_own_guidance(dit: Any, task: MakeTask, latents: Any):
    """The whole loop by hand."""
    timetable = full(3, 4, switch_step=1)
    made = two(task, timetable, dit(num_layers=3), guidance_scale=3.0)
    block = timetable.block(0)
    now = made.noise(block)
    for step in range(4):
        model, scale = (made.model, 3.0) if step < 1 else (made.second_model, 1.5)
        assert model is not None
        levels = torch.full((1, 3), made.noise_levels[step])
        velocity = combine([model(now, levels, text) for text in made.texts(block)], scale)
        now = now + (made.noise_levels[step + 1] - made.noise_levels[step]) * velocity
    torch.testing.assert_close(latents(made)[0], now, rtol=1e-5, atol=1e-5)


@queues
def test_the_same_expert_twice_differs_only_by_what_is_not_read(
    timetable: Timetable, task: MakeTask, latents: Any, dit: Any
):
    """With no switch that is reached, two experts are the first one alone."""
    one = latents(task(replace(timetable, switch_step=None), guidance_scale=2.0))
    never = replace(timetable, switch_step=timetable.num_steps)
    other = two(task, never, dit(num_layers=3), guidance_scale=2.0)
    for found, expected in zip(latents(other), one, strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("switch", [-1, 7])
def test_a_switch_outside_of_the_steps_is_one_line(switch: int):
    with pytest.raises(ValueError, match=r"^switch_step=-?\d: allowed is 0 to 6$"):
        replace(BASE, switch_step=switch)


def test_a_second_model_without_a_switch_is_refused(dit: Any, task: MakeTask):
    with pytest.raises(ValueError, match="belong together"):
        replace(task(full(2, 2)), second_model=dit(num_layers=3))


def changed(found: list[Tensor], expected: list[Tensor]) -> list[bool]:
    return [not torch.equal(one, other) for one, other in zip(found, expected, strict=True)]


def test_the_switch_changes_every_block(dit: Any, task: MakeTask, latents: Any):
    plain = latents(task(replace(BASE, switch_step=None)))
    assert all(changed(latents(two(task, BASE, dit(num_layers=3))), plain))
