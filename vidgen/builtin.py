"""The built-in model's family: a DiT, the DCT codec and the word encoder in one small checkpoint."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vidgen.codec.dct import DctCodec, DctConfig
from vidgen.conditioning.text import WordEncoder, WordEncoderConfig
from vidgen.model.dit import DiT, DiTConfig
from vidgen.model.loading import load_part, read_settings, save_parts
from vidgen.types import ContextMode, NoiseKind, Recommended

FAMILY = "vidgen-small"
BUILTIN_PATH = Path(__file__).parent / "assets" / "builtin.safetensors"


@dataclass(slots=True)
class SmallModel:
    """The three parts of the family and how they are best used."""

    dit: DiT
    codec: DctCodec
    text: WordEncoder
    recommended: Recommended = field(default_factory=Recommended)
    training: dict[str, Any] = field(default_factory=dict)

    def parts(self) -> dict[str, nn.Module]:
        return {"dit": self.dit, "codec": self.codec, "text": self.text}

    def save(self, path: Path, dtype: torch.dtype = torch.float16) -> None:
        """One safetensors file with everything that `load_small` needs."""
        settings = {
            "family": FAMILY,
            "dit": asdict(self.dit.config),
            "codec": asdict(self.codec.config),
            "text": asdict(self.text.config),
            "recommended": asdict(self.recommended),
            "training": self.training,
        }
        save_parts(path, self.parts(), settings, dtype)


def load_small(path: Path = BUILTIN_PATH, *, with_dit: bool = True) -> SmallModel:
    """The model in a checkpoint of this family, in fp32 and eval mode. ValueError when it is another file.

    Without its DiT, that lies on the meta device: it has sizes and no memory, see `load_dit`.
    """
    settings = read_settings(path)
    if settings.get("family") != FAMILY:
        raise ValueError(f"{path}: family {settings.get('family')!r}, need {FAMILY!r}")
    try:
        with torch.device("meta"):
            dit = DiT(DiTConfig(**_with_tuples(settings["dit"])))
        model = SmallModel(
            dit=dit,
            codec=DctCodec(DctConfig(**_with_tuples(settings["codec"]))),
            text=WordEncoder(WordEncoderConfig(**_with_tuples(settings["text"]))),
            recommended=_recommended(settings["recommended"]),
            training=settings["training"],
        )
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(f"{path}: settings of another version of vidgen ({error}); train it anew") from error
    for name, module in model.parts().items():
        module.eval().requires_grad_(False)
        if name != "dit":
            load_part(path, name, module)
    if with_dit:
        load_dit(path, model.dit)
    return model


def load_dit(path: Path, dit: DiT, device: torch.device | str = "cpu") -> None:
    """Give a DiT on the meta device memory on another one, and its weights."""
    load_part(path, "dit", dit.to_empty(device=device))


def _recommended(settings: dict[str, Any]) -> Recommended:
    enums = {"context_mode": ContextMode(settings["context_mode"]), "noise": NoiseKind(settings["noise"])}
    return Recommended(**{**settings, **enums})


def _with_tuples(settings: dict[str, Any]) -> dict[str, Any]:
    """JSON knows no tuples; frozen configs hold nothing else."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()}
