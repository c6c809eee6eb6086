"""Patches of one video, one after the other, with keys and values of the others that may be a step old."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vidgen.config import parse_job
from vidgen.denoise.attending import Sparsity
from vidgen.denoise.forwards import Lender
from vidgen.denoise.given import Given
from vidgen.denoise.loop import LoopState, Task, run_tick
from vidgen.denoise.task import make_task
from vidgen.denoise.timetable import Timetable, full, pipefusion
from vidgen.engine import Engine
from vidgen.journal import Journal
from vidgen.limits import memory_bytes
from vidgen.sparsity.making import make_policy
from vidgen.sparsity.settings import SparsitySettings
from vidgen.types import GuidanceMode, NoiseKind, ResidualGuidance

MakeTask = Callable[..., Task]
TOLERANCE = 3e-6  # as in test_specification.py
PATCHES = {
    "even": pipefusion(6, 4, block_frames=2),
    "short-last": pipefusion(7, 4, block_frames=3, warm_up_steps=2),
    "frame-by-frame": pipefusion(4, 3, block_frames=1),
    "one-patch": pipefusion(3, 4, block_frames=5),
    "one-step": pipefusion(5, 1, block_frames=2),
}
some_patches = pytest.mark.parametrize("timetable", PATCHES.values(), ids=PATCHES)


@st.composite
def timetables(draw: st.DrawFn) -> Timetable:
    steps = draw(st.integers(1, 6))
    return pipefusion(
        draw(st.integers(1, 20)), steps, block_frames=draw(st.integers(1, 6)),
        warm_up_steps=draw(st.integers(1, 8)), switch_step=draw(st.none() | st.integers(0, steps)),
    )  # fmt: skip


@given(timetables())
def test_every_patch_takes_a_step_in_every_tick_oldest_first(timetable: Timetable):
    assert timetable.num_ticks == timetable.num_steps
    forwards = [list(tick) for tick in timetable.ticks()]
    for tick, ran in enumerate(forwards):
        expected = [(block, tick) for block in range(timetable.num_blocks)]
        assert [part for forward in ran for part in forward.parts] == expected
        is_whole = tick < (timetable.warm_up_steps or 0) or tick == timetable.switch_step
        assert len(ran) == (1 if is_whole else timetable.num_blocks)
    assert timetable.num_forwards == sum(map(len, forwards))
    assert timetable.forwards(timetable.num_ticks) == ()


@given(timetables())
def test_a_patch_sees_all_others_whole_in_their_newest_version_of_its_own_expert(timetable: Timetable):
    newest: dict[int, int] = {}
    for tick, forwards in enumerate(timetable.ticks()):
        for forward in forwards:
            reads = forward.patches_kv
            if not forward.newer and timetable.num_blocks > 1:
                assert [read.block for read in reads] == [b for b in newest if b != forward.block]
            for read in reads:
                assert (read.start, read.stop) == (0, timetable.block(read.block).num_frames)
                assert read.step == newest[read.block] == tick - (read.block > forward.block)
                assert timetable.expert(read.step) == timetable.expert(forward.step)
            newest |= dict(forward.parts)


@given(timetables())
def test_what_is_lent_is_read_and_what_is_read_is_lent(timetable: Timetable):
    lent, read = set(), set()
    for forward in (forward for tick in timetable.ticks() for forward in tick):
        for lend in forward.lends:
            block, step = forward.parts[lend.part]
            own = timetable.block(block)
            start = own.start - timetable.block(forward.block).start
            assert (lend.to, lend.start, lend.stop) == (Lender.PATCHES, start, start + own.num_frames)
            lent.add((block, step))
        read |= {(read.block, read.step) for read in forward.patches_kv}
    assert read == lent


def plain_latents(plain: Any, made: Task, scale: float) -> list[Tensor]:
    """PipeFusion written out: a table of the newest keys and values of every patch. Slow, in float64."""
    timetable, levels = made.timetable, made.noise_levels
    model = copy.deepcopy(made.model).double()
    blocks = [timetable.block(index) for index in range(timetable.num_blocks)]
    latents = [made.noise(block)[0].double() for block in blocks]
    texts = [text[0].double() for text in made.texts(blocks[0])]
    newest: list[dict[int, Any]] = [{}, {}]  # per branch
    for step in range(timetable.num_steps):
        if step < (timetable.warm_up_steps or 0):
            said = []
            for branch, text in enumerate(texts):
                window = torch.cat(latents, dim=1)
                velocity, own = plain.plain_forward(
                    model, window, [levels[step]] * window.shape[1], text, [], []
                )
                said.append(velocity)
                newest[branch] = {
                    b.index: [tuple(x[b.start : b.start + b.num_frames] for x in kv) for kv in own]
                    for b in blocks
                }
            velocity = said[1] + scale * (said[0] - said[1])
            velocities = velocity.split([block.num_frames for block in blocks], dim=1)
            latents = [
                latent + (levels[step + 1] - levels[step]) * part
                for latent, part in zip(latents, velocities, strict=True)
            ]
            continue
        for index in range(len(blocks)):
            said = []
            for branch, text in enumerate(texts):
                before = [newest[branch][other] for other in range(index)]
                after = [newest[branch][other] for other in range(index + 1, len(blocks))]
                own_levels = [levels[step]] * latents[index].shape[1]
                velocity, own = plain.plain_forward(model, latents[index], own_levels, text, before, after)
                said.append(velocity)
                newest[branch][index] = own
            velocity = said[1] + scale * (said[0] - said[1])
            latents[index] = latents[index] + (levels[step + 1] - levels[step]) * velocity
    return latents


@some_patches
def test_the_loop_equals_the_pipeline_of_patches_written_out(
    timetable: Timetable, task: MakeTask, latents: Any, plain: Any
):
    made = task(timetable, guidance_scale=2.0)
    found, expected = latents(made), plain_latents(plain, made, 2.0)
    largest = max(block.abs().max() for block in expected)
    for one, other in zip(found, expected, strict=True):
        assert (one[0] - other).abs().max() < TOLERANCE * largest


def whole(task: Task) -> Task:
    """The same video as one block."""
    timetable = full(task.timetable.num_frames, task.timetable.num_steps)
    patches = [task.timetable.block(index) for index in range(task.timetable.num_blocks)]
    noise = torch.cat([task.noise(patch) for patch in patches], dim=2)
    return replace(task, timetable=timetable, noise=lambda _: noise)


@pytest.mark.parametrize("mode", GuidanceMode)
@some_patches
def test_with_all_steps_in_the_warm_up_it_is_full_bit_for_bit(
    timetable: Timetable, mode: GuidanceMode, task: MakeTask, latents: Any
):
    timetable = replace(timetable, warm_up_steps=timetable.num_steps)
    made = replace(task(timetable, guidance_scale=2.0), guidance_mode=mode)
    (expected,) = latents(whole(made))
    assert torch.equal(torch.cat(latents(made), dim=2), expected)


def test_known_frames_are_those_of_full(task: MakeTask, latents: Any):
    """Three of them: one patch is known, the next one in part."""
    known = torch.randn(3, 3, 4, 6, generator=torch.Generator().manual_seed(1))
    timetable = pipefusion(6, 4, block_frames=2, warm_up_steps=4)
    warm = replace(task(timetable), given=Given(pinned_CFYX=known))
    (exact,) = latents(whole(warm))
    assert torch.equal(torch.cat(latents(warm), dim=2), exact)
    patched = torch.cat(latents(replace(warm, timetable=replace(timetable, warm_up_steps=1))), dim=2)
    assert torch.equal(patched[:, :, :3], exact[:, :, :3])
    assert torch.equal(patched[0, :, :3], known) and not torch.equal(patched, exact)


def test_one_patch_is_full_bit_for_bit(task: MakeTask, latents: Any):
    made = task(PATCHES["one-patch"], guidance_scale=2.0)
    assert torch.equal(latents(made)[0], latents(whole(made))[0])


@given(frames=st.integers(1, 7), block=st.integers(1, 4), steps=st.integers(1, 4), warm=st.integers(1, 5))
@settings(max_examples=15, deadline=None)
def test_sizes_of_any_kind_run(frames: int, block: int, steps: int, warm: int, made_of: Any):
    timetable = pipefusion(frames, steps, block_frames=block, warm_up_steps=warm)
    assert sum(latents.shape[2] for latents in made_of(timetable)) == frames


@pytest.fixture(scope="module")
def made_of(dit: Any) -> Callable[[Timetable], list[Tensor]]:
    def made_of(timetable: Timetable) -> list[Tensor]:
        made, state = small_task(dit(), timetable), LoopState()
        done = [run_tick(made, state) for _ in range(timetable.num_ticks)]
        return [block.latents_BCFYX for blocks in done for block in blocks]

    return made_of


def small_task(model: Any, timetable: Timetable) -> Task:
    text = torch.ones(1, 2, model.config.text_width)
    return make_task(
        model, timetable, lambda _: (text, -text), latent_rows=4, latent_columns=6, seed=3,
        guidance_scale=2.0, noise=NoiseKind.POOL,
    )  # fmt: skip


def test_its_noise_is_that_of_full(dit: Any):
    for kind in NoiseKind:
        patches, one = (
            make_task(
                dit(), timetable, lambda _: (torch.zeros(1, 1, 7),), latent_rows=4, latent_columns=6, seed=3,
                guidance_scale=1.0, noise=kind,
            )
            for timetable in (PATCHES["short-last"], full(7, 4))
        )  # fmt: skip
        cut = [patches.noise(patches.timetable.block(index)) for index in (2, 0, 1)]
        assert torch.equal(torch.cat([*cut[1:], cut[0]], dim=2), one.noise(one.timetable.block(0)))


@pytest.mark.parametrize("kind", ResidualGuidance)
@some_patches
def test_stopped_after_any_tick_and_resumed_from_the_journal_the_bits_are_the_same(
    timetable: Timetable, kind: ResidualGuidance, task: MakeTask, latents: Any, tmp_path: Path
):
    made = replace(task(timetable, guidance_scale=2.0), residual_guidance=kind)
    expected, state = torch.cat(latents(made), dim=2), LoopState()
    with Journal(tmp_path / "job", create=parse_job({"prompt": "a red circle"})) as journal:
        for tick in range(timetable.num_ticks - 1):
            assert run_tick(made, state) == []
            assert set(state.blocks) == set(timetable.kept_after(tick))
            journal.save_state(state)
            assert torch.equal(torch.cat(latents(made, journal.load_state()), dim=2), expected)


def test_given_up_in_the_middle_of_a_tick_the_state_is_that_before_it(task: MakeTask, latents: Any):
    made, state = task(PATCHES["even"]), LoopState()
    expected = torch.cat(latents(made), dim=2)
    run_tick(made, state)
    for forwards_before in (1, 2):
        left = iter(range(forwards_before))
        with pytest.raises(StopIteration):
            run_tick(made, state, lambda left=left: next(left))  # type: ignore[arg-type, return-value]
    assert torch.equal(torch.cat(latents(made, state), dim=2), expected)


def test_a_second_expert_reads_nothing_of_the_first_and_begins_exactly(
    task: MakeTask, latents: Any, dit: Any
):
    timetable = pipefusion(6, 4, block_frames=2)
    one = task(timetable)
    made = replace(one, timetable=replace(timetable, switch_step=2), second_model=dit(num_heads=1))
    patched = torch.cat(latents(made), dim=2)
    (exact,) = latents(
        replace(whole(one), timetable=full(6, 4, switch_step=2), second_model=made.second_model)
    )
    assert not torch.equal(patched, exact)
    warm = replace(made, timetable=replace(made.timetable, warm_up_steps=4))
    assert torch.equal(torch.cat(latents(warm), dim=2), exact)


def test_sparse_attention_is_refused_in_one_line(task: MakeTask):
    policy = make_policy(SparsitySettings(policy="radial"))
    assert policy is not None
    with pytest.raises(
        ValueError, match="^timetable=pipefusion: knows no sparse attention; leave sparsity out$"
    ):
        replace(task(PATCHES["even"]), sparsity=Sparsity(policy=policy))
    with pytest.raises(ValueError, match="^warm_up_steps=0: allowed is at least 1$"):
        pipefusion(6, 4, block_frames=2, warm_up_steps=0)


def test_a_job_says_it_and_its_memory_is_counted():
    engine = Engine.from_pretrained(with_dit=False)
    values = {"prompt": "a red circle", "num_frames": 400, "num_inference_steps": 4}

    def plan(**queue: Any) -> Any:
        return engine.plan(parse_job({**values, "queue": queue}))

    made, one = plan(timetable="pipefusion", warm_up_steps=2), plan(timetable="full")
    assert made.task.timetable == pipefusion(100, 4, block_frames=4, warm_up_steps=2)
    needed = [memory_bytes(p.job, engine.config, p.task.timetable, p.strides, 0) for p in (one, made)]
    assert needed[0] < needed[1]


def test_on_the_builtin_model_the_error_is_small_and_falls_with_more_warm_up_steps(
    capsys: pytest.CaptureFixture[str],
):
    """Against `full` of the same seed: norm of the latents' difference over norm of the latents."""
    engine = Engine.from_pretrained()
    values = {"prompt": "a red circle moving left over a gray background", "num_frames": 33, "threads": 1}

    def made(**queue: Any) -> Tensor:
        task, state = engine.plan(parse_job({**values, "queue": queue})).task, LoopState()
        done = [run_tick(task, state) for _ in range(task.timetable.num_ticks)]
        return torch.cat([block.latents_BCFYX for blocks in done for block in blocks], dim=2)

    exact = made(timetable="full")
    errors: dict[int, float] = {}
    for warm_up in (1, 4, 8):
        patched = made(timetable="pipefusion", block_frames=3, warm_up_steps=warm_up)
        errors[warm_up] = float((patched - exact).norm() / exact.norm())
    with capsys.disabled():
        shown = ", ".join(f"{error:.3f} after {warm_up}" for warm_up, error in errors.items())
        print(f"\nerror of pipefusion in 20 steps by exact ones: {shown}")
    assert errors[1] > errors[4] > errors[8] > 0
    assert errors[1] < 0.3 and errors[8] < 0.05
