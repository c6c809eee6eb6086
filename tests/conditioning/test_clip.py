"""Laws of the image features: diffusers' own, whichever way the weights are named."""

import gc
import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from vidgen.bench.random_wan import make_wan
from vidgen.conditioning import clip
from vidgen.conditioning.clip import ClipSource, clip_source, encode_images

NUM_TOKENS, WIDTH = 257, 20  # of make_wan's encoder
PTH = "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"
WAN_NAMES = {  # Wan's module tree beside transformers', written down from both sources
    "pre_norm": "pre_layrnorm",
    "post_norm": "post_layernorm",
    "transformer.{}.norm1": "encoder.layers.{}.layer_norm1",
    "transformer.{}.norm2": "encoder.layers.{}.layer_norm2",
    "transformer.{}.attn.proj": "encoder.layers.{}.self_attn.out_proj",
    "transformer.{}.mlp.0": "encoder.layers.{}.mlp.fc1",
    "transformer.{}.mlp.2": "encoder.layers.{}.mlp.fc2",
}


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A published I2V folder, with the published encoder's activation."""
    folder = make_wan(tmp_path_factory.mktemp("wan"), "i2v")
    path = folder / "image_encoder" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"hidden_act": "gelu"}))
    return folder


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> Any:
    from diffusers.pipelines.wan.pipeline_wan_i2v import WanImageToVideoPipeline

    return WanImageToVideoPipeline.from_pretrained(folder)


def diffusers_features(pipeline: Any, images: Any) -> Tensor:
    with torch.no_grad():
        return pipeline.encode_image(images, torch.device("cpu"))


def native_tensors(folder: Path) -> dict[str, Tensor]:
    """The folder's image encoder by Wan's names, among the other tensors of Wan's file."""
    theirs = load_file(folder / "image_encoder" / "model.safetensors")
    tensors = {
        "visual.cls_embedding": theirs["embeddings.class_embedding"][None, None],
        "visual.pos_embedding": theirs["embeddings.position_embedding.weight"][None],
        "visual.patch_embedding.weight": theirs["embeddings.patch_embedding.weight"],
        "visual.head": torch.zeros(WIDTH, 7),
        "textual.token_embedding.weight": torch.zeros(5, 3),
        "log_scale": torch.zeros(()),
    }
    for part in ("weight", "bias"):
        for layer in range(3):
            for native, name in WAN_NAMES.items():
                tensors[f"visual.{native.format(layer)}.{part}"] = theirs[f"{name.format(layer)}.{part}"]
            stem = f"encoder.layers.{layer}.self_attn"
            tensors[f"visual.transformer.{layer}.attn.to_qkv.{part}"] = torch.cat(
                [theirs[f"{stem}.{letter}_proj.{part}"] for letter in "qkv"]
            )
    return tensors


@pytest.fixture
def native(folder: Path, tmp_path: Path) -> Callable[..., ClipSource]:
    """Writes a checkpoint in Wan's own layout; tensors may be changed first."""

    def native(change: Callable[[dict[str, Tensor]], object] = len) -> ClipSource:
        tensors = native_tensors(folder)
        change(tensors)
        torch.save(tensors, tmp_path / PTH)
        found = clip_source(tmp_path)
        return ClipSource(weights=found.weights, processor=found.processor, num_heads=2)

    return native


@pytest.mark.parametrize(("height", "width"), [(32, 32), (45, 61), (90, 33), (20, 200), (480, 832)])
def test_features_of_an_image_are_diffusers_bit_for_bit(folder: Path, pipeline: Any, height: int, width: int):
    image = picture(height, width)
    ours = encode_images(clip_source(folder), [image])
    assert ours.shape == (1, NUM_TOKENS, WIDTH)
    assert torch.equal(ours, diffusers_features(pipeline, image))


def test_features_in_bfloat16_are_diffusers(folder: Path):
    from diffusers.pipelines.wan.pipeline_wan_i2v import WanImageToVideoPipeline

    pipeline = WanImageToVideoPipeline.from_pretrained(folder, dtype=torch.bfloat16)
    ours = encode_images(clip_source(folder), [picture(50, 70)], dtype=torch.bfloat16)
    assert ours.dtype == torch.bfloat16
    assert torch.equal(ours, diffusers_features(pipeline, picture(50, 70)))


def test_first_and_last_frame_lie_as_diffusers_image_embedding_lays_them(folder: Path, pipeline: Any):
    from diffusers.models.transformers.transformer_wan import WanImageEmbedding

    first, last = picture(40, 60, 1), picture(64, 48, 2)
    ours = encode_images(clip_source(folder), [first, last])
    assert ours.shape == (1, 2 * NUM_TOKENS, WIDTH)
    alone = [encode_images(clip_source(folder), [image]) for image in (first, last)]
    torch.testing.assert_close(ours, torch.cat(alone, dim=1))
    theirs = diffusers_features(pipeline, [first, last])
    embedding = WanImageEmbedding(WIDTH, 24, pos_embed_seq_len=2 * NUM_TOKENS).requires_grad_(False)
    assert embedding.pos_embed is not None
    embedding.pos_embed.copy_(torch.randn(embedding.pos_embed.shape))
    plain = WanImageEmbedding(WIDTH, 24).requires_grad_(False)
    plain.load_state_dict({k: v for k, v in embedding.state_dict().items() if k != "pos_embed"})
    assert torch.equal(plain(ours + embedding.pos_embed), embedding(theirs))


@pytest.mark.parametrize("mode", ["RGBA", "L", "P"])
def test_pictures_of_other_modes_are_diffusers_too(folder: Path, pipeline: Any, mode: str):
    image = picture(50, 40).convert(mode)
    assert torch.equal(encode_images(clip_source(folder), [image]), diffusers_features(pipeline, image))


def test_an_array_is_the_picture_it_holds(folder: Path):
    image = picture(3, 40)  # rows that could be channels
    array = encode_images(clip_source(folder), [np.asarray(image)])
    assert torch.equal(array, encode_images(clip_source(folder), [image]))


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_wans_own_names_give_the_same_features(folder: Path, native: Callable[..., ClipSource], suffix: str):
    source = native()
    if suffix == ".safetensors":
        path = source.weights.with_suffix(suffix)
        save_file(torch.load(source.weights, weights_only=True), path)
        source = ClipSource(weights=path, processor=None, num_heads=2)
    images = [picture(45, 61), picture(61, 45, 1)]
    assert torch.equal(encode_images(source, images), encode_images(clip_source(folder), images))


def test_the_published_file_has_sixteen_heads(tmp_path: Path):
    (tmp_path / PTH).touch()
    assert clip_source(tmp_path).num_heads == 16


def test_names_under_vision_model_are_read_too(folder: Path, tmp_path: Path):
    """As transformers before 5 wrote them, and so the published folders."""
    tensors = load_file(folder / "image_encoder" / "model.safetensors")
    (tmp_path / "config.json").write_bytes((folder / "image_encoder" / "config.json").read_bytes())
    old = {f"vision_model.{name}": tensor for name, tensor in tensors.items()}
    save_file(old, tmp_path / "model.safetensors", metadata={"format": "pt"})
    source = ClipSource(weights=tmp_path, processor=folder / "image_processor")
    expected = encode_images(clip_source(folder), [picture(40, 50)])
    assert torch.equal(encode_images(source, [picture(40, 50)]), expected)


def test_every_fault_of_wans_own_file_is_named_in_one_line(native: Callable[..., ClipSource]):
    def spoil(tensors: dict[str, Tensor]) -> None:
        del tensors["visual.post_norm.bias"], tensors["visual.transformer.2.attn.to_qkv.weight"]
        tensors["visual.transformer.1.mlp.2.weight"] = torch.zeros(3, 3)
        tensors["visual.extra"] = torch.zeros(1)

    with pytest.raises(ValueError, match="not the tensors of a CLIPVisionModel") as error:
        encode_images(native(spoil), [picture(40, 40)])
    message = str(error.value)
    assert "\n" not in message
    assert "missing: visual.post_norm.bias, visual.transformer.2.attn.to_qkv.weight;" in message
    assert "unexpected: visual.extra;" in message
    assert "of another shape: visual.transformer.1.mlp.2.weight" in message


def test_what_is_no_image_encoder_is_one_clear_error(native: Callable[..., ClipSource], tmp_path: Path):
    with pytest.raises(ValueError, match="missing: visual.cls_embedding"):
        encode_images(native(lambda tensors: tensors.pop("visual.cls_embedding")), [picture(40, 40)])
    (tmp_path / PTH).unlink()
    with pytest.raises(ValueError, match="need image_encoder/ and image_processor/, or models_clip"):
        clip_source(tmp_path)


def test_no_image_is_an_error(folder: Path):
    with pytest.raises(ValueError, match="no image: give"):
        encode_images(clip_source(folder), [])


def test_the_encoder_is_released(folder: Path, monkeypatch: pytest.MonkeyPatch):
    loaded: list[weakref.ref[Any]] = []
    load = clip.load_image_encoder

    def counted(source: ClipSource, dtype: torch.dtype) -> Any:
        encoder = load(source, dtype)
        loaded.append(weakref.ref(encoder))
        return encoder

    monkeypatch.setattr(clip, "load_image_encoder", counted)
    encode_images(clip_source(folder), [picture(40, 40), picture(50, 50)])
    gc.collect()
    assert [encoder() for encoder in loaded] == [None]
