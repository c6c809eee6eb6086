"""Residual guidance: what it saves, that it is its formula, and that nothing else changes by a bit."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from vidgen.builtin import load_small
from vidgen.config import frames_digest, parse_job
from vidgen.denoise.guidance import EVIDENCE, weight
from vidgen.denoise.loop import LoopState, Task, denoise, run_tick
from vidgen.denoise.timetable import Timetable, autoregressive, dualparal, full
from vidgen.engine import Engine
from vidgen.journal import Journal
from vidgen.limits import memory_bytes
from vidgen.model.context import Context
from vidgen.types import ContextMode, GuidanceMode, ResidualGuidance

MakeTask = Callable[..., Task]
NONE, ONETIME, SELF = ResidualGuidance.NONE, ResidualGuidance.ONETIME, ResidualGuidance.SELF
BASE = dualparal(7, 4, block_frames=2, context_frames=1)
QUEUES = {
    "recompute": BASE,
    "cache": replace(BASE, mode=ContextMode.CACHE),
    "cache-stride-anchor": replace(BASE, mode=ContextMode.CACHE, stride=2, anchor_frames=1),
    "autoregressive-cache": autoregressive(
        7, 4, block_frames=2, context_frames=1, mode=ContextMode.CACHE, anchor_frames=1
    ),
}
queues = pytest.mark.parametrize("timetable", QUEUES.values(), ids=QUEUES)
kinds = pytest.mark.parametrize("kind", [ONETIME, SELF])


def residual(task: Task, kind: ResidualGuidance) -> Task:
    return replace(task, residual_guidance=kind)


def assert_same_bits(found: list[Tensor], expected: list[Tensor]) -> None:
    assert [torch.equal(a, b) for a, b in zip(found, expected, strict=True)] == [True] * len(expected)


class Counting:
    """A DiT that keeps what its runs were given."""

    def __init__(self, model: Any) -> None:
        self.model, self.texts, self.contexts = model, list[Tensor](), list[Context]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def forward_and_lend(
        self, latents: Tensor, levels: Tensor, text: Tensor, context: Context, **options: Any
    ) -> Any:
        self.texts.append(text)
        self.contexts.append(context)
        return self.model.forward_and_lend(latents, levels, text, context, **options)


@queues
@pytest.mark.parametrize(("kind", "extra"), [(SELF, 0), (ONETIME, 1), (NONE, 4)])
def test_the_negative_branch_is_run_never_once_a_block_or_always(
    timetable: Timetable, kind: ResidualGuidance, extra: int, dit: Any, task: MakeTask
):
    counting = Counting(dit())
    made = residual(task(timetable, model=counting, guidance_scale=3.0), kind)
    list(denoise(made))
    assert len(counting.texts) == timetable.num_forwards + extra * timetable.num_blocks
    negative = made.texts(timetable.block(0))[1]
    assert sum(torch.equal(text, negative) for text in counting.texts) == extra * timetable.num_blocks
    assert sum(made.runs_at(step) for step in range(timetable.num_steps)) == timetable.num_steps + extra


@pytest.mark.parametrize("scale", [0.0, 1.5, 3.0])
@kinds
def test_a_step_is_the_formula_written_out(
    kind: ResidualGuidance, scale: float, task: MakeTask, latents: Any
):
    made = residual(task(full(3, 5), guidance_scale=scale), kind)
    block = made.timetable.block(0)
    positive, negative = made.texts(block)
    z, said = made.noise(block).double(), torch.zeros(1, dtype=torch.float64)
    for step, (level, following) in enumerate(zip(made.noise_levels, made.noise_levels[1:], strict=False)):
        levels = torch.full((1, 3), level)
        v = made.model(z.float(), levels, positive).double()
        share = level**2 / (level**2 + EVIDENCE * (1 - level) ** 2)
        if kind is ONETIME and step == 0:
            said = z - level * made.model(z.float(), levels, negative).double()
        virtual = (z - said) / level  # the velocity that leads to what the negative prompt said
        v = v + (scale - 1) * share * (v - virtual)
        z = z + (following - level) * v
    (found,) = latents(made)
    assert (found - z).abs().max() < 2e-5 * z.abs().max()


def test_the_virtual_branch_counts_fully_in_noise_and_not_at_all_in_a_clean_picture():
    assert weight(1.0) == 1 and weight(0.0) == 0
    levels = [step / 50 for step in range(51)]
    assert sorted(levels, key=weight) == levels


@pytest.mark.parametrize("scale", [1.0, 3.0])
@queues
def test_without_it_the_bits_are_those_of_both_branches(
    timetable: Timetable, scale: float, task: MakeTask, latents: Any
):
    made = task(timetable, guidance_scale=scale)
    assert_same_bits(latents(residual(made, NONE)), latents(made))
    if scale == 1.0:  # no guidance is no guidance
        for kind in (ONETIME, SELF):
            assert_same_bits(latents(residual(made, kind)), latents(made))


def test_of_one_step_onetime_is_full_guidance_and_of_more_it_is_not(task: MakeTask, latents: Any):
    one = task(dualparal(6, 1, block_frames=2, context_frames=1), guidance_scale=3.0)
    assert_same_bits(latents(residual(one, ONETIME)), latents(one))
    more = task(BASE, guidance_scale=3.0)
    found = [latents(residual(more, kind)) for kind in ResidualGuidance]
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert not torch.equal(found[a][1], found[b][1])


def test_self_never_looks_at_the_negative_prompt(task: MakeTask, latents: Any):
    made = residual(task(BASE, guidance_scale=3.0), SELF)
    poisoned = replace(made, texts=lambda block: (made.texts(block)[0], made.texts(block)[1] * torch.nan))
    assert_same_bits(latents(poisoned), latents(made))


@queues
@kinds
def test_stopped_after_any_tick_and_resumed_from_the_journal_the_bits_are_the_same(
    timetable: Timetable, kind: ResidualGuidance, task: MakeTask, latents: Any, tmp_path: Path
):
    made = residual(task(timetable, guidance_scale=2.0), kind)
    expected, state, num_finished = latents(made), LoopState(), 0
    with Journal(tmp_path / "job", create=parse_job({"prompt": "a red circle"})) as journal:
        for _ in range(timetable.num_ticks):
            num_finished += len(run_tick(made, state))
            journal.save_state(state)
            read = journal.load_state()
            for index, block in state.blocks.items():
                kept = read.blocks[index].negative_BCFYX
                is_kept = kind is ONETIME and block.steps_done < timetable.num_steps
                assert (block.negative_BCFYX is not None) == (kept is not None) == is_kept
            assert_same_bits(latents(made, read), expected[num_finished:])
            assert_same_bits(latents(made, copy.deepcopy(state)), expected[num_finished:])


def test_a_first_steps_negative_branch_reads_the_prompts_keys_where_there_are_no_others(
    dit: Any, task: MakeTask
):
    counting = Counting(dit())
    list(denoise(residual(task(QUEUES["autoregressive-cache"], model=counting, guidance_scale=2.0), ONETIME)))
    firsts = range(0, 5 * 4, 5)  # four steps and one run more a block
    for run in firsts:
        prompts, negative = counting.contexts[run : run + 2]
        assert len(prompts.before) == len(negative.before) == (2 if run else 0)
        for own, other in zip(prompts.before, negative.before, strict=True):
            assert torch.equal(own.key_BFSHD, other.key_BFSHD)


def test_two_runs_of_which_only_the_first_step_has_two_make_no_batch(task: MakeTask, latents: Any):
    made = task(BASE, guidance_scale=3.0)
    with pytest.raises(ValueError, match="guidance=stacked: .*leave guidance out"):
        replace(made, guidance_mode=GuidanceMode.STACKED, residual_guidance=ONETIME)
    stacked = replace(made, guidance_mode=GuidanceMode.STACKED, residual_guidance=SELF)
    assert_same_bits(latents(stacked), latents(residual(made, SELF)))
    unguided = task(BASE)
    replace(unguided, guidance_mode=GuidanceMode.STACKED, residual_guidance=ONETIME)  # one branch anyway


def test_a_job_says_it_and_needs_less_memory():
    engine, needed = Engine.from_pretrained(with_dit=False), list[int]()
    for kind in ("self", "onetime", "none"):
        queue = {"residual_guidance": kind, "context_mode": "cache"}
        plan = engine.plan(parse_job({"prompt": "a red circle", "num_frames": 400, "queue": queue}))
        assert plan.task.residual_guidance == plan.job.queue.residual_guidance == kind
        needed.append(memory_bytes(plan.job, engine.config, plan.task.timetable, plan.strides, 0))
    assert needed == sorted(needed) and len(set(needed)) == 3


def test_a_job_begun_before_there_was_such_a_setting_goes_on():
    values = {"prompt": "a red circle", "num_frames": 33, "threads": 1}
    job = parse_job({**values, "queue": {"stride": 2}})
    assert frames_digest(job) == "ca8c778571fbc7b9ea057bb8126d51f86e384a61b858a0fb033788c14a206a39"
    for kind in ("onetime", "self"):
        changed = parse_job({**values, "queue": {"stride": 2, "residual_guidance": kind}})
        assert frames_digest(changed) != frames_digest(job)


def test_the_built_in_model_still_makes_a_picture_with_it():
    """Of its prediction's size: a virtual branch that counted fully throughout would triple it."""
    engine = Engine.from_pretrained()
    made = [
        engine(
            "a red circle moving left over a gray background",
            num_frames=16,
            num_inference_steps=6,
            output_type="latent",
            queue={"residual_guidance": kind},
        ).frames
        for kind in ("none", "onetime", "self")
    ]
    scale = load_small(with_dit=False).codec.variance.mean().sqrt()
    plain = made[0].std()
    for latents in made:
        assert 0.7 * plain < latents.std() < 1.4 * plain
        assert latents.std() < 3 * scale
