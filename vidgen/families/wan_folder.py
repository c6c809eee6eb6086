"""Where the parts of a Wan checkpoint lie: diffusers' folders, or the original repository's files.

Sources: github.com/Wan-Video/Wan2.1 and Wan2.2, huggingface.co/Wan-AI, for names; sizes are in config files.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from vidgen.conditioning.clip import ClipSource, clip_source
from vidgen.conditioning.umt5 import TextSource, text_source

Format = Literal["diffusers", "native"]
Kind = Literal["t2v", "i2v", "flf2v", "ti2v"]
NATIVE_CODECS = ("Wan2.1_VAE.pth", "Wan2.2_VAE.pth")


@dataclass(frozen=True, kw_only=True)
class WanFolder:
    """A checkpoint's parts; plain data. `transformers` are folders with config.json, noisier expert first."""

    root: Path
    format: Format
    kind: Kind
    transformers: tuple[Path, ...]
    codec: Path
    text: TextSource
    image: ClipSource | None
    boundary: float | None
    scheduler: dict[str, Any] | None

    def configs(self) -> list[dict[str, Any]]:
        """The transformers' config files."""
        return [read_json(folder / "config.json") for folder in self.transformers]

    def files(self) -> list[Path]:
        """All that decides a frame, for fingerprints."""
        parts = [*self.transformers, self.codec, self.text.weights, self.text.tokenizer]
        if self.image is not None:
            parts.append(self.image.weights)
        found = [self.root / "model_index.json"]
        for part in parts:
            found += sorted(part.glob("*")) if part.is_dir() else [part]
        return [path for path in found if path.is_file()]


def read_folder(root: Path) -> WanFolder:
    """The parts of a checkpoint. ValueError in one line for a folder that is none, or lacks a part."""
    if (root / "model_index.json").exists():
        return _diffusers(root)
    if (root / "high_noise_model").is_dir() or (root / "config.json").exists():
        return _native(root)
    raise ValueError(
        f"model={root}: no checkpoint of Wan here; need model_index.json (diffusers), or config.json or "
        "high_noise_model/ (Wan's own)"
    )


def read_json(path: Path) -> dict[str, Any]:
    """A config file. ValueError in one line when it cannot be read."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}; the checkpoint is not whole") from error
    except ValueError as error:
        raise ValueError(f"{path}: no JSON ({error}); get the file again") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: need a mapping of settings; get the file again")
    return found


def _diffusers(root: Path) -> WanFolder:
    index = read_json(root / "model_index.json")
    pipeline = str(index.get("_class_name"))
    if pipeline not in ("WanPipeline", "WanImageToVideoPipeline"):
        raise ValueError(
            f"model={root}: a checkpoint of {pipeline}; need WanPipeline or WanImageToVideoPipeline"
        )

    def has(part: str) -> bool:
        return (index.get(part) or [None])[0] is not None

    transformers = [root / part for part in ("transformer", "transformer_2") if has(part)]
    pins_frames = bool(index.get("expand_timesteps"))  # a known first frame is clean, at level 0
    config = read_json(_there(transformers[0], root) / "config.json") if transformers else {}
    kind: Kind = "ti2v" if pins_frames else "i2v" if pipeline == "WanImageToVideoPipeline" else "t2v"
    if config.get("pos_embed_seq_len"):
        kind = "flf2v"
    return WanFolder(
        root=root,
        format="diffusers",
        kind=kind,
        transformers=tuple(_there(folder, root) for folder in transformers),
        codec=_there(root / "vae", root),
        text=text_source(root),
        image=clip_source(root) if has("image_encoder") else None,
        boundary=index.get("boundary_ratio") if len(transformers) > 1 else None,
        scheduler=read_json(root / "scheduler" / "scheduler_config.json"),
    )


def _native(root: Path) -> WanFolder:
    experts = [root / "high_noise_model", root / "low_noise_model"]
    transformers = [_there(expert, root) for expert in experts] if experts[0].is_dir() else [root]
    config = read_json(transformers[0] / "config.json")
    kinds: dict[str, Kind] = {"t2v": "t2v", "i2v": "i2v", "flf2v": "flf2v", "ti2v": "ti2v"}
    given = str(config.get("model_type"))
    if given not in kinds:
        raise ValueError(
            f"{transformers[0] / 'config.json'}: model_type={given!r}; vidgen renders {', '.join(kinds)}"
        )
    codecs = [root / name for name in NATIVE_CODECS if (root / name).exists()]
    if not codecs:
        raise ValueError(f"model={root}: has no {' or '.join(NATIVE_CODECS)}; the checkpoint is not whole")
    has_clip = len(transformers) == 1 and kinds[given] in ("i2v", "flf2v")
    is_text = kinds[given] == "t2v"
    return WanFolder(
        root=root,
        format="native",
        kind=kinds[given],
        transformers=tuple(transformers),
        codec=codecs[0],
        text=text_source(root),
        image=clip_source(root) if has_clip else None,
        boundary=(0.875 if is_text else 0.9) if len(transformers) > 1 else None,
        scheduler=None,
    )


def _there(path: Path, root: Path) -> Path:
    """The path. ValueError when there is nothing."""
    if not path.exists():
        raise ValueError(f"model={root}: has no {path.relative_to(root)}; the checkpoint is not whole")
    return path
