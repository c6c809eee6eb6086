"""The Python face: the same arguments give the same frames, in one piece or as blocks finish."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch

import vidgen
from vidgen.config import parse_job
from vidgen.engine import Engine
from vidgen.sparsity.settings import SparsitySettings

PROMPT = "a red circle moving left over a gray background"
SMALL: dict[str, Any] = {"num_inference_steps": 2, "queue": {"block_frames": 2, "context_frames": 1}}


@pytest.fixture(scope="module")
def engine() -> Engine:
    return vidgen.Engine.from_pretrained("builtin")


def whole(engine: Engine, prompt: str | None = None, **settings: Any) -> np.ndarray:
    """All frames [F, H, W, 3], uint8, of a call."""
    frames = engine(prompt, **settings).frames
    assert frames.dtype == np.float32 and frames.shape[0] == 1
    return (frames[0] * 255).round().astype(np.uint8)


def test_frames_as_blocks_finish_are_the_frames_of_the_whole(engine: Engine) -> None:
    blocks = list(engine.stream(PROMPT, num_frames=21, **SMALL))
    assert [len(block) for block in blocks] == [8, 8, 5]
    assert np.array_equal(np.concatenate(blocks), whole(engine, PROMPT, num_frames=21, **SMALL))


def test_the_same_seed_gives_the_same_frames_and_another_seed_others(engine: Engine) -> None:
    first, again, other = (whole(engine, PROMPT, num_frames=9, seed=seed, **SMALL) for seed in (3, 3, 4))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize("num_frames", [1, 2, 4, 5, 8, 9, 17])
@pytest.mark.parametrize("timetable", ["full", "dualparal"])
def test_any_number_of_frames_comes_out_as_asked(engine: Engine, num_frames: int, timetable: str) -> None:
    queue = {**SMALL["queue"], "timetable": timetable}
    frames = whole(engine, PROMPT, num_frames=num_frames, num_inference_steps=2, queue=queue)
    assert frames.shape == (num_frames, 32, 32, 3) and frames.dtype == np.uint8


def test_the_first_frames_come_before_the_last_are_begun(engine: Engine) -> None:
    stream = engine.stream(PROMPT, num_frames=100_000, **SMALL)
    assert sum(len(block) for block in itertools.islice(stream, 3)) == 24


def test_one_prompt_equals_the_same_prompt_in_segments(engine: Engine) -> None:
    segments = [{"prompt": PROMPT, "num_frames": 8}, {"prompt": PROMPT, "num_frames": 9}]
    assert np.array_equal(
        whole(engine, PROMPT, num_frames=17, **SMALL), whole(engine, segments=segments, **SMALL)
    )


def test_a_change_of_prompt_leaves_the_blocks_before_it_alone_in_autoregressive_order(engine: Engine) -> None:
    # with stride = steps a block is clean before the next begins, so no later prompt can reach back
    settings = {**SMALL, "queue": {**SMALL["queue"], "stride": 2}}
    segments = [{"prompt": PROMPT, "num_frames": 8}, {"prompt": "a blue square", "num_frames": 8}]
    changed, plain = (
        whole(engine, segments=segments, **settings),
        whole(engine, PROMPT, num_frames=16, **settings),
    )
    assert np.array_equal(changed[:8], plain[:8])
    assert not np.array_equal(changed[8:], plain[8:])


def test_an_unknown_word_is_named_with_the_nearest_known(engine: Engine) -> None:
    with pytest.warns(UserWarning, match="'circel'.*circle"):
        whole(engine, "a red circel moving left", num_frames=1, num_inference_steps=1)


def test_larger_sizes_are_made_and_odd_ones_refused(engine: Engine) -> None:
    assert whole(engine, PROMPT, num_frames=4, height=40, width=64, **SMALL).shape == (4, 40, 64, 3)
    with pytest.raises(ValueError, match="height=33: need a multiple of 8; try 32"):
        whole(engine, PROMPT, height=33)


@pytest.mark.parametrize("mode", ["recompute", "cache"])
@pytest.mark.parametrize("noise", ["pool", "independent"])
def test_every_queue_setting_makes_a_video(engine: Engine, mode: str, noise: str) -> None:
    queue = {**SMALL["queue"], "context_mode": mode, "noise": noise, "anchor_frames": 1}
    assert whole(engine, PROMPT, num_frames=33, num_inference_steps=3, queue=queue).std() > 1


def test_sparsity_is_for_jobs_that_say_nothing_and_is_enabled_once(engine: Engine) -> None:
    dense = whole(engine, PROMPT, num_frames=17, num_inference_steps=4)
    engine.enable_sparsity(policy="adaspa", density=0.5, search_at=[0.3], dense_above=1.0)
    try:
        with pytest.raises(ValueError, match=r"enabled already \(adaspa\): call disable_sparsity"):
            engine.enable_sparsity(policy="radial")
        sparse = whole(engine, PROMPT, num_frames=17, num_inference_steps=4)
        assert not np.array_equal(sparse, dense)
        own = {"sparsity": {"policy": "adaspa", "density": 1.0}}
        assert np.array_equal(
            whole(engine, PROMPT, num_frames=17, num_inference_steps=4, attention=own), dense
        )
    finally:
        engine.disable_sparsity()
    assert np.array_equal(whole(engine, PROMPT, num_frames=17, num_inference_steps=4), dense)
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
    expected = whole(engine, PROMPT, num_frames=17, num_inference_steps=4).astype(int)
    for name in ("cpu", "reference"):
        found = whole(
            engine, PROMPT, num_frames=17, num_inference_steps=4, attention={"backend": name}
        ).astype(int)
        assert np.abs(found - expected).max() <= 1


def test_blocks_are_of_a_size_that_leaves_a_choice(engine: Engine) -> None:
    plan = engine.plan(parse_job({"prompt": PROMPT, "attention": {"sparsity": {"policy": "adaspa"}}}))
    assert plan.job.attention.sparsity.blocks == (16, 16)
    for num_tokens, size in ((100, 16), (600, 32), (1500, 64), (2048, 128), (100_000, 128)):
        assert SparsitySettings(policy="adaspa").resolved(num_tokens).blocks == (size, size)
    assert SparsitySettings(key_block=48).resolved(9).blocks == (16, 48)


def test_a_call_gives_every_type_of_output(engine: Engine) -> None:
    expected = whole(engine, PROMPT, num_frames=5, **SMALL)
    tensor = engine(PROMPT, num_frames=5, output_type="pt", **SMALL).frames
    assert tensor.shape == (1, 5, 3, 32, 32)
    assert np.array_equal((tensor[0].permute(0, 2, 3, 1) * 255).round().byte().numpy(), expected)
    pictures = engine(PROMPT, num_frames=5, output_type="pil", **SMALL).frames[0]
    assert np.array_equal(np.stack([np.asarray(picture) for picture in pictures]), expected)
    latents = engine(PROMPT, num_frames=5, output_type="latent", **SMALL).frames
    assert latents.shape == (1, 128, 2, 4, 4)
    with pytest.raises(ValueError, match="output_type='gif': choose np, pt, pil or latent"):
        engine(PROMPT, num_frames=5, output_type="gif", **SMALL)  # type: ignore[arg-type]


def test_noise_may_be_given_or_drawn_by_a_generator(engine: Engine) -> None:
    def call(**given: Any) -> torch.Tensor:
        return engine(PROMPT, num_frames=16, output_type="latent", **given, **SMALL).frames

    noise = torch.randn(1, 128, 4, 4, 4, generator=torch.Generator().manual_seed(3))
    assert torch.equal(call(latents=noise), call(generator=torch.Generator().manual_seed(3)))
    assert not torch.equal(call(latents=noise), call())
    with pytest.raises(ValueError, match=r"latents of \(1, 128, 3, 4, 4\): need \(1, 128, 4, 4, 4\)"):
        call(latents=noise[:, :, :3])


def test_embeddings_take_the_place_of_texts(engine: Engine) -> None:
    texts = engine.family.encode_texts([PROMPT, ""])
    given = {"prompt_embeds": texts[PROMPT], "negative_prompt_embeds": texts[""]}
    assert np.array_equal(
        whole(engine, num_frames=8, **given, **SMALL), whole(engine, PROMPT, num_frames=8, **SMALL)
    )


def test_a_callback_sees_every_step_of_every_block_and_may_change_it(engine: Engine) -> None:
    seen = []

    def watch(given: Engine, step: int, timestep: float, tensors: dict[str, Any]) -> None:
        assert given is engine and tensors["latents"].shape == (1, 128, 2, 4, 4)
        seen.append((step, timestep))

    plain = whole(engine, PROMPT, num_frames=16, **SMALL)
    assert np.array_equal(whole(engine, PROMPT, num_frames=16, callback_on_step_end=watch, **SMALL), plain)
    assert sorted(step for step, _ in seen) == [0, 0, 1, 1] and max(t for _, t in seen) == 1000

    def still(_: Any, step: int, __: float, tensors: dict[str, Any]) -> dict[str, Any]:
        return {"latents": tensors["latents"] * (step < 1)}

    gray = engine(PROMPT, num_frames=16, callback_on_step_end=still, output_type="latent", **SMALL).frames
    assert not gray.any()


def test_a_video_begins_with_the_picture_that_is_given(engine: Engine) -> None:
    picture = np.full((32, 32, 3), (200, 30, 30), np.uint8)
    frames = whole(engine, PROMPT, image=picture, num_frames=16, **SMALL).astype(int)
    assert np.abs(frames[:4] - picture).max() < 8
    free = whole(engine, PROMPT, num_frames=16, **SMALL).astype(int)
    assert not np.array_equal(frames[8:], free[8:])


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P"])
def test_a_picture_may_be_pils_of_any_mode_or_an_array(engine: Engine, mode: str) -> None:
    from PIL import Image

    picture = Image.new("RGB", (32, 32), (90, 90, 90)).convert(mode)
    plain = np.asarray(picture.convert("RGB"))
    settings = {"num_frames": 4, "output_type": "latent", **SMALL}
    found, expected = (engine(PROMPT, image=image, **settings).frames for image in (picture, plain))
    assert torch.equal(found, expected)


def test_a_last_picture_as_an_array_is_refused_in_one_line_by_who_takes_none(engine: Engine) -> None:
    with pytest.raises(ValueError, match="this model takes no last frame; leave it out"):
        engine(PROMPT, last_image=np.zeros((32, 32, 3), np.uint8), num_frames=4, **SMALL)
