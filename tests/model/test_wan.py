"""Laws of Wan's transformers: our DiT, fed from their files, is diffusers' model."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from vidgen.bench.random_wan import randomise
from vidgen.model.dit import DiT, DiTConfig
from vidgen.model.wan import dit_config
from vidgen.model.weights import WanWeights

# B 2 videos, TEXT tokens as many as Wan's, since diffusers tells text from image by it
TEXT = 512
TINY: dict[str, Any] = {
    "num_attention_heads": 2, "attention_head_dim": 12, "text_dim": 32, "freq_dim": 32, "ffn_dim": 48,
    "num_layers": 2, "in_channels": 16, "out_channels": 16,
}  # fmt: skip
CLIP = {"in_channels": 36, "image_dim": 20, "added_kv_proj_dim": 24}
KINDS: dict[str, dict[str, Any]] = {
    "t2v": {},
    "i2v-clip": CLIP,
    "flf2v": CLIP | {"pos_embed_seq_len": 10},
    "i2v-36-channels": {"in_channels": 36},
    "ti2v": {"in_channels": 48, "out_channels": 48},
}
kinds = pytest.mark.parametrize("kind", KINDS)


def make(kind: str = "t2v", **settings: Any) -> Any:
    """A random WanTransformer3DModel, every parameter off its initial value."""
    from diffusers.models.transformers.transformer_wan import WanTransformer3DModel

    torch.manual_seed(3)
    model = WanTransformer3DModel(**TINY | KINDS[kind] | settings)
    return randomise(model, spread=0.3).eval().requires_grad_(False)


def ours_of(theirs: Any, folder: Path, dtype: str = "fp32") -> DiT:
    """Our DiT with the weights that diffusers saves of its model."""
    theirs.save_pretrained(folder)
    config = dit_config(dict(theirs.config), dtype=dtype)
    with torch.device("meta"):
        dit = DiT(config)
    dit = dit.to_empty(device="cpu").eval().requires_grad_(False)
    WanWeights(folder, "diffusers", config).read(dit.state_dict())
    return dit


def inputs(config: DiTConfig, size: tuple[int, int, int], per_frame: bool = True) -> dict[str, Tensor]:
    """Two videos: latents with what is given beside them, noise levels per frame, text, image features."""
    torch.manual_seed(5)
    frames = size[0]
    channels = config.latent_channels + config.condition_channels
    levels = torch.rand(2, frames if per_frame else 1).expand(2, frames)
    found = {
        "latents_BCFYX": torch.randn(2, channels, *size),
        "noise_level_BF": levels,
        "text_BNT": torch.randn(2, TEXT, config.text_width),
    }
    if config.image_width:
        found["image_BMI"] = torch.randn(2, config.image_tokens, config.image_width)
    return found


@torch.no_grad()
def run_theirs(model: Any, given: dict[str, Tensor], dtype: torch.dtype, per_frame: bool) -> Tensor:
    """Diffusers' velocity, noise levels given per token or per video, as its pipelines give them."""
    latents, levels = given["latents_BCFYX"], given["noise_level_BF"] * 1000
    tokens = latents.shape[3] * latents.shape[4] // 4
    image = given.get("image_BMI")
    if image is not None:
        image = image.to(dtype)
        if model.config.pos_embed_seq_len:  # first and last image are two entries of its batch
            image = image.unflatten(1, (2, -1)).flatten(0, 1)
    return model(
        hidden_states=latents.to(dtype),
        timestep=levels.repeat_interleave(tokens, dim=1) if per_frame else levels[:, 0],
        encoder_hidden_states=given["text_BNT"].to(dtype),
        encoder_hidden_states_image=image,
        return_dict=False,
    )[0].float()


def error(found: Tensor, expected: Tensor) -> float:
    """Largest difference over the expected values' scale."""
    return ((found - expected).abs().max() / expected.abs().max()).item()


SIZES = [(1, 2, 2), (3, 6, 10), (5, 10, 4)]


@pytest.mark.parametrize("size", SIZES, ids=str)
@kinds
def test_velocity_is_that_of_diffusers(kind: str, size: Any, tmp_path: Path):
    theirs = make(kind)
    dit = ours_of(theirs, tmp_path)
    given = inputs(dit.config, size, per_frame=kind == "ti2v")
    expected = run_theirs(theirs, given, torch.float32, per_frame=kind == "ti2v")
    found = dit(**given)
    assert found.shape == (2, dit.config.latent_channels, *size)
    assert found.dtype == torch.float32
    assert error(found, expected) <= 1e-5
    assert expected.std() > 0.05


@pytest.mark.parametrize("head_dim", [12, 20, 128])
def test_velocity_is_that_of_diffusers_for_any_width_of_heads(head_dim: int, tmp_path: Path):
    settings = {"attention_head_dim": head_dim, "added_kv_proj_dim": 2 * head_dim}
    theirs = make("i2v-clip", **settings)
    dit = ours_of(theirs, tmp_path)
    given = inputs(dit.config, (3, 6, 10), per_frame=False)
    expected = run_theirs(theirs, given, torch.float32, per_frame=False)
    assert error(dit(**given), expected) <= 1e-5


@kinds
def test_every_input_matters(kind: str, tmp_path: Path):
    dit = ours_of(make(kind), tmp_path)
    given = inputs(dit.config, (3, 4, 6))
    velocity = dit(**given)
    for name, tensor in given.items():
        changed = dit(**given | {name: tensor.roll(1, dims=-1) * 0.9})
        assert error(changed, velocity) > 1e-4, name
    channels = given["latents_BCFYX"].clone()
    channels[:, -1] += 1  # the last that is given beside the latents, where there are such
    assert error(dit(**given | {"latents_BCFYX": channels}), velocity) > 1e-4


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@kinds
def test_rounding_error_is_at_most_twice_that_of_diffusers(kind: str, dtype: str, tmp_path: Path):
    from diffusers.models.transformers.transformer_wan import WanTransformer3DModel

    theirs = make(kind)
    dit = ours_of(theirs, tmp_path, dtype)
    given = inputs(dit.config, (3, 6, 10), per_frame=kind == "ti2v")
    exact = run_theirs(theirs, given, torch.float32, per_frame=kind == "ti2v")
    rounded = WanTransformer3DModel.from_pretrained(tmp_path, dtype=dit.dtype)
    expected = run_theirs(rounded, given, dit.dtype, per_frame=kind == "ti2v")
    found = dit(**given)
    assert found.dtype == torch.float32
    assert error(found, exact) <= 2 * error(expected, exact) + 1e-6
    assert 0 < error(found, exact) < 0.1


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp8"])
def test_norms_tables_and_noise_levels_stay_in_fp32(dtype: str, tmp_path: Path):
    dit = ours_of(make("flf2v"), tmp_path, dtype)
    for name, tensor in dit.state_dict().items():
        is_wide = any(
            part in name for part in ("norm.", "norm_in", "norm_out", "noise_level", "modulation", ".scale")
        ) and not name.startswith("noise_modulation")
        if is_wide:
            assert tensor.dtype == torch.float32, name
        elif dtype == "fp8" and name.startswith("layers.") and name.endswith("weight"):
            assert tensor.dtype == torch.float8_e4m3fn, name
        else:
            assert tensor.dtype == dit.dtype, name
    tokens = dit.embed(torch.randn(1, 36, 2, 4, 4))
    assert tokens.dtype == dit.dtype
    assert {t.dtype for t in dit.condition_noise(torch.rand(1, 2))} == {dit.dtype}


def test_fp8_is_off_by_no_more_than_its_digits_and_a_third_of_the_bytes(tmp_path: Path):
    """Three bits of mantissa: a weight is off by at most 1/16, so a layer's output by a few percent."""
    theirs = make("t2v", num_attention_heads=4, attention_head_dim=32, ffn_dim=512, num_layers=4)
    exact = ours_of(theirs, tmp_path)
    dit = ours_of(theirs, tmp_path, "fp8")
    given = inputs(exact.config, (3, 6, 10))
    assert 1e-3 < (dit(**given) - exact(**given)).norm() / exact(**given).norm() < 0.06
    stored = {
        name: sum(t.nbytes for t in m.layers.state_dict().values()) for name, m in (("8", dit), ("32", exact))
    }
    assert stored["8"] < stored["32"] / 3


@pytest.mark.slow  # a C++ compiler runs
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")  # torch's own use
def test_compiled_layers_give_the_same_up_to_rounding(tmp_path: Path):
    dit = ours_of(make("i2v-clip", num_layers=1), tmp_path)
    given = inputs(dit.config, (3, 4, 6))
    expected = dit(**given)
    names = list(dit.state_dict())
    dit.compile_layers()
    with torch.inference_mode():
        assert error(dit(**given), expected) <= 1e-5
    assert list(dit.state_dict()) == names


def test_image_features_that_are_missing_or_unwanted_or_of_another_shape_are_one_line(tmp_path: Path):
    with torch.device("meta"):
        image, plain = (DiT(dit_config(TINY | {"eps": 1e-6} | KINDS[kind])) for kind in ("i2v-clip", "t2v"))
    text = torch.empty(1, TEXT, 32, device="meta")
    features = torch.empty(1, 257, 20, device="meta")
    for dit, given in (
        (image, None),
        (plain, features),
        (image, features[:, :9]),
        (image, features[..., :9]),
    ):
        with pytest.raises(ValueError, match=r"^image features of shape [^\n]*needs[^\n]*$"):
            dit.embed_text(text, given)
    for channels in (16, 37):
        with pytest.raises(ValueError, match=rf"^latents of {channels} channels: [^\n]*36[^\n]*$"):
            image.embed(torch.empty(1, channels, 1, 4, 4, device="meta"))


NATIVE: dict[str, Any] = {
    "_class_name": "WanModel", "_diffusers_version": "0.30.0", "dim": 5120, "eps": 1e-06, "ffn_dim": 13824,
    "freq_dim": 256, "in_dim": 16, "model_type": "t2v", "num_heads": 40, "num_layers": 40, "out_dim": 16,
    "text_len": 512,
}  # fmt: skip
DIFFUSERS: dict[str, Any] = {
    "_class_name": "WanTransformer3DModel", "_diffusers_version": "0.33.0.dev0", "added_kv_proj_dim": None,
    "attention_head_dim": 128, "cross_attn_norm": True, "eps": 1e-06, "ffn_dim": 13824, "freq_dim": 256,
    "image_dim": None, "in_channels": 16, "num_attention_heads": 40, "num_layers": 40, "out_channels": 16,
    "patch_size": [1, 2, 2], "pos_embed_seq_len": None, "qk_norm": "rms_norm_across_heads",
    "rope_max_seq_len": 1024, "text_dim": 4096,
}  # fmt: skip
SMALL = {"dim": 1536, "ffn_dim": 8960, "num_heads": 12, "num_layers": 30}
SMALL_DIFFUSERS = {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}
FIVE_B = {"dim": 3072, "ffn_dim": 14336, "num_heads": 24, "num_layers": 30, "in_dim": 48, "out_dim": 48}
FIVE_B_DIFFUSERS = {
    "num_attention_heads": 24, "ffn_dim": 14336, "num_layers": 30, "in_channels": 48, "out_channels": 48,
}  # fmt: skip
CLIP_14B = {"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120}
IMAGE_14B = {"condition_channels": 20, "image_width": 1280, "image_tokens": 257}
PUBLISHED = {
    "2.1-t2v-1.3b": (SMALL, SMALL_DIFFUSERS, {"width": 1536, "num_layers": 30}),
    "2.1-t2v-14b": ({}, {}, {"width": 5120, "ffn_width": 13824, "num_heads": 40}),
    "2.1-i2v-14b": ({"model_type": "i2v", "in_dim": 36}, CLIP_14B, IMAGE_14B),
    "2.1-flf2v-14b": (
        {"model_type": "flf2v", "in_dim": 36},
        CLIP_14B | {"pos_embed_seq_len": 514},
        IMAGE_14B | {"image_tokens": 514, "image_positions": True},
    ),
    "2.2-t2v-a14b": ({}, {}, {"condition_channels": 0, "image_width": None}),
    "2.2-i2v-a14b": (
        {"model_type": "i2v", "in_dim": 36, "has_clip": False},
        {"in_channels": 36},
        {"condition_channels": 20, "image_width": None},
    ),
    "2.2-ti2v-5b": (
        FIVE_B | {"model_type": "ti2v"},
        FIVE_B_DIFFUSERS,
        {"latent_channels": 48, "width": 3072},
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_both_configs_of_a_published_model_mean_the_same_dit(name: str):
    native, diffusers, expected = PUBLISHED[name]
    has_clip = native.get("has_clip")
    native = {key: value for key, value in native.items() if key != "has_clip"}
    found = dit_config(NATIVE | native, has_clip=has_clip, dtype="bf16")
    assert found == dit_config(DIFFUSERS | diffusers, dtype="bf16")
    assert found == replace(found, **expected, dtype="bf16", patch=(2, 2), text_width=4096)


BAD_CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "empty": ({}, "need that of a WanTransformer3DModel"),
    "another class": (DIFFUSERS | {"_class_name": "WanVACETransformer3DModel"}, "WanVACETransformer3DModel"),
    "another model": ({"_class_name": "FluxTransformer2DModel"}, "FluxTransformer2DModel"),
    "no norm": (DIFFUSERS | {"cross_attn_norm": False}, "cross_attn_norm=False"),
    "deep patches": (DIFFUSERS | {"patch_size": [2, 2, 2]}, "patch_size"),
    "norm per head": (DIFFUSERS | {"qk_norm": "rms_norm"}, "qk_norm=rms_norm"),
    "image without keys": (DIFFUSERS | {"image_dim": 1280}, "added_kv_proj_dim=None"),
    "keys without image": (DIFFUSERS | {"added_kv_proj_dim": 5120}, "image_dim=None"),
    "no width": ({key: value for key, value in NATIVE.items() if key != "ffn_dim"}, "without ffn_dim"),
    "speech": (NATIVE | {"model_type": "s2v"}, "model_type='s2v'"),
    "more out than in": (NATIVE | {"out_dim": 48}, "16 channels in and 48 out"),
    "odd heads": (NATIVE | {"num_heads": 7}, "width=5120"),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_a_config_that_is_not_wans_is_one_line(case: str):
    config, said = BAD_CONFIGS[case]
    with pytest.raises(ValueError) as caught:
        dit_config(config)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unknown_dtype_is_one_line():
    with pytest.raises(ValueError, match=r"^dtype=int4: need one of fp32, bf16, fp16, fp8$"):
        dit_config(NATIVE, dtype="int4")
