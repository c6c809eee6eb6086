"""Wan's text encoder, UMT5-XXL: loaded once, run over the prompts that are not cached yet, and released.

Embeddings are those of diffusers' WanPipeline.encode_prompt: prompts run one at a time and padded, so that a
prompt's embedding does not depend on what else was encoded with it. CLIP (clip.py) is loaded the same way.
"""

import hashlib
import html
import re
import uuid
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional

from vidgen.conditioning.pretrained import (
    Native,
    count_layers,
    load_native,
    load_pretrained,
    quietly,
    release_memory,
)  # fmt: skip
from vidgen.model.tensor_files import fingerprint

# B batch of 1, N tokens, T text width

NATIVE_FILES = ("models_t5_umt5-xxl-enc-bf16.pth", "models_t5_umt5-xxl-enc-bf16.safetensors")
NATIVE_TOKENIZER = "google/umt5-xxl"


@dataclass(frozen=True, kw_only=True, slots=True)
class TextSource:
    """Where a text encoder and its tokenizer are; see text_source."""

    weights: Path  # a folder that transformers wrote, or a file with Wan's own names
    tokenizer: Path


_LAYER = "encoder.block.{}.layer."
_NAMES = {  # without ".weight"
    "token_embedding": "shared",
    **{f"blocks.{{}}.attn.{part}": f"{_LAYER}0.SelfAttention.{part}" for part in "qkvo"},
    "blocks.{}.norm1": _LAYER + "0.layer_norm",
    "blocks.{}.norm2": _LAYER + "1.layer_norm",
    "blocks.{}.pos_embedding.embedding": _LAYER + "0.SelfAttention.relative_attention_bias",
    "blocks.{}.ffn.gate.0": _LAYER + "1.DenseReluDense.wi_0",
    "blocks.{}.ffn.fc1": _LAYER + "1.DenseReluDense.wi_1",
    "blocks.{}.ffn.fc2": _LAYER + "1.DenseReluDense.wo",
    "norm": "encoder.final_layer_norm",
}
NATIVE_NAMES = tuple(
    Native(native=f"{ours}.weight", theirs=(f"{name}.weight",)) for ours, name in _NAMES.items()
)


def text_source(folder: Path) -> TextSource:
    """A checkpoint's text encoder, in diffusers' layout or Wan's own. ValueError where there is neither."""
    found = [TextSource(weights=folder / "text_encoder", tokenizer=folder / "tokenizer")]
    found += [TextSource(weights=folder / name, tokenizer=folder / NATIVE_TOKENIZER) for name in NATIVE_FILES]
    for source in found:
        if source.weights.exists() and source.tokenizer.is_dir():
            return source
    native = f"{NATIVE_FILES[0]} and {NATIVE_TOKENIZER}/"
    raise ValueError(f"{folder}: no text encoder; need text_encoder/ and tokenizer/, or {native}")


def encode_prompts(
    source: TextSource,
    prompts: Sequence[str],
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    max_tokens: int = 512,
    cache: "TextCache | None" = None,
) -> dict[str, Tensor]:
    """Per prompt [1, max_tokens, T] on the CPU, zero past its tokens; runs in `dtype` on `device`.

    A prompt of more tokens than fit is cut, with a warning that says by how many.
    """
    texts = {prompt: clean_prompt(prompt) for prompt in prompts}
    key = (source_fingerprint(source), max_tokens, str(dtype)) if cache else ()
    known: dict[str, Any] = {text: cache.get(text, *key) for text in texts.values()} if cache else {}
    missing = [text for text in dict.fromkeys(texts.values()) if known.get(text) is None]
    encoded = _encode(source, missing, device, dtype, max_tokens) if missing else {}
    if cache:
        for text, embedding_NT in encoded.items():
            cache.put(embedding_NT, text, *key)
    known |= encoded
    padded = {text: functional.pad(t, (0, 0, 0, max_tokens - len(t)))[None] for text, t in known.items()}
    return {prompt: padded[text] for prompt, text in texts.items()}


def clean_prompt(prompt: str) -> str:
    """The prompt as Wan's encoder was trained on it: mojibake repaired, HTML resolved, single spaces."""
    import ftfy

    text = html.unescape(html.unescape(ftfy.fix_text(prompt)))
    return re.sub(r"\s+", " ", text).strip()


@torch.no_grad()
def _encode(
    source: TextSource, texts: Sequence[str], device: torch.device | str, dtype: torch.dtype, max_tokens: int
) -> dict[str, Tensor]:
    """Embeddings [N, T] of clean texts, as long as their tokens."""
    from transformers import AutoTokenizer

    with quietly():
        tokenizer: Any = AutoTokenizer.from_pretrained(source.tokenizer, local_files_only=True)
    encoder = load_text_encoder(source, dtype).to(device)
    encoded = {}
    for text in texts:
        num_cut = len(tokenizer(text, verbose=False).input_ids) - max_tokens
        if num_cut > 0:
            lost = f"{num_cut} of its {num_cut + max_tokens} tokens do not fit and are left out"
            warnings.warn(f"prompt {text[:40]!r}...: {lost}; shorten it", stacklevel=3)
        tokens = tokenizer(
            [text], padding="max_length", max_length=max_tokens, truncation=True, return_tensors="pt"
        ).to(device)
        ids_BN, mask_BN = tokens.input_ids, tokens.attention_mask
        embedding_NT = encoder(ids_BN, mask_BN).last_hidden_state[0, : int(mask_BN.sum())]
        encoded[text] = embedding_NT.to("cpu", dtype, copy=True).contiguous()
    del encoder
    release_memory()
    return encoded


def load_text_encoder(source: TextSource, dtype: torch.dtype) -> Any:
    """A UMT5EncoderModel. ValueError that names every tensor missing, unexpected or misshaped."""
    from transformers import UMT5EncoderModel

    if source.weights.is_dir():
        return load_pretrained(UMT5EncoderModel, source.weights, dtype, {})
    return load_native(UMT5EncoderModel, source.weights, dtype, NATIVE_NAMES, _config)


def _config(tensors: Mapping[str, Tensor]) -> Any:
    """transformers' config of Wan's tensors; what no shape tells is the same in every UMT5."""
    from transformers import UMT5Config

    num_buckets, num_heads = tensors["blocks.0.pos_embedding.embedding.weight"].shape
    vocabulary, width = tensors["token_embedding.weight"].shape
    return UMT5Config(
        vocab_size=vocabulary, d_model=width, d_kv=tensors["blocks.0.attn.q.weight"].shape[0] // num_heads,
        d_ff=tensors["blocks.0.ffn.fc1.weight"].shape[0], num_layers=count_layers(tensors, "blocks."),
        num_heads=num_heads, relative_attention_num_buckets=num_buckets, feed_forward_proj="gated-gelu",
    )  # fmt: skip


def source_fingerprint(source: TextSource) -> str:
    """What tells this encoder and tokenizer from others; see tensor_files.fingerprint."""
    found = []
    for root in (source.weights, source.tokenizer):
        paths = sorted(path for path in root.rglob("*") if path.is_file()) if root.is_dir() else [root]
        found.append(fingerprint(paths, root))
    return "-".join(found)


class TextCache:
    """A folder of embeddings [N, T], each by all that it depends on; several processes may use it at once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def get(self, *key: object) -> Tensor | None:
        """The embedding, or None. A damaged file is warned of and counts as none."""
        path = self._path(key)
        try:
            return load_file(path)["text"] if path.exists() else None
        except (SafetensorError, KeyError) as error:
            warnings.warn(f"{path}: damaged ({error}); the prompt is encoded anew", stacklevel=3)
            return None

    def put(self, embedding_NT: Tensor, *key: object) -> None:
        """Keep an embedding, whole or not at all."""
        temporary = self.folder / f"{uuid.uuid4()}.part"
        try:
            save_file({"text": embedding_NT}, temporary)
            temporary.replace(self._path(key))
        finally:
            temporary.unlink(missing_ok=True)

    def _path(self, key: tuple[object, ...]) -> Path:
        return self.folder / f"{hashlib.sha256(repr(key).encode()).hexdigest()}.safetensors"
