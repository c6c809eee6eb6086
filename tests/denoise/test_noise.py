"""Laws of the noise: a function of (seed, block), each frame fresh to the frames just before it."""

import math
import random
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from vidgen.denoise.noise import NoiseSource
from vidgen.types import NoiseKind

SHAPE = (2, 3, 4)
KINDS = list(NoiseKind)


def source(
    seed: int = 3, *, block: int = 4, context: int = 2, kind: NoiseKind = NoiseKind.POOL
) -> NoiseSource:
    return NoiseSource(seed, frame_shape=SHAPE, block_frames=block, context_frames=context, kind=kind)


def frame_keys(noise: Tensor) -> list[bytes]:
    """The frames' bytes, so that equal frames are equal keys."""
    return [frame.contiguous().numpy().tobytes() for frame in noise[0].transpose(0, 1)]


sizes = st.integers(1, 6).flatmap(lambda block: st.tuples(st.just(block), st.integers(0, block)))


@given(sizes, st.sampled_from(KINDS), st.integers(0, 2**63 - 1), st.randoms(use_true_random=False))
def test_a_blocks_noise_does_not_depend_on_which_blocks_are_asked_or_in_what_order(
    size: tuple[int, int], kind: NoiseKind, seed: int, rng: random.Random
):
    block, context = size
    in_order = source(seed, block=block, context=context, kind=kind)
    expected = [in_order.block(index) for index in range(6)]
    order = [rng.randrange(6) for _ in range(4)]
    other = source(seed, block=block, context=context, kind=kind)
    for index in order:
        assert torch.equal(other.block(index), expected[index])
        alone = source(seed, block=block, context=context, kind=kind)
        assert torch.equal(alone.block(index), expected[index])


@given(sizes, st.integers(0, 2**32))
def test_every_window_is_a_permutation_of_the_same_distinct_pool_frames(size: tuple[int, int], seed: int):
    block, context = size
    noise = source(seed, block=block, context=context)
    windows = []
    for index in range(1, 7):
        before = noise.block(index - 1)[:, :, block - context :]
        windows.append(frame_keys(torch.cat((before, noise.block(index)), dim=2)))
    for window in windows:
        assert len(set(window)) == block + context
        assert sorted(window) == sorted(windows[0])


@given(sizes, st.integers(0, 2**32))
def test_a_block_never_repeats_the_context_frames_just_before_it(size: tuple[int, int], seed: int):
    block, context = size
    noise = source(seed, block=block, context=context)
    for index in range(1, 7):
        before = frame_keys(noise.block(index - 1))[block - context :]
        assert not set(before) & set(frame_keys(noise.block(index)))
        assert not set(noise.pool_frames(index - 1)[block - context :]) & set(noise.pool_frames(index))


def test_pool_order_changes_from_block_to_block():
    orders = {tuple(source(block=8, context=4).pool_frames(index)) for index in range(20)}
    assert len(orders) == 20


@pytest.mark.parametrize("kind", KINDS)
def test_noise_is_standard_normal(kind: NoiseKind):
    noise = NoiseSource(0, frame_shape=(16, 32, 32), block_frames=4, context_frames=2, kind=kind).block(0)
    values = noise.flatten()
    bound = 5 / math.sqrt(values.numel())  # five standard errors
    assert abs(values.mean()) < bound
    assert abs(values.var() - 1) < math.sqrt(2) * bound
    assert abs((values.abs() < 1).float().mean() - 0.6827) < bound


def test_independent_blocks_share_no_frame():
    noise = source(kind=NoiseKind.INDEPENDENT)
    frames = [key for index in range(10) for key in frame_keys(noise.block(index))]
    assert len(set(frames)) == len(frames)


@pytest.mark.parametrize("kind", KINDS)
def test_different_seeds_share_no_frame(kind: NoiseKind):
    frames = [key for seed in range(10) for key in frame_keys(source(seed, kind=kind).block(2))]
    assert len(set(frames)) == len(frames)


def test_pool_and_independent_noise_of_a_seed_differ():
    assert not set(frame_keys(source().block(0))) & set(
        frame_keys(source(kind=NoiseKind.INDEPENDENT).block(0))
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_short_block_has_the_first_frames_of_the_full_one(kind: NoiseKind):
    full = source(kind=kind).block(3)
    assert full.shape == (1, SHAPE[0], 4, *SHAPE[1:]) and full.dtype == torch.float32
    for num_frames in range(1, 5):
        assert torch.equal(source(kind=kind).block(3, num_frames), full[:, :, :num_frames])


@pytest.mark.parametrize("kind", KINDS)
def test_global_random_state_is_neither_used_nor_touched(kind: NoiseKind):
    torch.manual_seed(1)
    expected = source(kind=kind).block(2)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    assert torch.equal(source(kind=kind).block(2), expected)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_blocks_noise_is_its_own_copy():
    noise = source()
    first = noise.block(1)
    kept = first.clone()
    first.zero_()
    assert torch.equal(noise.block(1), kept)


def test_noise_of_a_seed_is_the_same_for_ever():
    """Saved jobs are continued by later versions: these numbers may never change."""
    expected = torch.tensor([0.114087, 1.486402, 0.207126, 0.704189])
    torch.testing.assert_close(source(42).block(1)[0, 0, 0, 0], expected, rtol=0, atol=1e-6)
    assert source(42).pool_frames(3) == [0, 2, 5, 4]


def test_threads_that_share_a_source_draw_what_one_draws():
    def draw(shared: NoiseSource, meet: threading.Barrier) -> list[list[int]]:
        meet.wait(timeout=30)
        return [shared.pool_frames(index) for index in range(12)]

    expected = [source().pool_frames(index) for index in range(12)]
    with ThreadPoolExecutor(4) as threads:
        for _ in range(50):
            shared, meet = source(), threading.Barrier(4)
            drawn = [threads.submit(draw, shared, meet) for _ in range(4)]
            assert all(one.result(timeout=60) == expected for one in drawn)
