"""Laws of Wan's text encoder: diffusers' embeddings, whichever way the weights are named and kept."""

import gc
import json
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from vidgen.bench.random_wan import make_wan
from vidgen.conditioning import umt5
from vidgen.conditioning.umt5 import (
    TextCache,
    TextSource,
    clean_prompt,
    encode_prompts,
    source_fingerprint,
    text_source,
)

PROMPTS = ["a red cat runs", "  the &amp;lt; blue\t\tdog ", "unknown wörds &quot;ﬁne&quot; sâ€™il", ""]
FP32: dict[str, Any] = {"dtype": torch.float32}
LAYER = "encoder.block.{}.layer."
WAN_NAMES = {  # Wan's T5 module tree beside transformers', written down from both sources
    "token_embedding": "shared",
    "norm": "encoder.final_layer_norm",
    "blocks.{}.norm1": LAYER + "0.layer_norm",
    "blocks.{}.norm2": LAYER + "1.layer_norm",
    "blocks.{}.pos_embedding.embedding": LAYER + "0.SelfAttention.relative_attention_bias",
    "blocks.{}.ffn.gate.0": LAYER + "1.DenseReluDense.wi_0",
    "blocks.{}.ffn.fc1": LAYER + "1.DenseReluDense.wi_1",
    "blocks.{}.ffn.fc2": LAYER + "1.DenseReluDense.wo",
} | {f"blocks.{{}}.attn.{part}": f"{LAYER}0.SelfAttention.{part}" for part in "qkvo"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_wan(tmp_path_factory.mktemp("wan"), "t2v")


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> Any:
    from diffusers.pipelines.wan.pipeline_wan import WanPipeline

    return WanPipeline.from_pretrained(folder)


def diffusers_text(pipeline: Any, prompt: str, max_tokens: int) -> Tensor:
    with torch.no_grad():  # as in the pipeline's call; with gradients attention takes another path
        return pipeline.encode_prompt(prompt, max_sequence_length=max_tokens, device=torch.device("cpu"))[0]


def native_tensors(folder: Path) -> dict[str, Tensor]:
    """The folder's text encoder by Wan's names."""
    tensors = load_file(folder / "text_encoder" / "model.safetensors")
    num_layers = json.loads((folder / "text_encoder" / "config.json").read_text())["num_layers"]
    return {
        f"{native.format(layer)}.weight": tensors[f"{theirs.format(layer)}.weight"]
        for native, theirs in WAN_NAMES.items()
        for layer in range(num_layers if "{}" in native else 1)
    }


@pytest.fixture
def native(folder: Path, tmp_path: Path) -> Callable[..., Path]:
    """Writes a checkpoint in Wan's own layout; tensors may be changed first."""

    def native(change: Callable[[dict[str, Tensor]], object] = len) -> Path:
        tensors = native_tensors(folder)
        change(tensors)
        torch.save(tensors, tmp_path / "models_t5_umt5-xxl-enc-bf16.pth")
        (tmp_path / "google").mkdir()
        (tmp_path / "google" / "umt5-xxl").symlink_to(folder / "tokenizer")
        return tmp_path

    return native


@pytest.mark.parametrize("max_tokens", [512, 226, 17])
def test_embeddings_are_those_of_diffusers_bit_for_bit(folder: Path, pipeline: Any, max_tokens: int):
    ours = encode_prompts(text_source(folder), PROMPTS, max_tokens=max_tokens, **FP32)
    for prompt in PROMPTS:
        assert ours[prompt].shape == (1, max_tokens, 32)
        assert torch.equal(ours[prompt], diffusers_text(pipeline, prompt, max_tokens))


def test_embeddings_in_bfloat16_are_those_of_diffusers(folder: Path):
    from diffusers.pipelines.wan.pipeline_wan import WanPipeline

    pipeline = WanPipeline.from_pretrained(folder, dtype=torch.bfloat16)
    ours = encode_prompts(text_source(folder), PROMPTS[:1], max_tokens=30)[PROMPTS[0]]
    assert ours.dtype == torch.bfloat16
    assert torch.equal(ours, diffusers_text(pipeline, PROMPTS[0], 30))


@given(st.text())
@example("A\x1cB&#28;C&amp;nbsp;  &lt;b&gt; sâ€™il")
def test_prompts_are_cleaned_as_diffusers_does(prompt: str):
    from diffusers.pipelines.wan.pipeline_wan import prompt_clean

    assert clean_prompt(prompt) == prompt_clean(prompt)


def test_nothing_follows_the_tokens_of_a_prompt(folder: Path):
    text_BNT = encode_prompts(text_source(folder), ["a cat"], **FP32)["a cat"]
    assert (text_BNT[0, :3].abs().sum(-1) > 0).all()  # a, cat, end of text
    assert not text_BNT[0, 3:].any()


def test_a_prompts_embedding_does_not_depend_on_its_company(folder: Path):
    together = encode_prompts(text_source(folder), PROMPTS, max_tokens=40, **FP32)
    for prompt in PROMPTS:
        alone = encode_prompts(text_source(folder), [prompt], max_tokens=40, **FP32)
        assert torch.equal(alone[prompt], together[prompt])


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_wans_own_names_give_the_same_embeddings(folder: Path, native: Callable[..., Path], suffix: str):
    root = native()
    if suffix == ".safetensors":
        path = root / "models_t5_umt5-xxl-enc-bf16.pth"
        save_file(torch.load(path, weights_only=True), path.with_suffix(suffix))
        path.unlink()
    source = text_source(root)
    assert source.weights.suffix == suffix
    ours = encode_prompts(source, PROMPTS, max_tokens=40, **FP32)
    theirs = encode_prompts(text_source(folder), PROMPTS, max_tokens=40, **FP32)
    assert all(torch.equal(ours[prompt], theirs[prompt]) for prompt in PROMPTS)


def test_sharded_weights_give_the_same_embeddings(folder: Path, pipeline: Any, tmp_path: Path):
    pipeline.text_encoder.save_pretrained(tmp_path, max_shard_size="10KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    source = TextSource(weights=tmp_path, tokenizer=folder / "tokenizer")
    assert torch.equal(
        encode_prompts(source, ["a cat"], **FP32)["a cat"],
        encode_prompts(text_source(folder), ["a cat"], **FP32)["a cat"],
    )


def test_every_fault_of_wans_own_file_is_named_in_one_line(native: Callable[..., Path]):
    def spoil(tensors: dict[str, Tensor]) -> None:
        del tensors["norm.weight"]
        tensors["blocks.1.attn.q.weight"] = torch.zeros(3, 3)
        tensors["blocks.2.attn.v.weights"] = torch.zeros(1)

    spoilt = native(spoil)
    with pytest.raises(ValueError, match="not the tensors of a UMT5EncoderModel") as error:
        encode_prompts(text_source(spoilt), ["a cat"])
    message = str(error.value)
    assert "\n" not in message
    assert "norm.weight" in message.split("missing: ")[1].split(";")[0]
    assert "unexpected: blocks.2.attn.v.weights" in message
    assert "of another shape: blocks.1.attn.q.weight" in message


def test_every_fault_of_a_diffusers_folder_is_named_in_one_line(folder: Path, tmp_path: Path):
    tensors = load_file(folder / "text_encoder" / "model.safetensors")
    del tensors["encoder.final_layer_norm.weight"]
    tensors["foo"] = torch.zeros(1)
    (tmp_path / "config.json").write_bytes((folder / "text_encoder" / "config.json").read_bytes())
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    source = TextSource(weights=tmp_path, tokenizer=folder / "tokenizer")
    with pytest.raises(ValueError, match="missing: encoder.final_layer_norm.weight; unexpected: foo$"):
        encode_prompts(source, ["a cat"])


def test_a_file_that_is_no_text_encoder_is_one_clear_error(native: Callable[..., Path]):
    root = native(lambda tensors: tensors.pop("token_embedding.weight"))
    with pytest.raises(ValueError, match="missing: token_embedding.weight"):
        encode_prompts(text_source(root), ["a cat"])
    text_source(root).weights.write_bytes(b"no tensors")
    with pytest.raises(ValueError, match=r"\.pth: not a file of plain tensors"):
        encode_prompts(text_source(root), ["a cat"])


def test_a_file_that_would_run_code_is_refused(native: Callable[..., Path], tmp_path: Path):
    root = native()
    torch.save({"a": Path.home}, text_source(root).weights)
    with pytest.raises(ValueError, match="not a file of plain tensors"):
        encode_prompts(text_source(root), ["a cat"])


def test_a_folder_that_cannot_be_read_is_one_clear_error(folder: Path, tmp_path: Path):
    source = TextSource(weights=tmp_path, tokenizer=folder / "tokenizer")
    (tmp_path / "config.json").write_bytes((folder / "text_encoder" / "config.json").read_bytes())
    with pytest.raises(ValueError, match="no readable UMT5EncoderModel .*model.safetensors"):
        encode_prompts(source, ["a cat"])
    whole = (folder / "text_encoder" / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:1000])
    with pytest.raises(ValueError, match="no readable UMT5EncoderModel"):
        encode_prompts(source, ["a cat"])


def test_a_folder_without_a_text_encoder_says_what_is_needed(tmp_path: Path):
    with pytest.raises(ValueError, match="need text_encoder/ and tokenizer/, or models_t5"):
        text_source(tmp_path)


def test_a_cut_prompt_warns_once_of_how_many_tokens_are_lost(folder: Path, pipeline: Any):
    prompt = "cat " * 9  # and the end of text
    with pytest.warns(UserWarning, match="4 of its 10 tokens") as warned:
        ours = encode_prompts(text_source(folder), [prompt, prompt], max_tokens=6, **FP32)[prompt]
    assert len(warned) == 1
    assert torch.equal(ours, diffusers_text(pipeline, prompt, 6))


def test_the_encoder_is_loaded_once_and_released(folder: Path, monkeypatch: pytest.MonkeyPatch):
    loaded: list[weakref.ref[Any]] = []
    load = umt5.load_text_encoder

    def counted(source: TextSource, dtype: torch.dtype) -> Any:
        encoder = load(source, dtype)
        loaded.append(weakref.ref(encoder))
        return encoder

    monkeypatch.setattr(umt5, "load_text_encoder", counted)
    encode_prompts(text_source(folder), [*PROMPTS, *PROMPTS])
    gc.collect()
    assert [encoder() for encoder in loaded] == [None]
    encode_prompts(text_source(folder), [])
    assert len(loaded) == 1


def test_a_cached_prompt_loads_nothing_and_is_the_same(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    source, options = text_source(folder), FP32 | {"max_tokens": 20, "cache": TextCache(tmp_path / "texts")}
    first = encode_prompts(source, PROMPTS, **options)
    assert not list((tmp_path / "texts").glob("*.part"))
    monkeypatch.setattr(umt5, "_encode", lambda *_: pytest.fail("the encoder ran"))
    again = encode_prompts(source, PROMPTS, **options)
    assert all(torch.equal(first[prompt], again[prompt]) for prompt in PROMPTS)
    assert again[PROMPTS[0]].shape == (1, 20, 32)


def test_the_cache_holds_for_the_same_weights_tokens_and_dtype_only(folder: Path, tmp_path: Path):
    cache, prompt = TextCache(tmp_path), "a cat"
    source, other = text_source(folder), tmp_path / "other"
    shutil.copytree(source.weights, other)
    tensors = load_file(other / "model.safetensors")
    tensors["encoder.final_layer_norm.weight"] += 1
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    changed = TextSource(weights=other, tokenizer=source.tokenizer)
    cases: list[tuple[TextSource, dict[str, Any]]] = [
        (source, FP32), (source, {}), (source, FP32 | {"max_tokens": 100}), (changed, FP32),
    ]  # fmt: skip
    for count, (source, options) in enumerate(cases, start=1):
        assert torch.equal(
            encode_prompts(source, [prompt], cache=cache, **options)[prompt],
            encode_prompts(source, [prompt], **options)[prompt],
        )
        assert len(list(tmp_path.glob("*.safetensors"))) == count


def test_a_damaged_cache_file_warns_and_is_encoded_anew(folder: Path, tmp_path: Path):
    source, cache = text_source(folder), TextCache(tmp_path)
    first = encode_prompts(source, ["a cat"], cache=cache)["a cat"]
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:50])
    with pytest.warns(UserWarning, match="damaged"):
        assert torch.equal(encode_prompts(source, ["a cat"], cache=cache)["a cat"], first)
    assert torch.equal(encode_prompts(source, ["a cat"], cache=cache)["a cat"], first)


def test_a_copy_of_a_source_has_its_fingerprint_and_a_changed_one_not(folder: Path, tmp_path: Path):
    weights = tmp_path / "weights.safetensors"
    weights.write_bytes(bytes(1_000_000))
    source = TextSource(weights=weights, tokenizer=folder / "tokenizer")
    before = source_fingerprint(source)
    weights.touch()
    assert source_fingerprint(source) == before
    weights.write_bytes(b"\1" * 1_000_000)
    assert source_fingerprint(source) != before
