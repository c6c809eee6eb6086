"""Laws of Wan's files that do not fit or are damaged: one line that says what is wrong, and where."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from vidgen.bench.random_wan import make_transformer
from vidgen.families.wan_folder import read_json
from vidgen.model.dit import DiT, DiTConfig
from vidgen.model.wan import dit_config
from vidgen.model.weights import WanWeights

STEM = "diffusion_pytorch_model"


@pytest.fixture
def single(tmp_path: Path) -> Path:
    """A transformer's folder, to be spoiled."""
    torch.manual_seed(1)
    make_transformer("t2v").save_pretrained(tmp_path / "transformer")
    return tmp_path / "transformer"


def config_of(folder: Path) -> DiTConfig:
    return dit_config(read_json(folder / "config.json"))


def empty(config: DiTConfig) -> dict[str, Tensor]:
    """A whole DiT's tensors."""
    with torch.device("meta"):
        dit = DiT(config)
    return {name: torch.zeros(t.shape, dtype=t.dtype) for name, t in dit.state_dict().items()}


def test_what_is_missing_misshaped_and_unexpected_is_one_line_with_counts(single: Path):
    path = single / f"{STEM}.safetensors"
    tensors = load_file(path)
    for layer in range(3):
        for part in ("weight", "bias"):
            del tensors[f"blocks.{layer}.attn1.to_q.{part}"]
    tensors["proj_out.weight"] = torch.zeros(64, 23)
    tensors |= {
        "blocks.3.ffn.net.2.bias": torch.zeros(2),
        "blocks.0.attn2.norm_added_q.weight": torch.zeros(24),
    }
    save_file(tensors, path)
    weights = WanWeights(single, "diffusers", config_of(single))
    shapes = {name: tuple(tensor.shape) for name, tensor in empty(weights.config).items()}
    with pytest.raises(ValueError) as caught:
        weights.check(shapes)
    message = str(caught.value)
    assert "\n" not in message
    assert str(single) in message
    assert "6 missing (blocks.0.attn1.to_q.weight, blocks.0.attn1.to_q.bias, " in message
    assert "1 of another shape (proj_out.weight is (64, 23), need (64, 24))" in message
    assert "1 unexpected (blocks.3.ffn.net.2.bias)" in message
    with pytest.raises(ValueError, match=r"^[^\n]*6 missing[^\n]*1 of another shape[^\n]*$"):
        weights.read(empty(weights.config))
    layer = {name: t for name, t in empty(weights.config).items() if name.startswith("layers.0.feed")}
    assert weights.read(layer) > 0  # what is whole can be read


def test_a_file_of_the_other_format_says_by_which_names_it_was_looked_for(single: Path):
    weights = WanWeights(single, "native", config_of(single))
    with pytest.raises(ValueError, match=r"^[^\n]*by native names[^\n]*missing[^\n]*$"):
        weights.read(empty(weights.config))


def test_a_name_that_no_dit_has_is_missing(single: Path):
    weights = WanWeights(single, "diffusers", config_of(single))
    with pytest.raises(ValueError, match=r"^[^\n]*1 missing \(layers.9.modulation\)[^\n]*$"):
        weights.read({"layers.9.modulation": torch.zeros(6, 24)})


def spoil(folder: Path, how: str) -> None:
    path = folder / f"{STEM}.safetensors"
    content = path.read_bytes()
    if how == "no file":
        path.unlink()
    elif how == "cut short":
        path.write_bytes(content[:-100])
    elif how == "text":
        path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0123456789abcdef\n")
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "unknown dtype":
        path.write_bytes(content.replace(b'"F32"', b'"F31"'))
    elif how == "wrong size":
        path.write_bytes(content.replace(b'"shape":[24]', b'"shape":[25]'))
    elif how == "shard missing":
        path.rename(folder / "other.safetensors")
        index = {"weight_map": {"a": f"{STEM}-00001-of-00002.safetensors", "b": "other.safetensors"}}
        (folder / f"{STEM}.safetensors.index.json").write_text(json.dumps(index))
    elif how == "damaged index":
        (folder / f"{STEM}.safetensors.index.json").write_text("{")
    else:
        path.unlink()
        loaded: Any = {"a": torch.nn.Linear(1, 1)} if how == "pickled code" else [1, 2]
        torch.save(loaded, folder / f"{STEM}.pth")


SPOILT = {
    "no file": "no diffusion_pytorch_model.safetensors",
    "cut short": "ends at byte",
    "text": "not a safetensors file",
    "empty": "not a safetensors file",
    "unknown dtype": "F31",
    "wrong size": "bytes for a shape",
    "shard missing": "lacks 1 of 2 files",
    "damaged index": "no index of shards",
    "pickled code": "cannot be loaded as tensors only",
    "pickled list": "need a mapping",
}


@pytest.mark.parametrize("how", SPOILT)
def test_a_damaged_file_is_one_line_that_names_it(how: str, single: Path):
    spoil(single, how)
    weights = WanWeights(single, "diffusers", config_of(single))
    for attempt in (lambda: weights.check({}), lambda: weights.read(empty(weights.config))):
        with pytest.raises(ValueError) as caught:
            attempt()
        assert SPOILT[how] in str(caught.value)
        assert str(single) in str(caught.value)
        assert "\n" not in str(caught.value)
