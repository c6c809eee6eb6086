"""Laws of checkpoints: what is saved comes back, and what does not fit says so."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from vidgen.builtin import SmallModel, load_small
from vidgen.codec.dct import DctCodec, DctConfig
from vidgen.conditioning.text import WordEncoder, WordEncoderConfig
from vidgen.denoise.timetable import dualparal
from vidgen.model.dit import DiT
from vidgen.model.loading import SETTINGS_KEY, load_part, read_settings, save_parts
from vidgen.types import ContextMode, NoiseKind, Recommended


@pytest.fixture
def small(dit: Any) -> SmallModel:
    codec = DctCodec(DctConfig(num_channels=9))
    codec.fit(torch.randn(1, 3, 8, 16, 16, generator=torch.Generator().manual_seed(0)))
    return SmallModel(
        dit=dit(latent_channels=9, linear_skip=True, window=(None, 2, 2), text_width=8),
        codec=codec,
        text=WordEncoder(WordEncoderConfig(content_words=("red", "circle"), width=8)),
        recommended=Recommended(block_frames=3, context_mode=ContextMode.RECOMPUTE, noise=NoiseKind.POOL),
        training={"step": 12},
    )


def test_saved_in_fp32_and_loaded_is_equal_bit_for_bit(small: SmallModel, tmp_path: Path):
    path = tmp_path / "model.safetensors"
    small.save(path, torch.float32)
    loaded = load_small(path)
    for name, part in small.parts().items():
        expected, found = part.state_dict(), loaded.parts()[name].state_dict()
        assert list(found) == list(expected)
        for key, tensor in expected.items():
            assert found[key].dtype == tensor.dtype
            assert torch.equal(found[key], tensor), f"{name}.{key}"
        assert part.config == loaded.parts()[name].config
        assert not loaded.parts()[name].training
        assert not any(p.requires_grad for p in loaded.parts()[name].parameters())
    assert loaded.recommended == small.recommended
    assert loaded.training == {"step": 12}


def test_saved_in_fp16_only_matrices_are_rounded(small: SmallModel, tmp_path: Path):
    path = tmp_path / "model.safetensors"
    small.save(path)
    loaded = load_small(path)
    for name, part in small.parts().items():
        for key, tensor in part.state_dict().items():
            found = loaded.parts()[name].state_dict()[key]
            rounds = tensor.is_floating_point() and tensor.ndim > 1
            assert found.dtype == tensor.dtype
            assert torch.equal(found, tensor.half().float() if rounds else tensor)


def test_settings_come_back_as_they_were(tmp_path: Path):
    path, settings = tmp_path / "a.safetensors", {"family": "x", "sizes": [1, 2], "none": None}
    save_parts(path, {"one": torch.nn.Linear(2, 3)}, settings, torch.float32)
    assert read_settings(path) == settings


def test_no_file_another_file_and_a_foreign_checkpoint_are_errors_that_name_the_file(tmp_path: Path):
    text, foreign, family = (
        tmp_path / name for name in ("notes.txt", "foreign.safetensors", "family.safetensors")
    )
    text.write_text("hello")
    save_file({"a": torch.zeros(2)}, foreign)
    save_file({"a": torch.zeros(2)}, family, metadata={SETTINGS_KEY: '{"family": "wan"}'})
    for path in (tmp_path / "missing.safetensors", text, foreign, family):
        with pytest.raises(ValueError, match=path.name):
            load_small(path)


@pytest.mark.parametrize(
    "settings", [{"width": 36}, {"num_layers": 3}, {"num_layers": 1}, {"linear_skip": True}], ids=str
)
def test_tensors_that_do_not_fit_the_model_are_an_error_that_names_the_part(
    settings: Any, dit: Any, tmp_path: Path
):
    path = tmp_path / "dit.safetensors"
    save_parts(path, {"dit": dit()}, {}, torch.float32)
    with pytest.raises(ValueError, match="part 'dit' does not fit"):
        load_part(path, "dit", dit(**settings))
    with pytest.raises(ValueError, match="part 'codec' does not fit"):
        load_part(path, "codec", DctCodec(DctConfig(num_channels=4)))


def test_a_part_is_not_confused_with_one_whose_name_begins_alike(tmp_path: Path):
    parts = {"dit": torch.nn.Linear(2, 2), "dit2": torch.nn.Linear(3, 3)}
    path, loaded = tmp_path / "two.safetensors", torch.nn.Linear(2, 2)
    save_parts(path, dict(parts), {}, torch.float32)
    load_part(path, "dit", loaded)
    assert torch.equal(loaded.weight, parts["dit"].weight)


def test_a_part_is_loaded_in_the_modules_own_dtype(dit: Any, tmp_path: Path):
    path = tmp_path / "dit.safetensors"
    save_parts(path, {"dit": dit()}, {}, torch.float16)
    target: DiT = dit()
    target.to(torch.bfloat16)
    load_part(path, "dit", target)
    assert {p.dtype for p in target.parameters()} == {torch.bfloat16}


def test_recommended_settings_mean_the_same_after_loading(small: SmallModel, tmp_path: Path):
    path = tmp_path / "model.safetensors"
    small.save(path, torch.float32)
    recommended = load_small(path).recommended
    made = dualparal(6, 2, block_frames=2, context_frames=1, mode=recommended.context_mode)
    meant = dualparal(6, 2, block_frames=2, context_frames=1, mode=small.recommended.context_mode)
    assert list(made.ticks()) == list(meant.ticks())
    assert recommended.noise is small.recommended.noise


@pytest.mark.parametrize("change", ["unknown setting", "missing part"])
def test_settings_of_another_version_are_an_error_that_names_the_file(
    change: str, small: SmallModel, tmp_path: Path
):
    path = tmp_path / "model.safetensors"
    small.save(path, torch.float32)
    settings = read_settings(path)
    if change == "unknown setting":
        settings["dit"]["num_experts"] = 2
    else:
        del settings["codec"]
    save_parts(path, small.parts(), settings, torch.float32)
    with pytest.raises(ValueError, match=path.name):
        load_small(path)
