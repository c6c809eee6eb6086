"""Tiny random Wan checkpoints, one folder per kind and session, and the pipelines of diffusers on them."""

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from vidgen.bench.random_wan import WITH_CLIP, Kind, make_wan
from vidgen.conditioning import umt5
from vidgen.engine import Engine
from vidgen.model.wan import dit_config
from vidgen.model.wan_names import names


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Kind], Path]:
    made: dict[Kind, Path] = {}

    def folder(kind: Kind) -> Path:
        if kind not in made:
            made[kind] = make_wan(tmp_path_factory.mktemp(kind), kind)
        return made[kind]

    return folder


@pytest.fixture(scope="session")
def engine(folder: Callable[[Kind], Path]) -> Callable[[Kind], Engine]:
    made: dict[Kind, Engine] = {}

    def engine(kind: Kind) -> Engine:
        if kind not in made:
            made[kind] = Engine.from_pretrained(folder(kind), dtype="fp32")
        return made[kind]

    return engine


@pytest.fixture(scope="session")
def pipeline(folder: Callable[[Kind], Path]) -> Callable[..., Any]:
    """A pipeline of diffusers by kind and whether it begins with an image."""
    from diffusers.pipelines.wan.pipeline_wan import WanPipeline
    from diffusers.pipelines.wan.pipeline_wan_i2v import WanImageToVideoPipeline

    made: dict[tuple[Kind, bool], Any] = {}

    def pipeline(kind: Kind, has_image: bool) -> Any:
        key = kind, has_image
        if key not in made:
            absent = {"image_encoder": None, "image_processor": None} if kind not in WITH_CLIP else {}
            if has_image:
                made[key] = WanImageToVideoPipeline.from_pretrained(folder(kind), **absent)
            else:
                made[key] = WanPipeline.from_pretrained(folder(kind))
            made[key].set_progress_bar_config(disable=True)
        return made[key]

    return pipeline


@pytest.fixture(scope="session")
def picture() -> Callable[[int, int], Any]:
    """A picture of that height and width, as PIL has it."""
    from PIL import Image

    def picture(height: int, width: int) -> Any:
        rng = np.random.default_rng(0)
        coarse = rng.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
        return Image.fromarray(coarse.repeat(8, axis=0).repeat(8, axis=1))

    return picture


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def native(
    folder: Callable[[Kind], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Kind], Path]:
    """The same weights in the layout and by the names of Wan's own repository."""
    return lambda kind: to_native(folder(kind), tmp_path_factory.mktemp(f"native-{kind}"), kind)


NATIVE_KINDS = {"t2v": "t2v", "a14b-t2v": "t2v", "a14b-i2v": "i2v"}


def _codec_tests() -> ModuleType:
    """tests/codec/test_wan_files.py, which has the codec's original names; not on the path by itself."""
    path = Path(__file__).parent.parent / "codec" / "test_wan_files.py"
    spec = importlib.util.spec_from_file_location("codec_names", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def to_native(source: Path, target: Path, kind: Kind) -> Path:
    """The inverse of what is read; CLIP's is left to its own tests."""
    experts = [part for part in ("transformer", "transformer_2") if (source / part).is_dir()]
    places = ["high_noise_model", "low_noise_model"] if len(experts) == 2 else [""]
    for part, place in zip(experts, places, strict=True):
        write_transformer(source / part, target / place, NATIVE_KINDS[kind])
    vae = load_file(source / "vae" / "diffusion_pytorch_model.safetensors")
    original = {original: vae[ours] for original, ours in _codec_tests().names_of_2_1().items()}
    torch.save(original, target / "Wan2.1_VAE.pth")
    text = load_file(source / "text_encoder" / "model.safetensors")
    layers = 1 + max(int(name.split(".")[2]) for name in text if name.startswith("encoder.block"))
    found = {
        row.native.format(layer): text[row.theirs[0].format(layer)]
        for row in umt5.NATIVE_NAMES
        for layer in range(layers if "{}" in row.native else 1)
    }
    torch.save(found, target / umt5.NATIVE_FILES[0])
    shutil.copytree(source / "tokenizer", target / umt5.NATIVE_TOKENIZER)
    return target


def write_transformer(source: Path, target: Path, model_type: str) -> None:
    """Wan's names and config of one of diffusers' transformers."""
    target.mkdir(parents=True, exist_ok=True)
    config = json.loads((source / "config.json").read_text())
    tensors = load_file(source / "diffusion_pytorch_model.safetensors")
    rows = {row.diffusers: row.native for row in names(dit_config(config))}
    save_file(
        {rows[name]: tensor for name, tensor in tensors.items()},
        target / "diffusion_pytorch_model.safetensors",
    )
    heads = config["num_attention_heads"]
    native = {
        "_class_name": "WanModel", "model_type": model_type, "dim": heads * config["attention_head_dim"],
        "num_heads": heads, "num_layers": config["num_layers"], "ffn_dim": config["ffn_dim"],
        "freq_dim": config["freq_dim"], "in_dim": config["in_channels"], "out_dim": config["out_channels"],
        "eps": config["eps"], "text_len": 512, "text_dim": config["text_dim"],
    }  # fmt: skip
    (target / "config.json").write_text(json.dumps(native))
