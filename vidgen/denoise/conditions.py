"""What the model makes of noise levels and texts: a job has few of them, so each is made once."""

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor

from vidgen.model.conditioning import Conditioning
from vidgen.model.dit import DiT

# B batch, F latent frames, N text tokens, D width

LEVELS_KEPT = 1024  # rows of 7 times the model's width
TEXTS_KEPT = 16


class Conditions:
    """Keeps what a job's models made. A level is embedded by itself: its row depends on nothing else."""

    def __init__(self) -> None:
        self._levels: OrderedDict[tuple[int, float], tuple[Tensor, Tensor]] = OrderedDict()
        self._texts: OrderedDict[tuple[int, int], tuple[Tensor, Tensor]] = OrderedDict()
        self._placed: OrderedDict[tuple[Any, ...], tuple[tuple[Tensor, ...], tuple[Tensor, ...]]] = (
            OrderedDict()
        )
        self._models: dict[int, DiT] = {}  # kept, so that their ids stay their own

    def __reduce__(self) -> tuple[type["Conditions"], tuple[()]]:
        return Conditions, ()  # another process makes its own

    def of(
        self, model: DiT, levels: tuple[float, ...], text_BNT: Tensor, image_BMI: Tensor | None = None
    ) -> Conditioning:
        """For frames at these noise levels, the same in every branch of the batch; so is the image."""
        self._models[id(model)] = model
        rows = [self._level(model, level) for level in levels]
        batch = text_BNT.shape[0]
        return Conditioning(
            noise_BFD=torch.cat([row for row, _ in rows], dim=1).expand(batch, -1, -1),
            noise_BF6D=torch.cat([row for _, row in rows], dim=1).expand(batch, -1, -1, -1),
            text_BND=self._text(model, text_BNT, image_BMI),
        )

    def placed(self, texts: tuple[Tensor, ...], device: torch.device, *, stacked: bool) -> tuple[Tensor, ...]:
        """Texts [1, N, T] on a device, as they are or as one batch: the same tensors for the same texts."""
        key = (str(device), stacked, *(id(text) for text in texts))
        if key not in self._placed:
            moved = tuple(text.to(device) for text in texts)
            self._placed[key] = texts, (torch.cat(moved),) if stacked else moved
            if len(self._placed) > TEXTS_KEPT:
                self._placed.popitem(last=False)
        return self._placed[key][1]

    def _level(self, model: DiT, level: float) -> tuple[Tensor, Tensor]:
        key = id(model), level
        if key not in self._levels:
            self._levels[key] = model.condition_noise(torch.tensor([[level]], device=model.device))
            if len(self._levels) > LEVELS_KEPT:
                self._levels.popitem(last=False)
        return self._levels[key]

    def _text(self, model: DiT, text_BNT: Tensor, image_BMI: Tensor | None) -> Tensor:
        key = id(model), id(text_BNT)
        kept, projected = self._texts.get(key, (None, None))
        if kept is not text_BNT or projected is None:
            if image_BMI is not None:
                image_BMI = image_BMI.to(text_BNT.device).expand(text_BNT.shape[0], -1, -1)
            projected = model.embed_text(text_BNT, image_BMI)
            self._texts[key] = text_BNT, projected  # the text too: its id must stay its own
            if len(self._texts) > TEXTS_KEPT:
                self._texts.popitem(last=False)
        return projected
