"""Lock step: all frames take each step together, and attend by clips; alike on any number of ranks."""

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
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
from vidgen.denoise.lockstep import ClipAttention, Clips, dense
from vidgen.denoise.loop import LoopState, Task, run_tick
from vidgen.denoise.timetable import full
from vidgen.engine import Engine
from vidgen.journal import Journal
from vidgen.kernels.rope.reference import rotate
from vidgen.model.context import Context
from vidgen.model.dit import DiTConfig
from vidgen.model.layers import Attend
from vidgen.model.rope import rotations
from vidgen.parallel.lanes.clip import SplitClips
from vidgen.parallel.lanes.exchange import Exchange, in_process
from vidgen.sparsity.making import make_policy
from vidgen.sparsity.settings import SparsitySettings

MakeTask = Callable[..., Task]
CONFIG = DiTConfig(width=24, num_heads=2, rope_theta=100.0)  # heads of 12 channels
CLIPS = {
    "halo": Clips(num_frames=9, clip_frames=3, halo_frames=1),
    "globals": Clips(num_frames=9, clip_frames=2, halo_frames=1, global_frames=3),
    "apart": Clips(num_frames=7, clip_frames=3, halo_frames=0),
    "frame-by-frame": Clips(num_frames=5, clip_frames=1, halo_frames=1, global_frames=2),
    "one-clip": Clips(num_frames=4, clip_frames=6, halo_frames=2, global_frames=2),
}
some_clips = pytest.mark.parametrize("clips", CLIPS.values(), ids=CLIPS)


@st.composite
def all_clips(draw: st.DrawFn) -> Clips:
    return Clips(
        num_frames=draw(st.integers(1, 20)), clip_frames=draw(st.integers(1, 6)),
        halo_frames=draw(st.integers(0, 6)), global_frames=draw(st.integers(0, 6)),
    )  # fmt: skip


@given(all_clips())
def test_clips_partition_the_frames_and_see_them_around_and_over_the_whole_video(clips: Clips):
    own = [frame for clip in range(clips.num_clips) for frame in clips.own(clip)]
    assert own == list(range(clips.num_frames))
    for clip in range(clips.num_clips):
        window = clips.window(clip)
        near = {
            f for f in range(clips.num_frames) for o in clips.own(clip) if abs(f - o) <= clips.halo_frames
        }
        assert set(window) == near
        far = clips.globals(clip)
        assert not set(far) & set(window) and len(far) <= clips.global_frames
        assert [frame for frame, _ in clips.seen(clip)] == sorted([*window, *far])


@given(all_clips())
def test_frames_that_all_clips_share_are_spread_evenly(clips: Clips):
    alone = [replace(clips, clip_frames=1, halo_frames=0).globals(frame) for frame in range(clips.num_frames)]
    spread = sorted({frame for far in alone for frame in far})
    count = min(clips.global_frames, clips.num_frames)
    assert clips.num_frames == 1 or len(spread) == count
    gaps = [after - before for before, after in zip(spread, spread[1:], strict=False)]
    assert all(
        math.floor(clips.num_frames / count) <= gap <= math.ceil(clips.num_frames / count) for gap in gaps
    )


@given(all_clips())
def test_a_far_frame_stands_right_outside_the_window_in_order(clips: Clips):
    for clip in range(clips.num_clips):
        window, seen = clips.window(clip), clips.seen(clip)
        places = [place for _, place in seen]
        assert places == list(range(places[0], places[0] + len(seen)))
        for frame, place in seen:
            if frame in window:
                assert place == frame
            else:  # nearer than it is, never further
                assert frame <= place < window.start or window.stop <= place <= frame


def heads(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, 2, 12, generator=torch.Generator().manual_seed(seed))


def attend_written_out(clips: Clips, query: Tensor, key: Tensor, value: Tensor, tokens: int) -> Tensor:
    """[B, Q, H, D] one clip after another in float64; keys come unturned, and are turned for their places."""
    outs = []
    turns = rotations((clips.num_frames, 1, tokens), 12, CONFIG.rope_theta, torch.device("cpu"))
    turns = [part.double().unflatten(0, (clips.num_frames, tokens)) for part in turns]
    query, key, value = (x.double().unflatten(1, (clips.num_frames, tokens)) for x in (query, key, value))
    for clip in range(clips.num_clips):
        own, seen = list(clips.own(clip)), clips.seen(clip)
        q = torch.cat([rotate(query[:, f], *(part[f] for part in turns)) for f in own], dim=1)
        k = torch.cat([rotate(key[:, f], *(part[place] for part in turns)) for f, place in seen], dim=1)
        v = torch.cat([value[:, f] for f, _ in seen], dim=1)
        weights = torch.einsum("bqhd,bkhd->bhqk", q, k).div(math.sqrt(12)).softmax(-1)
        outs.append(torch.einsum("bhqk,bkhd->bqhd", weights, v))
    return torch.cat(outs, dim=1)


@given(all_clips(), st.integers(1, 3), st.integers(1, 2))
@settings(max_examples=50, deadline=None)
def test_attention_equals_that_with_keys_turned_for_where_they_stand(clips: Clips, tokens: int, batch: int):
    length = clips.num_frames * tokens
    query, key, value = (heads(batch, length, seed=seed) for seed in range(3))
    turns = rotations((clips.num_frames, 1, tokens), 12, CONFIG.rope_theta, torch.device("cpu"))
    attention = ClipAttention(clips, CONFIG, range(1))
    found = attention.attend(rotate(query, *turns), rotate(key, *turns), value)
    expected = attend_written_out(clips, query, key, value, tokens)
    assert (found - expected).abs().max() <= 3e-6 * expected.abs().max()


@given(all_clips(), st.integers(1, 5), st.integers(1, 3), st.integers(1, 2))
@settings(max_examples=40, deadline=None)
def test_ranks_that_share_the_clips_give_the_bits_of_one_process(
    clips: Clips, lanes: int, tokens: int, batch: int
):
    lanes = min(lanes, clips.num_clips)
    tensors = [heads(batch, clips.num_frames * tokens, seed=seed) for seed in range(3)]
    attention = ClipAttention(clips, CONFIG, range(1))

    def on_rank(exchange: Exchange) -> tuple[Tensor, int]:
        split = SplitClips(attention, exchange)
        at_hand = [tensor.unflatten(1, (clips.num_frames, tokens))[:, split.frames] for tensor in tensors]
        query, key, value = (tensor.flatten(1, 2) for tensor in at_hand)
        out = split.attend(query, key, value)
        own = out.unflatten(1, (at_hand[0].shape[1], tokens))
        return split.gather(own).flatten(1, 2), exchange.bytes_sent

    exchanges = in_process(range(lanes), timeout_s=10)
    with ThreadPoolExecutor(lanes) as threads:
        found = list(threads.map(on_rank, exchanges))
    query, key, value = tensors
    expected = attention.attend(query, key, value)
    assert all(torch.equal(out, expected) for out, _ in found)
    assert lanes > 1 or found[0][1] == 0


def test_a_rank_with_no_tokens_of_a_frame_takes_part():
    """As some have when the sequence is split as well and frames are small."""
    clips = CLIPS["globals"]
    asked: list[tuple[int, int]] = []

    def inner(query_frames: int, key_frames: int) -> Attend:
        asked.append((query_frames, key_frames))
        return lambda query, key, value: torch.zeros_like(query)

    (alone,) = in_process(range(1))
    empty = heads(1, 0)
    out = SplitClips(ClipAttention(clips, CONFIG, range(1)), alone).attend(empty, empty, empty, inner)
    assert out.shape == empty.shape
    assert asked == [(len(clips.own(c)), len(clips.seen(c))) for c in range(clips.num_clips)]


def test_only_what_a_clip_sees_is_sent():
    clips = Clips(num_frames=12, clip_frames=3, halo_frames=1)
    tensors = [heads(1, 12, seed=seed) for seed in range(3)]
    exchanges = in_process(range(4), timeout_s=10)

    def on_rank(exchange: Exchange) -> int:
        split = SplitClips(ClipAttention(clips, CONFIG, range(1)), exchange)
        query, key, value = (tensor[:, split.frames] for tensor in tensors)
        split.attend(query, key, value)
        return split.bytes_sent

    frame_bytes = 2 * tensors[0][:, 0].nbytes  # keys and values
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(on_rank, exchanges)) == [frame_bytes * n for n in (1, 2, 2, 1)]


def test_more_ranks_than_clips_are_refused():
    exchange = in_process(range(4))[0]
    attention = ClipAttention(CLIPS["halo"], CONFIG, range(1))
    with pytest.raises(
        ValueError, match="^clip=4: the video has 3 clips of 3 latent frames; take clip=1 to 3"
    ):
        SplitClips(attention, exchange)


def in_clips(task: MakeTask, clips: Clips, **options: Any) -> Task:
    return replace(task(full(clips.num_frames, 3), **options), clips=clips)


@pytest.mark.parametrize("scale", [1.0, 2.0])
@pytest.mark.parametrize("clip_frames", [1, 2, 5])
def test_with_a_halo_over_the_whole_video_lock_step_is_full(
    clip_frames: int, scale: float, task: MakeTask, latents: Any
):
    clips = Clips(num_frames=5, clip_frames=clip_frames, halo_frames=5, global_frames=2)
    made = in_clips(task, clips, guidance_scale=scale)
    (found,), (expected,) = latents(made), latents(replace(made, clips=None))
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_without_halo_and_globals_a_clip_is_a_video_of_its_own(task: MakeTask, latents: Any):
    """But for the solver's first noise: scores depend on relative positions only."""
    made = in_clips(task, CLIPS["apart"])
    noise = made.noise(made.timetable.block(0))
    (found,) = latents(made)
    for clip in range(CLIPS["apart"].num_clips):
        own = slice(CLIPS["apart"].own(clip).start, CLIPS["apart"].own(clip).stop)
        alone = replace(made, clips=None, timetable=full(own.stop - own.start, 3))
        (expected,) = latents(replace(alone, noise=lambda _, own=own: noise[:, :, own]))
        assert (found[:, :, own] - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_what_clips_see_of_one_another_changes_them(task: MakeTask, latents: Any):
    """Else the laws above would hold of clips that see nothing."""
    seen = [
        Clips(num_frames=9, clip_frames=3, halo_frames=h, global_frames=g)
        for h, g in [(0, 0), (1, 0), (1, 3)]
    ]
    made = [latents(in_clips(task, clips))[0] for clips in seen]
    for one, other in zip(made, made[1:], strict=False):
        assert (one - other).abs().max() > 0.01 * other.abs().max()


@some_clips
def test_a_forward_on_ranks_that_share_the_clips_equals_the_whole(clips: Clips, task: MakeTask):
    made = in_clips(task, clips)
    model, lanes = made.model, min(3, clips.num_clips)
    noise = made.noise(made.timetable.block(0))
    levels = torch.full((1, clips.num_frames), 0.7)
    attending = made.attending(range(2), LoopState().lent)
    assert isinstance(attending, ClipAttention)
    grid, text = model.token_grid(noise.shape), made.run_texts(made.timetable.block(0))[0]
    attends = attending.attends(0, 0, 0, grid, Context())
    whole, _ = model.run_layers(model.embed(noise), model.condition(levels, text), grid, Context(), attends)

    def on_rank(exchange: Exchange) -> Tensor:
        part = Clipped(SplitClips(attending, exchange))
        x, shared = model.embed(noise)[:, part.frames], model.condition(levels[:, part.frames], text)
        out, _ = model.run_layers(x, shared, grid, Context(), lends=False, part=part)
        return part.split.gather(out)

    with ThreadPoolExecutor(lanes) as threads:
        for out in threads.map(on_rank, in_process(range(lanes), timeout_s=10)):
            assert (out - whole).abs().max() <= 1e-5 * whole.abs().max()


class Clipped:
    """The part of the model's tokens that a rank has of clips alone."""

    tokens = slice(None)

    def __init__(self, split: SplitClips) -> None:
        self.split, self.frames = split, split.frames

    def around(self, attend: Attend, key_frames: int, **_: Any) -> Attend:
        return lambda query, key, value: self.split.attend(query, key, value, dense)


@some_clips
def test_stopped_after_any_tick_and_resumed_from_the_journal_the_bits_are_the_same(
    clips: Clips, task: MakeTask, latents: Any, tmp_path: Path
):
    made, state = in_clips(task, clips, guidance_scale=2.0), LoopState()
    (expected,) = latents(made)
    with Journal(tmp_path / "job", create=parse_job({"prompt": "a red circle"})) as journal:
        for _ in range(made.timetable.num_ticks - 1):
            run_tick(made, state)
            journal.save_state(state)
            (found,) = latents(made, journal.load_state())
            assert torch.equal(found, expected)


def test_what_does_not_go_with_clips_is_refused_in_one_line(task: MakeTask, dit: Any):
    policy = make_policy(SparsitySettings(policy="radial"))
    assert policy is not None
    with pytest.raises(
        ValueError, match="^timetable=lockstep: knows no sparse attention; leave sparsity out$"
    ):
        replace(in_clips(task, CLIPS["halo"]), sparsity=Sparsity(policy=policy))
    with pytest.raises(
        ValueError, match="^timetable=lockstep: this model's attention has a window already; "
    ):
        in_clips(task, CLIPS["halo"], model=dit(window=(1, 1, 0)))
    good = CLIPS["halo"]
    for field, said in {"clip_frames": "block_frames=-1", "halo_frames": "context_frames=-1"}.items():
        with pytest.raises(ValueError, match=f"^{said}: allowed is at least"):
            replace(good, **{field: -1})


def test_a_job_says_it_and_its_noise_is_that_of_full():
    engine = Engine.from_pretrained(with_dit=False)
    values = {"prompt": "a red circle", "num_frames": 65, "num_inference_steps": 4}

    def plan(**queue: Any) -> Any:
        return engine.plan(parse_job({**values, "queue": queue})).task

    made, whole = plan(timetable="lockstep", global_frames=2), plan(timetable="full")
    assert made.clips == Clips(num_frames=17, clip_frames=4, halo_frames=2, global_frames=2)
    assert plan(timetable="lockstep").clips.global_frames == 4
    assert whole.clips is None and made.timetable == whole.timetable == full(17, 4)
    block = whole.timetable.block(0)
    assert torch.equal(made.noise(block), whole.noise(block))
