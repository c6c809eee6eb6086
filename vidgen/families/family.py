"""What the engine needs of a kind of checkpoint: its parts, how they are read, how they are best used."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vidgen.codec.protocol import Codec, CodecSizes
from vidgen.denoise.given import Given
from vidgen.denoise.multistep import SolverName
from vidgen.denoise.solver import Solver
from vidgen.model.dit import DiT
from vidgen.model.weights import Weights
from vidgen.types import Recommended

Frames = NDArray[np.uint8]  # [F, H, W, 3], RGB
LoadDecode = Callable[[Tensor | None], Callable[[Tensor], Frames]]


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """What a job begins with, at its own size: uint8 [F, H, W, 3]."""

    first: Frames | None = None  # frames that the video begins with: an image, or the end of a clip
    last: Frames | None = None  # the picture that it ends with


class Family(Protocol):
    """One checkpoint. Its DiTs lie on the meta device until `load_dits`."""

    name: str
    dits: tuple[DiT, ...]  # the experts in the order of their steps; mostly one
    sizes: CodecSizes
    recommended: Recommended
    boundary: float | None  # the noise level below which the second expert works

    def weights(self) -> tuple[Weights, ...]:
        """Where ranks read the DiTs' tensors."""
        ...

    def load_dits(self, device: str) -> None:
        """Read all weights of the DiTs."""
        ...

    def encode_texts(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Text [1, N, T] of each prompt. ValueError for one that cannot be used."""
        ...

    def give(self, pictures: Pictures, num_latent_frames: int) -> Given:
        """What the model gets of pictures. ValueError when it takes none, or lacks one that it needs."""
        ...

    def make_solver(
        self, name: SolverName | None, num_steps: int, shift: float
    ) -> tuple[Solver, list[float]]:
        """A solver and the noise levels that the model sees; by default the checkpoint's own."""
        ...

    def codec(self) -> Codec:
        """The codec, loaded at the first call."""
        ...

    def load_decode(self) -> LoadDecode:
        """What a process of its own makes a decoder of; plain data. It takes the latents to warm up with."""
        ...

    @property
    def warm_up_frames(self) -> int:
        """See Codec.warm_up_frames; known without the codec."""
        ...

    def decode_bytes(self, height: int, width: int) -> int:
        """What decoding holds at once, of frames of this size; nothing is loaded for it."""
        ...

    def warn(self, prompts: Sequence[str]) -> None:
        """Warnings for what the model will not understand."""
        ...

    def facts(self) -> dict[str, Any]:
        """What `vidgen models inspect` tells: family, parts, parameters, bytes."""
        ...

    def sha256(self) -> str:
        """What a job remembers of its model."""
        ...


def as_frames(pixels: Tensor) -> Frames:
    """Frames [F, H, W, 3] of one video's pixels [1, 3, F, H, W] in [-1, 1]."""
    return ((pixels[0].float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 3, 0).cpu().numpy()


def as_pixels(frames: Frames) -> Tensor:
    """[1, 3, F, H, W] in [-1, 1] of uint8 [F, H, W, 3]."""
    return torch.from_numpy(frames.copy()).permute(3, 0, 1, 2).unsqueeze(0).float() / 127.5 - 1


class Decoding:
    """Turns the latents of one block after the other into frames."""

    def __init__(self, codec: Codec, warm_up: Tensor | None = None) -> None:
        self._stream = codec.stream()
        if warm_up is not None:
            self._stream.warm_up(warm_up)

    def __call__(self, latents_BCFYX: Tensor) -> Frames:
        """Frames [F, H, W, 3] of the next block's clean latents."""
        return as_frames(self._stream.decode(latents_BCFYX.cpu()))
