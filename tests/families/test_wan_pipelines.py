"""With all frames at once the engine gives what diffusers pipelines give: latents and frames of all."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from vidgen.bench.random_wan import Kind

pytestmark = pytest.mark.filterwarnings("ignore:.*requires torchvision:UserWarning")


@dataclass(frozen=True, kw_only=True)
class Case:
    kind: Kind
    has_image: bool = False
    has_last: bool = False
    num_frames: int = 9
    height: int = 32
    width: int = 48
    steps: int = 3
    guidance: float = 4.0
    second: float | None = None


CASES = {
    "t2v": Case(kind="t2v"),
    "t2v-one-frame": Case(kind="t2v", num_frames=1, height=16, width=16),
    "t2v-no-guidance": Case(kind="t2v", guidance=1.0, height=48, width=80),
    "t2v-five-steps": Case(kind="t2v", steps=5, num_frames=5),
    "i2v": Case(kind="i2v", has_image=True),
    "i2v-long": Case(kind="i2v", has_image=True, num_frames=25, height=16, width=32),
    "flf2v": Case(kind="flf2v", has_image=True, has_last=True),
    "ti2v-text": Case(kind="ti2v", height=64, width=96),
    "ti2v-image": Case(kind="ti2v", has_image=True, height=64, width=32),
    "a14b-t2v": Case(kind="a14b-t2v", steps=6, second=2.0),
    "a14b-t2v-one-scale": Case(kind="a14b-t2v", steps=6),
    "a14b-i2v-last": Case(kind="a14b-i2v", has_image=True, has_last=True, steps=4, second=4.0),
    "a14b-i2v": Case(kind="a14b-i2v", has_image=True, steps=6, second=1.0),
}


def arguments(case: Case, picture: Any, engine: Any) -> dict[str, Any]:
    stride = engine.family.sizes.spatial_stride
    shape = (1, engine.config.latent_channels, (case.num_frames - 1) // 4 + 1)
    noise = torch.randn(
        *shape, case.height // stride, case.width // stride, generator=torch.Generator().manual_seed(1)
    )
    given: dict[str, Any] = {
        "prompt": "a red  cat runs &amp; sits", "negative_prompt": "blue dog", "height": case.height,
        "width": case.width, "num_frames": case.num_frames, "num_inference_steps": case.steps,
        "guidance_scale": case.guidance, "latents": noise,
    }  # fmt: skip
    if case.second is not None:
        given["guidance_scale_2"] = case.second
    if case.has_image:
        given["image"] = picture(case.height, case.width)
    if case.has_last:
        given["last_image"] = picture(case.height, case.width).transpose(0)
    return given


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_latents_and_frames_are_those_of_diffusers(case: Case, engine: Any, pipeline: Any, picture: Any):
    ours = engine(case.kind)
    given = arguments(case, picture, ours)
    if case.second is None and case.kind.startswith("a14b"):
        given_ours = {**given, "guidance_scale_2": case.guidance}
    else:
        given_ours = given
    for output_type in ("latent", "np"):
        expected = torch.as_tensor(
            pipeline(case.kind, case.has_image)(output_type=output_type, **given).frames
        )
        found = torch.as_tensor(ours(output_type=output_type, **given_ours).frames)
        assert found.shape == expected.shape
        assert difference(found, expected) <= 1e-4, output_type
    # the law would hold for a model that does nothing
    other = ours(output_type="np", **{**given_ours, "prompt": "green circle"}).frames
    assert difference(torch.as_tensor(other), expected) > 1e-3


def difference(found: Tensor, expected: Tensor) -> float:
    """Largest error, of the expected scale."""
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("solver", ["euler", "dpm++"])
def test_other_solvers_are_diffusers_schedulers(solver: str, engine: Any, pipeline: Any, picture: Any):
    from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

    pipe, case = pipeline("t2v", False), Case(kind="t2v", steps=4)
    before = pipe.scheduler
    pipe.scheduler = (
        FlowMatchEulerDiscreteScheduler(shift=5.0)
        if solver == "euler"
        else DPMSolverMultistepScheduler.from_config(before.config)
    )
    try:
        given = arguments(case, picture, engine("t2v"))
        expected = pipe(output_type="latent", **given).frames
        found = engine("t2v")(output_type="latent", solver=solver, shift=5.0, **given).frames
    finally:
        pipe.scheduler = before
    assert difference(found, expected) <= 1e-4


def test_a_generator_draws_diffusers_noise(engine: Any, pipeline: Any, picture: Any):
    given = arguments(CASES["t2v"], picture, engine("t2v"))
    del given["latents"]
    expected = pipeline("t2v", False)(
        output_type="latent", generator=torch.Generator().manual_seed(5), **given
    )
    found = engine("t2v")(output_type="latent", generator=torch.Generator().manual_seed(5), **given)
    assert difference(found.frames, expected.frames) <= 1e-4


def test_embeddings_may_be_given(engine: Any, pipeline: Any, picture: Any):
    given = arguments(CASES["t2v"], picture, engine("t2v"))
    text, negative = pipeline("t2v", False).encode_prompt(given["prompt"], given["negative_prompt"])
    texts = {"prompt_embeds": text, "negative_prompt_embeds": negative}
    rest = {name: value for name, value in given.items() if "prompt" not in name}
    expected = pipeline("t2v", False)(output_type="latent", **texts, **rest).frames
    found = engine("t2v")(output_type="latent", **texts, **rest).frames
    assert difference(found, expected) <= 1e-4


@pytest.mark.parametrize(
    ("kind", "given", "message"),
    [
        ("i2v", {}, r"\(i2v\) begins with a picture; give --image or --video"),
        ("flf2v", {"image": True}, r"\(flf2v\) also needs the last picture; give --last-image"),
        ("t2v", {"image": True}, r"\(t2v\) takes no image; use an i2v or ti2v checkpoint"),
        ("ti2v", {"image": True, "last_image": True}, r"\(ti2v\) takes no last picture; leave it out"),
        ("t2v", {"guidance_scale_2": 3.0}, "guidance_scale_2=3.0: this model has one expert; leave it out"),
        ("t2v", {"height": 40}, "height=40: need a multiple of 16; try"),
    ],
)
def test_what_a_model_does_not_take_is_one_line(
    kind: Kind, given: dict[str, Any], message: str, engine: Any, picture: Any
):
    sizes = {"height": 64, "width": 64, "num_frames": 5}
    pictures = {name: picture(64, 64) for name in ("image", "last_image") if name in given}
    with pytest.raises(ValueError, match=message) as caught:
        engine(kind)("a cat", **{**sizes, **given, **pictures})
    assert "\n" not in str(caught.value)
