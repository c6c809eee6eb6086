"""The built-in model's family, as the engine sees it."""

import hashlib
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vidgen.builtin import FAMILY, load_dit, load_small
from vidgen.codec.protocol import Codec
from vidgen.denoise.given import NOTHING, Given
from vidgen.denoise.multistep import SolverName, make_solver
from vidgen.denoise.solver import Solver
from vidgen.families.family import Decoding, LoadDecode, Pictures, as_pixels
from vidgen.model.loading import PartWeights
from vidgen.model.weights import Weights
from vidgen.sections import LoraConfig


class SmallFamily:
    """See Family. Everything but the DiT is small enough to be there at once."""

    boundary: float | None = None

    def __init__(self, name: str, checkpoint: Path, dtype: str | None, loras: Sequence[LoraConfig]) -> None:
        if dtype not in (None, "fp32"):
            raise ValueError(f"dtype={dtype}: {name} runs in fp32; leave it out")
        if loras:
            raise ValueError(f"loras: {name} takes none; leave them out")
        self.name, self.checkpoint = name, checkpoint
        self.model = load_small(checkpoint, with_dit=False)
        self.recommended = self.model.recommended
        self.dits = (self.model.dit,)
        self.sizes = self.model.codec.sizes

    def weights(self) -> tuple[Weights, ...]:
        """See Family.weights."""
        return (PartWeights(self.checkpoint.absolute(), "dit"),)

    def load_dits(self, device: str) -> None:
        """See Family.load_dits."""
        load_dit(self.checkpoint, self.model.dit, device)

    @torch.inference_mode()
    def encode_texts(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """See Family.encode_texts."""
        text = self.model.text
        return {prompt: text(text.ids([prompt])) for prompt in prompts}

    @torch.inference_mode()
    def give(self, pictures: Pictures, num_latent_frames: int) -> Given:
        """Known frames are pinned: the model was trained with a noise level of its own for every frame."""
        if pictures.last is not None:
            raise ValueError("input.last_image: this model takes no last frame; leave it out")
        if pictures.first is None:
            return NOTHING
        stride = self.sizes.temporal_stride
        pixels = as_pixels(pictures.first)
        missing = -pixels.shape[2] % stride  # a single image stands still for a chunk of frames
        first = pixels[:, :, :1].expand(-1, -1, missing, -1, -1)
        latents = self.model.codec.encode(torch.cat([first, pixels], dim=2))
        return Given(pinned_CFYX=latents[0, :, :num_latent_frames].clone())

    def make_solver(
        self, name: SolverName | None, num_steps: int, shift: float
    ) -> tuple[Solver, list[float]]:
        """See Family.make_solver."""
        return make_solver(name or "euler", num_steps, shift, None)

    def codec(self) -> Codec:
        """See Family.codec."""
        return self.model.codec

    def load_decode(self) -> LoadDecode:
        """See Family.load_decode."""
        return partial(_load_decode, self.checkpoint.absolute())

    @property
    def warm_up_frames(self) -> int:
        """See Family.warm_up_frames."""
        return self.model.codec.warm_up_frames

    def decode_bytes(self, height: int, width: int) -> int:
        """See Family.decode_bytes: a few copies of the pixels, which every estimate has."""
        return 0

    def warn(self, prompts: Sequence[str]) -> None:
        """Warn of words that the model does not know."""
        for prompt in dict.fromkeys(prompts):
            for word, nearest in self.model.text.tokenize(prompt).unknown.items():
                advice = f"nearest known: {', '.join(nearest)}" if nearest else "no known word is near"
                warnings.warn(f"the model does not know {word!r} and ignores it; {advice}", stacklevel=4)

    def facts(self) -> dict[str, Any]:
        """See Family.facts."""
        parts = {name: sum(p.numel() for p in part.parameters()) for name, part in self.model.parts().items()}
        return {"family": FAMILY, "parameters": parts, "bytes": self.checkpoint.stat().st_size}

    def sha256(self) -> str:
        """See Family.sha256."""
        return hashlib.sha256(self.checkpoint.read_bytes()).hexdigest()


def _load_decode(checkpoint: Path, warm_up: Tensor | None) -> Decoding:
    return Decoding(load_small(checkpoint, with_dit=False).codec, warm_up)
