"""The Python face: the same arguments give the same frames, in one piece or as blocks finish."""

import itertools
from typing import Any

import numpy as np
import pytest

import vidgen
from vidgen.config import parse_job
from vidgen.engine import Engine
from vidgen.sparsity.settings import SparsitySettings

PROMPT = "a red circle moving left over a gray background"
SMALL: dict[str, Any] = {"num_inference_steps": 2, "queue": {"block_frames": 2, "context_frames": 1}}


@pytest.fixture(scope="module")
def engine() -> Engine:
    return vidgen.Engine.from_pretrained("builtin")


def test_frames_as_blocks_finish_are_the_frames_of_the_whole(engine: Engine) -> None:
    blocks = list(engine.stream(PROMPT, num_frames=21, **SMALL))
    assert [len(block) for block in blocks] == [8, 8, 5]
    assert np.array_equal(np.concatenate(blocks), engine(PROMPT, num_frames=21, **SMALL))


def test_the_same_seed_gives_the_same_frames_and_another_seed_others(engine: Engine) -> None:
    first, again, other = (engine(PROMPT, num_frames=9, seed=seed, **SMALL) for seed in (3, 3, 4))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize("num_frames", [1, 2, 4, 5, 8, 9, 17])
@pytest.mark.parametrize("timetable", ["full", "dualparal"])
def test_any_number_of_frames_comes_out_as_asked(engine: Engine, num_frames: int, timetable: str) -> None:
    queue = {**SMALL["queue"], "timetable": timetable}
    frames = engine(PROMPT, num_frames=num_frames, num_inference_steps=2, queue=queue)
    assert frames.shape == (num_frames, 32, 32, 3) and frames.dtype == np.uint8


def test_the_first_frames_come_before_the_last_are_begun(engine: Engine) -> None:
    stream = engine.stream(PROMPT, num_frames=100_000, **SMALL)
    assert sum(len(block) for block in itertools.islice(stream, 3)) == 24


def test_one_prompt_equals_the_same_prompt_in_segments(engine: Engine) -> None:
    segments = [{"prompt": PROMPT, "num_frames": 8}, {"prompt": PROMPT, "num_frames": 9}]
    assert np.array_equal(engine(PROMPT, num_frames=17, **SMALL), engine(segments=segments, **SMALL))


def test_a_change_of_prompt_leaves_the_blocks_before_it_alone_in_autoregressive_order(engine: Engine) -> None:
    # with stride = steps a block is clean before the next begins, so no later prompt can reach back
    settings = {**SMALL, "queue": {**SMALL["queue"], "stride": 2}}
    segments = [{"prompt": PROMPT, "num_frames": 8}, {"prompt": "a blue square", "num_frames": 8}]
    changed, whole = engine(segments=segments, **settings), engine(PROMPT, num_frames=16, **settings)
    assert np.array_equal(changed[:8], whole[:8])
    assert not np.array_equal(changed[8:], whole[8:])


def test_an_unknown_word_is_named_with_the_nearest_known(engine: Engine) -> None:
    with pytest.warns(UserWarning, match="'circel'.*circle"):
        engine("a red circel moving left", num_frames=1, num_inference_steps=1)


def test_larger_sizes_are_made_and_odd_ones_refused(engine: Engine) -> None:
    assert engine(PROMPT, num_frames=4, height=40, width=64, **SMALL).shape == (4, 40, 64, 3)
    with pytest.raises(ValueError, match="height=33: need a multiple of 8; try 32"):
        engine(PROMPT, height=33)


@pytest.mark.parametrize("mode", ["recompute", "cache"])
@pytest.mark.parametrize("noise", ["pool", "independent"])
def test_every_queue_setting_makes_a_video(engine: Engine, mode: str, noise: str) -> None:
    queue = {**SMALL["queue"], "context_mode": mode, "noise": noise, "anchor_frames": 1}
    assert engine(PROMPT, num_frames=33, num_inference_steps=3, queue=queue).std() > 1


def test_sparsity_is_for_jobs_that_say_nothing_and_is_enabled_once(engine: Engine) -> None:
    dense = engine(PROMPT, num_frames=17, num_inference_steps=4)
    engine.enable_sparsity(policy="adaspa", density=0.5, search_at=[0.3], dense_above=1.0)
    try:
        with pytest.raises(ValueError, match=r"enabled already \(adaspa\): call disable_sparsity"):
            engine.enable_sparsity(policy="radial")
        sparse = engine(PROMPT, num_frames=17, num_inference_steps=4)
        assert not np.array_equal(sparse, dense)
        own = {"sparsity": {"policy": "adaspa", "density": 1.0}}
        assert np.array_equal(engine(PROMPT, num_frames=17, num_inference_steps=4, attention=own), dense)
    finally:
        engine.disable_sparsity()
    assert np.array_equal(engine(PROMPT, num_frames=17, num_inference_steps=4), dense)
    with pytest.raises(ValueError, match="unknown key attention.sparsity.densty; did you mean density"):
        engine.enable_sparsity(policy="adaspa", densty=0.5)


def test_the_backend_of_a_job_is_its_own_else_the_environments(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def backend(**settings: object) -> str | None:
        return engine.plan(parse_job({"prompt": PROMPT, **settings})).task.attention_backend

    assert backend() is None
    monkeypatch.setenv("VIDGEN_ATTENTION_BACKEND", "cpu")
    assert backend() == "cpu" and backend(attention={"backend": "native"}) == "native"
    monkeypatch.setenv("VIDGEN_ATTENTION_BACKEND", "fast")
    with pytest.raises(ValueError, match="attention backend fast: there are native"):
        backend()


def test_another_backend_gives_the_same_video_within_rounding(engine: Engine) -> None:
    expected = engine(PROMPT, num_frames=17, num_inference_steps=4).astype(int)
    for name in ("cpu", "reference"):
        found = engine(PROMPT, num_frames=17, num_inference_steps=4, attention={"backend": name}).astype(int)
        assert np.abs(found - expected).max() <= 1


def test_blocks_are_of_a_size_that_leaves_a_choice(engine: Engine) -> None:
    plan = engine.plan(parse_job({"prompt": PROMPT, "attention": {"sparsity": {"policy": "adaspa"}}}))
    assert plan.job.attention.sparsity.blocks == (16, 16)
    for num_tokens, size in ((100, 16), (600, 32), (1500, 64), (2048, 128), (100_000, 128)):
        assert SparsitySettings(policy="adaspa").resolved(num_tokens).blocks == (size, size)
    assert SparsitySettings(key_block=48).resolved(9).blocks == (16, 48)
