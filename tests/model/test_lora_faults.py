"""Laws of LoRA files that cannot be merged: one line that says why, and names what the model lacks."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from vidgen.bench.random_wan import Kind, make_transformer
from vidgen.families.wan_folder import read_json
from vidgen.model.dit import DiT
from vidgen.model.lora import Lora
from vidgen.model.wan import dit_config
from vidgen.model.weights import WanWeights

Tensors = dict[str, Tensor]
Spoilt = tuple[Tensors, dict[str, Any]]  # a file's tensors, its settings of peft


@pytest.fixture(scope="module")
def transformers(tmp_path_factory: pytest.TempPathFactory) -> dict[Kind, Path]:
    """Models of one expert: of text, and of text and image."""
    kinds: tuple[Kind, ...] = ("t2v", "i2v")
    found: dict[Kind, Path] = {kind: tmp_path_factory.mktemp(kind) / "transformer" for kind in kinds}
    for kind, path in found.items():
        make_transformer(kind).save_pretrained(path)
    return found


def lora_of(transformer: Path) -> Tensors:
    """A LoRA by diffusers' names for all Linears of a model's layers."""
    found: Tensors = {}
    for name, tensor in load_file(transformer / "diffusion_pytorch_model.safetensors").items():
        if name.startswith("blocks.") and tensor.ndim == 2:
            name = f"transformer.{name.removesuffix('.weight')}"
            found |= {f"{name}.lora_A.weight": torch.ones(3, tensor.shape[1])}
            found |= {f"{name}.lora_B.weight": torch.ones(tensor.shape[0], 3)}
    return found


def weights_with(transformer: Path, *loras: Path) -> WanWeights:
    config = dit_config(read_json(transformer / "config.json"))
    return WanWeights(transformer, "diffusers", config, tuple(Lora(path) for path in loras))


def whole(weights: WanWeights) -> Tensors:
    """A whole DiT's tensors."""
    with torch.device("meta"):
        dit = DiT(weights.config)
    return {name: torch.empty(tensor.shape) for name, tensor in dit.state_dict().items()}


def replaced(tensors: Tensors, old: str, new: str) -> Tensors:
    return {name.replace(old, new): tensor for name, tensor in tensors.items()}


def doubled(tensors: Tensors, dim_A: int, dim_B: int) -> Tensors:
    return {
        name: torch.cat([tensor, tensor], dim=dim_A if "lora_A" in name else dim_B)
        for name, tensor in tensors.items()
    }


def test_targets_that_the_model_lacks_are_one_line_that_names_them(transformers: Any, tmp_path: Path):
    file = tmp_path / "deep.safetensors"
    save_file(replaced(lora_of(transformers["t2v"]), "blocks.2.", "blocks.39."), file)
    weights = weights_with(transformers["t2v"], file)
    shapes = {name: tuple(tensor.shape) for name, tensor in whole(weights).items()}
    layer = {name: tensor for name, tensor in whole(weights).items() if name.startswith("layers.0.")}
    for attempt in (lambda: weights.check(shapes), lambda: weights.read(layer)):
        with pytest.raises(ValueError) as caught:
            attempt()
        message = str(caught.value)
        assert "\n" not in message
        assert "lacks 10 of its 30 targets: blocks.39.attn1.to_" in message
        assert "and 6 more" in message
        assert str(file) in message


def spoilt(how: str, tensors: Tensors, image_tensors: Tensors) -> Spoilt:
    query, value = "transformer.blocks.0.attn1.to_q", torch.ones(3, 3)
    without_down = {name: t for name, t in tensors.items() if name != f"{query}.lora_A.weight"}
    cases: dict[str, Spoilt] = {
        "for images": (image_tensors, {}),
        "for text encoders": (replaced(tensors, "transformer.blocks", "text_encoder.layers"), {}),
        "for a second expert": (replaced(tensors, "transformer.", "transformer_2."), {}),
        "half of a pair": (without_down, {}),
        "DoRA": (tensors | {f"{query}.dora_scale": value}, {}),
        "DoRA in the header": (tensors, {"transformer.use_dora": True}),
        "LoKr": ({f"{query}.lokr_w1": value}, {}),
        "other widths": (doubled(tensors, 1, 0), {}),
        "ranks that differ": (doubled(tensors, 0, 0), {}),
        "no bias to change": ({"transformer.blocks.0.attn1.norm_q.diff_b": torch.ones(24)}, {}),
    }
    return cases[how]


SAID = {
    "for images": "add_k_proj",
    "for text encoders": "lacks 30 of its 30 targets",
    "for a second expert": "for a second expert, which the model lacks",
    "half of a pair": "blocks.0.attn1.to_q lack one of their parts",
    "DoRA": "dora_scale",
    "DoRA in the header": "DoRA",
    "LoKr": "lokr_w1",
    "other widths": "made for other sizes than 30 tensors",
    "ranks that differ": "made for other sizes than 30 tensors",
    "no bias to change": "blocks.0.attn1.norm_q lack one of their parts",
}


@pytest.mark.parametrize("how", SAID)
def test_a_file_that_cannot_be_merged_is_one_line_that_names_it(how: str, transformers: Any, tmp_path: Path):
    tensors, settings = spoilt(how, lora_of(transformers["t2v"]), lora_of(transformers["i2v"]))
    file = tmp_path / "lora.safetensors"
    save_file(tensors, file, {"lora_adapter_metadata": json.dumps(settings)})
    weights = weights_with(transformers["t2v"], file)
    with pytest.raises(ValueError) as caught:
        weights.read(whole(weights))
    assert SAID[how] in str(caught.value)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_none_or_is_not_there_is_one_line(transformers: Any, tmp_path: Path):
    (tmp_path / "text.safetensors").write_text("hello")
    for path in (tmp_path / "missing.safetensors", tmp_path / "text.safetensors", tmp_path / "missing.pt"):
        weights = weights_with(transformers["t2v"], path)
        with pytest.raises(ValueError, match=rf"^[^\n]*{path.name}: no[^\n]*$"):
            weights.read(whole(weights))
