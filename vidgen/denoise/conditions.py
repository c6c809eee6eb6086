"""What the model makes of noise levels and texts: a job has few of them, so each is made once."""

from collections import OrderedDict

import torch
from torch import Tensor

from vidgen.model.dit import Conditioning, DiT

# B batch, F latent frames, N text tokens, D width

LEVELS_KEPT = 1024  # rows of 7 times the model's width
TEXTS_KEPT = 16


class Conditions:
    """Keeps what one model made. A level is embedded by itself, so a frame's row depends on nothing else."""

    def __init__(self) -> None:
        self._model: DiT | None = None
        self._levels: OrderedDict[float, tuple[Tensor, Tensor]] = OrderedDict()
        self._texts: OrderedDict[int, tuple[Tensor, Tensor]] = OrderedDict()

    def __reduce__(self) -> tuple[type["Conditions"], tuple[()]]:
        return Conditions, ()  # another process makes its own

    def of(self, model: DiT, levels: tuple[float, ...], text_BNT: Tensor) -> Conditioning:
        """For frames at these noise levels, the same in every branch of the batch."""
        if model is not self._model:
            self._model, self._levels, self._texts = model, OrderedDict(), OrderedDict()
        rows = [self._level(model, level) for level in levels]
        batch = text_BNT.shape[0]
        return Conditioning(
            noise_BFD=torch.cat([row for row, _ in rows], dim=1).expand(batch, -1, -1),
            noise_BF6D=torch.cat([row for _, row in rows], dim=1).expand(batch, -1, -1, -1),
            text_BND=self._text(model, text_BNT),
        )

    def _level(self, model: DiT, level: float) -> tuple[Tensor, Tensor]:
        if level not in self._levels:
            self._levels[level] = model.condition_noise(torch.tensor([[level]], device=model.device))
            if len(self._levels) > LEVELS_KEPT:
                self._levels.popitem(last=False)
        return self._levels[level]

    def _text(self, model: DiT, text_BNT: Tensor) -> Tensor:
        kept, projected = self._texts.get(id(text_BNT), (None, None))
        if kept is not text_BNT or projected is None:
            projected = model.text_in(text_BNT)
            self._texts[id(text_BNT)] = text_BNT, projected  # the text too: its id must stay its own
            if len(self._texts) > TEXTS_KEPT:
                self._texts.popitem(last=False)
        return projected
