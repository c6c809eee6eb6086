"""Wan checkpoints of random weights in the published layout: for tests, benchmarks and trying out machines.

Every folder is what diffusers' `save_pretrained` of the family's pipeline writes; only the sizes are smaller.
"""

import json
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import nn

Kind = Literal["t2v", "i2v", "flf2v", "ti2v", "a14b-t2v", "a14b-i2v"]
KINDS: tuple[Kind, ...] = get_args(Kind)
WITH_CLIP: tuple[Kind, ...] = ("i2v", "flf2v")
WITH_IMAGE: tuple[Kind, ...] = (*WITH_CLIP, "a14b-i2v")
WORDS = "a the red green blue cat dog circle square runs sits on grass over moving left right".split()


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """Of a random checkpoint."""

    num_heads: int = 2
    head_dim: int = 12
    num_layers: int = 3
    ffn_width: int = 48
    text_width: int = 32
    num_frequencies: int = 32
    clip_width: int = 20
    vae_width: int = 8
    shard_bytes: str = "10GB"  # of the transformer's files, as save_pretrained takes it


TINY = Sizes()
# about 100 million parameters
MID = Sizes(
    num_heads=12, head_dim=64, num_layers=10, ffn_width=3072, text_width=512, num_frequencies=256,
    shard_bytes="60MB",
)  # fmt: skip

# Wan 2.1 T2V 1.3B's own transformer
LARGE = Sizes(
    num_heads=12, head_dim=128, num_layers=30, ffn_width=8960, text_width=4096, num_frequencies=256
)  # fmt: skip


def make_wan(folder: Path, kind: Kind, *, sizes: Sizes = TINY, seed: int = 0) -> Path:
    """The folder, with a whole random checkpoint in it. All weights differ from their initial values."""
    from diffusers.pipelines.wan.pipeline_wan import WanPipeline
    from diffusers.pipelines.wan.pipeline_wan_i2v import WanImageToVideoPipeline
    from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler

    torch.manual_seed(seed)
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=5.0
    )
    parts: dict[str, Any] = {
        "tokenizer": _tokenizer(),
        "text_encoder": _text_encoder(sizes),
        "vae": make_vae(kind, sizes),
        "scheduler": scheduler,
        "transformer": make_transformer(kind, sizes),
    }
    settings: dict[str, Any] = {}
    if kind.startswith("a14b"):
        parts["transformer_2"] = make_transformer(kind, sizes)
        settings["boundary_ratio"] = 0.875 if kind == "a14b-t2v" else 0.9
    if kind == "ti2v":
        settings["expand_timesteps"] = True
    if kind in WITH_IMAGE:
        parts["image_encoder"], parts["image_processor"] = None, None
        if kind in WITH_CLIP:
            parts["image_encoder"], parts["image_processor"] = _image_encoder(sizes), _image_processor()
        pipeline = WanImageToVideoPipeline(**parts, **settings)
    else:
        pipeline = WanPipeline(**parts, **settings)
    pipeline.save_pretrained(folder, max_shard_size=sizes.shard_bytes)
    return folder


def make_hollow_wan(folder: Path, sizes: Sizes) -> Path:
    """A text-to-video checkpoint with all but the transformer's numbers: its file is a hole of their size.

    For what reads names and shapes only. It takes no room on the disk, and no time.
    """
    make_wan(folder, "t2v", sizes=replace(sizes, num_layers=1))
    with torch.device("meta"):
        transformer = make_transformer("t2v", sizes)
    transformer.save_config(folder / "transformer")
    header, size = {}, 0
    for name, tensor in transformer.state_dict().items():
        end = size + 2 * prod(tensor.shape)
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [size, end]}
        size = end
    described = json.dumps(header).encode()
    with (folder / "transformer" / "diffusion_pytorch_model.safetensors").open("wb") as file:
        file.write(len(described).to_bytes(8, "little") + described)
        file.truncate(8 + len(described) + size)
    return folder


def make_transformer(kind: Kind, sizes: Sizes = TINY) -> Any:
    """A random WanTransformer3DModel of the kind's channels."""
    from diffusers.models.transformers.transformer_wan import WanTransformer3DModel

    latent_channels = 48 if kind == "ti2v" else 16
    has_image, has_clip = kind in WITH_IMAGE, kind in WITH_CLIP
    model = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=sizes.num_heads,
        attention_head_dim=sizes.head_dim,
        in_channels=latent_channels + 20 * has_image,
        out_channels=latent_channels,
        text_dim=sizes.text_width,
        freq_dim=sizes.num_frequencies,
        ffn_dim=sizes.ffn_width,
        num_layers=sizes.num_layers,
        image_dim=sizes.clip_width if has_clip else None,
        added_kv_proj_dim=sizes.num_heads * sizes.head_dim if has_clip else None,
        pos_embed_seq_len=514 if kind == "flf2v" else None,
    )
    return randomise(model).eval()


def make_vae(kind: Kind, sizes: Sizes = TINY) -> Any:
    """A random AutoencoderKLWan: Wan 2.1's, or the 16x16x4 one of Wan 2.2 TI2V."""
    from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan

    shared: dict[str, Any] = {
        "base_dim": sizes.vae_width,
        "dim_mult": [1, 2, 4, 4],
        "num_res_blocks": 2,  # as published: a native file does not say
        "temperal_downsample": [False, True, True],
    }
    if kind == "ti2v":
        vae = AutoencoderKLWan(
            z_dim=48, decoder_base_dim=2 * sizes.vae_width, is_residual=True, in_channels=12, out_channels=12,
            patch_size=2, scale_factor_spatial=16, scale_factor_temporal=4,
            latents_mean=[0.01 * i for i in range(48)], latents_std=[1 + 0.01 * i for i in range(48)],
            **shared,
        )  # fmt: skip
    else:
        vae = AutoencoderKLWan(z_dim=16, **shared)
    return randomise(vae).eval()


@torch.no_grad()
def randomise(model: nn.Module, spread: float = 0.1) -> nn.Module:
    """Move every parameter off its initial value, zeros and ones too."""
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * spread * (parameter.std(correction=0) + 0.2))
    return model


def _text_encoder(sizes: Sizes) -> Any:
    from transformers import UMT5Config, UMT5EncoderModel

    config = UMT5Config(
        vocab_size=len(WORDS) + 8, d_model=sizes.text_width, d_kv=8, d_ff=2 * sizes.text_width, num_layers=2,
        num_heads=4, relative_attention_num_buckets=8, feed_forward_proj="gated-gelu",
        is_encoder_decoder=False, use_cache=False,
    )  # fmt: skip
    return UMT5EncoderModel(config).eval()


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -3.0)]
    pieces += [("\u2581" + word, -2.0 - 0.01 * i) for i, word in enumerate(WORDS)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2))
    tokenizer.normalizer = normalizers.NFKC()  # type: ignore[assignment]
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()  # type: ignore[assignment]
    tokenizer.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=512,
    )


def _image_encoder(sizes: Sizes) -> Any:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    config = CLIPVisionConfig(
        hidden_size=sizes.clip_width, intermediate_size=2 * sizes.clip_width, num_hidden_layers=3,
        num_attention_heads=2, image_size=32, patch_size=2, projection_dim=sizes.clip_width,
    )  # fmt: skip
    return CLIPVisionModel(config).eval()  # 257 tokens, as the published one


def _image_processor() -> Any:
    from transformers import CLIPImageProcessor

    return CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
