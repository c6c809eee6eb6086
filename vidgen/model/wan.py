"""From the config of a published Wan transformer, diffusers' or Wan's own, to that of a DiT.

Sources: diffusers' transformer_wan.py; wan/modules/model.py of github.com/Wan-Video/Wan2.1 and Wan2.2.
"""

from typing import Any

from vidgen.model.dit import DiTConfig
from vidgen.model.dtypes import DTYPES, DType

CLIP_TOKENS, CLIP_WIDTH = 257, 1280  # of an image, by the ViT-H/14 that Wan 2.1's image models use
TEXT_WIDTH = 4096  # of UMT5-XXL; Wan's own configs leave it out
PATCH = (1, 2, 2)
NATIVE_KINDS = ("t2v", "i2v", "flf2v", "ti2v")
NATIVE_KEYS = (
    "dim", "ffn_dim", "freq_dim", "in_dim", "out_dim", "num_heads", "num_layers", "eps", "model_type",
)  # fmt: skip
DIFFUSERS_KEYS = (
    "num_attention_heads", "attention_head_dim", "in_channels", "out_channels", "text_dim", "freq_dim",
    "ffn_dim", "num_layers", "eps",
)  # fmt: skip


def dit_config(
    config: dict[str, Any], *, dtype: DType | str = "fp32", has_clip: bool | None = None
) -> DiTConfig:
    """Sizes of the DiT that a transformer's config.json describes, to be held in a dtype.

    Wan's own configs do not tell Wan 2.1's i2v, which attends to CLIP features, from 2.2's, which does not:
    `has_clip` does, for these only. ValueError in one line for another model, and for options Wan has never
    published.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype}: need one of {', '.join(DTYPES)}")
    if "num_attention_heads" in config:
        return _diffusers(config, dtype)
    if "model_type" in config and "dim" in config:
        return _native(config, dtype, has_clip)
    raise ValueError(
        f"a config of {config.get('_class_name', 'no class')}: need that of a WanTransformer3DModel "
        "(diffusers) or of a WanModel (Wan's own)"
    )


def _diffusers(config: dict[str, Any], dtype: DType) -> DiTConfig:
    _check(config, "WanTransformer3DModel", DIFFUSERS_KEYS)
    num_heads, head_dim = config["num_attention_heads"], config["attention_head_dim"]
    image_width, positions = config.get("image_dim"), config.get("pos_embed_seq_len")
    if config.get("added_kv_proj_dim") != (None if image_width is None else num_heads * head_dim):
        raise ValueError(
            f"added_kv_proj_dim={config.get('added_kv_proj_dim')} with image_dim={image_width}: need the "
            f"model's width {num_heads * head_dim} with an image and null without"
        )
    return _made(
        dtype,
        in_channels=config["in_channels"],
        out_channels=config["out_channels"] or config["in_channels"],
        width=num_heads * head_dim,
        num_heads=num_heads,
        num_layers=config["num_layers"],
        ffn_width=config["ffn_dim"],
        text_width=config["text_dim"],
        num_frequencies=config["freq_dim"],
        eps=config["eps"],
        image_width=image_width,
        image_tokens=(positions or CLIP_TOKENS) if image_width is not None else 0,
        image_positions=image_width is not None and bool(positions),
    )


def _native(config: dict[str, Any], dtype: DType, has_clip: bool | None) -> DiTConfig:
    _check(config, "WanModel", NATIVE_KEYS)
    kind = config["model_type"]
    if kind not in NATIVE_KINDS:
        raise ValueError(f"model_type={kind!r}: need one of {', '.join(NATIVE_KINDS)}")
    has_image = kind == "flf2v" or (kind == "i2v" and has_clip is not False)
    is_pair = kind == "flf2v"
    return _made(
        dtype,
        in_channels=config["in_dim"],
        out_channels=config["out_dim"],
        width=config["dim"],
        num_heads=config["num_heads"],
        num_layers=config["num_layers"],
        ffn_width=config["ffn_dim"],
        text_width=config.get("text_dim", TEXT_WIDTH),
        num_frequencies=config["freq_dim"],
        eps=config["eps"],
        image_width=config.get("image_dim", CLIP_WIDTH) if has_image else None,
        image_tokens=CLIP_TOKENS * (2 if is_pair else 1) if has_image else 0,
        image_positions=is_pair,
    )


def _check(config: dict[str, Any], kind: str, keys: tuple[str, ...]) -> None:
    """ValueError for a config of another class, without a key, or with an option that no Wan model has."""
    found = config.get("_class_name", kind)
    if found != kind:
        raise ValueError(f"a config of {found}: need that of a {kind}")
    missing = [key for key in keys if key not in config]
    if missing:
        raise ValueError(f"a config of {kind} without {', '.join(missing)}: get config.json again")
    allowed: dict[str, tuple[Any, ...]] = {
        "patch_size": (PATCH,),
        "cross_attn_norm": (True,),
        "qk_norm": (True, "rms_norm_across_heads"),
        "window_size": ((-1, -1),),
    }
    for key, values in allowed.items():
        value = config.get(key, values[0])
        value = tuple(value) if isinstance(value, list) else value
        if value not in values:
            raise ValueError(f"{key}={value}: vidgen has Wan's {' or '.join(map(str, values))} only")


def _made(dtype: DType, *, in_channels: int, out_channels: int, **sizes: Any) -> DiTConfig:
    if in_channels < out_channels:
        raise ValueError(f"{in_channels} channels in and {out_channels} out: need no more out than in")
    return DiTConfig(
        latent_channels=out_channels,
        condition_channels=in_channels - out_channels,
        patch=PATCH[1:],
        dtype=dtype,
        **sizes,
    )
