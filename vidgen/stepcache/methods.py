"""How far a block has drifted since its last step that ran: what the step caches differ in.

All that they look at is the block's own frames and the prompt, whole and on the first stage, so that every
rank comes to the same answer whatever ran where.
"""

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from vidgen.kernels.modulate.api import norm_modulate
from vidgen.model.conditioning import Conditioning
from vidgen.model.context import Context
from vidgen.model.dit import DiT
from vidgen.stepcache.kept import Kept, forecast
from vidgen.stepcache.settings import Curve

# B batch, C channels, F latent frames, S tokens per frame, D width


class Method(Protocol):
    """Looks at a step before it runs, and says how much has changed."""

    @property
    def looks_always(self) -> bool:
        """Whether a signal is compared with that of the step before, run or not; else of those that ran."""
        ...

    def look(self, model: DiT, latents_BCFYX: Tensor, conditioning: Conditioning) -> Tensor | None:
        """What is compared, of the block's own frames and the prompt's branch; None: nothing."""
        ...

    def drift(self, kept: Kept, step: int, levels: Sequence[float], signal: Tensor | None) -> float:
        """Since the last step that ran; 0 is none at all."""
        ...


@dataclass(frozen=True, kw_only=True)
class Tea:
    """The change of the first layer's modulated input, summed up from step to step.

    Source: TeaCache (arXiv 2411.19108). The polynomial, per checkpoint, makes of the input's change the
    output's; (1, 0) is the input's own.
    """

    coefficients: tuple[float, ...] = (1.0, 0.0)
    looks_always: bool = field(default=True, init=False)

    def look(self, model: DiT, latents_BCFYX: Tensor, conditioning: Conditioning) -> Tensor:
        """See Method."""
        first = model.layers[0]
        shift, scale = (first.modulation + conditioning.noise_BF6D.float()).unsqueeze(3).unbind(2)[:2]  # pyright: ignore
        return norm_modulate(model.embed(latents_BCFYX), scale, shift, model.config.eps)

    def drift(self, kept: Kept, step: int, levels: Sequence[float], signal: Tensor | None) -> float:
        """See Method."""
        assert signal is not None
        change, estimate = relative_change(signal, kept.signals[0]), 0.0
        for coefficient in self.coefficients:
            estimate = estimate * change + coefficient
        return kept.drift + abs(estimate)


@dataclass(frozen=True, kw_only=True)
class FirstBlock:
    """The change of what the first layer adds, against the last step that ran.

    Source: FBCache (ParaAttention) and DBCache (cache-dit). Here the layer is run on the block's own frames
    alone, without the frames around it, so that its part in attention may lie on any rank.
    """

    looks_always: bool = field(default=False, init=False)

    def look(self, model: DiT, latents_BCFYX: Tensor, conditioning: Conditioning) -> Tensor:
        """See Method."""
        x_BFSD, after_BFSD = run_first_layer(model, latents_BCFYX, conditioning)
        return after_BFSD - x_BFSD

    def drift(self, kept: Kept, step: int, levels: Sequence[float], signal: Tensor | None) -> float:
        """See Method."""
        assert signal is not None
        return relative_change(signal, kept.signals[0])


@dataclass(frozen=True, kw_only=True)
class Gated:
    """How wrong a forecast of the first layer is, taken for how wrong the forecast of the output would be.

    Source: confidence-gated Taylor. The layer is run as by FirstBlock; its forecast is of the output's order.
    """

    order: int
    looks_always: bool = field(default=False, init=False)

    def look(self, model: DiT, latents_BCFYX: Tensor, conditioning: Conditioning) -> Tensor:
        """See Method."""
        return run_first_layer(model, latents_BCFYX, conditioning)[1]

    def drift(self, kept: Kept, step: int, levels: Sequence[float], signal: Tensor | None) -> float:
        """See Method."""
        assert signal is not None
        at = tuple(levels[ran] for ran in kept.steps)
        return relative_change(forecast(kept.signals, at, levels[step], self.order), signal)


@dataclass(frozen=True, kw_only=True)
class Mag:
    """How the output's magnitude is known to change with the noise level, summed up from step to step.

    Source: MagCache (arXiv 2506.09045). The magnitudes are measured once per model, as a curve over noise
    levels, so that they hold for any number of steps.
    """

    magnitudes: Curve
    looks_always: bool = field(default=False, init=False)

    def look(self, model: DiT, latents_BCFYX: Tensor, conditioning: Conditioning) -> None:
        """Nothing: the noise levels say all."""

    def drift(self, kept: Kept, step: int, levels: Sequence[float], signal: Tensor | None) -> float:
        """See Method."""
        now, then = (magnitude_at(self.magnitudes, levels[at]) for at in (step, kept.steps[0]))
        return kept.drift + abs(1 - now / then)


@dataclass(frozen=True, kw_only=True)
class Clock:
    """No drift: steps are skipped by the clock, as many in a row as may be. Source: TaylorSeer's interval."""

    looks_always: bool = field(default=False, init=False)

    def look(self, model: DiT, latents_BCFYX: Tensor, conditioning: Conditioning) -> None:
        """Nothing."""

    def drift(self, kept: Kept, step: int, levels: Sequence[float], signal: Tensor | None) -> float:
        """None."""
        return 0.0


def run_first_layer(model: DiT, latents_BCFYX: Tensor, conditioning: Conditioning) -> tuple[Tensor, Tensor]:
    """(tokens [B, F, S, D] before, after) the first layer, of these frames alone."""
    grid, x_BFSD = model.token_grid(latents_BCFYX.shape), model.embed(latents_BCFYX)
    return x_BFSD, model.run_layers(x_BFSD, conditioning, grid, Context(), lends=False, num_layers=1)[0]


def relative_change(now: Tensor, then: Tensor) -> float:
    """Mean absolute change over the mean of what was; infinite when that was zero."""
    change, size = (now.float() - then.float()).abs().mean(), then.float().abs().mean()
    return float(change / size) if size else math.inf


def magnitude_at(curve: Curve, level: float) -> float:
    """On the lines between the curve's points, and its end's beyond them."""
    ascending = curve[::-1]
    index = bisect_left(ascending, (level, -math.inf))
    if index in (0, len(ascending)):
        return ascending[max(0, index - 1)][1]
    (low, below), (high, above) = ascending[index - 1 : index + 1]
    return below + (above - below) * (level - low) / (high - low)
