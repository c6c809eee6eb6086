"""Which steps of a block are skipped, and what stands for the model's output then."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from vidgen.model.conditioning import Conditioning
from vidgen.model.dit import DiT
from vidgen.stepcache.kept import Kept, Outputs, forecast
from vidgen.stepcache.methods import Clock, FirstBlock, Gated, Mag, Method, Tea
from vidgen.stepcache.region import mix
from vidgen.stepcache.settings import CacheSettings


@dataclass
class Tally:
    """Forwards so far, how many of them were skipped, and which steps were skipped how often.

    A forward of which half the layers or tokens are left out counts as half a one skipped.
    """

    forwards: int = 0
    skipped: float = 0
    skipped_at: Counter[int] = field(default_factory=Counter)  # in whole or in part

    def __call__(self, step: int, share: float) -> None:
        self.forwards += 1
        self.skipped += share
        self.skipped_at[step] += share > 0

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        steps = {str(step): count for step, count in sorted(self.skipped_at.items()) if count}
        return {"forwards": self.forwards, "skipped": round(self.skipped, 2), "skipped_at": steps}


@dataclass(frozen=True, slots=True)
class Decision:
    """Of one step of a block, before it is taken."""

    kept: Kept
    signal: Tensor | None
    drift: float = 0.0
    outputs: Outputs | None = None  # what stands for the model's; None: it is to be run
    active_FS: Tensor | None = None  # zeros, and ones for the tokens that are; None: all


@dataclass(frozen=True, kw_only=True)
class StepCache:
    """A task's step cache: pure but for its tally. The settings are resolved."""

    settings: CacheSettings
    method: Method
    tally: Tally = field(default_factory=Tally, compare=False)

    def look(self, model: DiT, latents_BCFYX: Tensor, conditioning: Conditioning) -> Tensor | None:
        """What the method wants to know of a step, of the block's own frames [1, C, F, Y, X]."""
        return self.method.look(model, latents_BCFYX, conditioning)

    def decide(
        self, kept: Kept, step: int, levels: Sequence[float], signal: Tensor | None, branches: int
    ) -> Decision:
        """Whether the step is skipped, and the outputs of so many branches if it is.

        `levels` are the noise levels of all steps, and the last one's end.
        """
        settings, num_steps = self.settings, len(levels) - 1
        assert settings.warm_up_steps is not None and settings.last_steps is not None
        assert settings.max_skips is not None and settings.order is not None
        is_early = step < settings.warm_up_steps or not kept.steps
        if is_early or step >= num_steps - settings.last_steps or kept.skips >= settings.max_skips:
            return Decision(kept, signal)
        drift = self.method.drift(kept, step, levels, signal)
        if settings.threshold is not None and not drift < settings.threshold:
            return Decision(kept, signal)
        at = tuple(levels[ran] for ran in kept.steps)
        outputs = tuple(
            forecast(tuple(outputs[branch] for outputs in kept.outputs), at, levels[step], settings.order)
            for branch in range(branches)
        )
        return Decision(kept, signal, drift, outputs)

    def mixed(self, decision: Decision, outputs: Sequence[Tensor], patch: tuple[int, int]) -> list[Tensor]:
        """The step's outputs, where only some tokens were run: of the others what was said last."""
        active_FS = decision.active_FS
        if active_FS is None:
            return list(outputs)
        pairs = zip(outputs, decision.kept.outputs[0], strict=True)
        return [mix(active_FS, new, old, patch) for new, old in pairs]

    def after(self, decision: Decision, step: int, outputs: Sequence[Tensor]) -> Kept:
        """What is kept of a block after a step, from the step's outputs."""
        if self.settings.skips_tokens:
            said = tuple(output.clone() for output in outputs)
            return Kept((step,), (said,), _left_out(decision))
        kept, signal = decision.kept, () if decision.signal is None else (decision.signal,)
        if decision.outputs is not None:
            signals = signal if self.method.looks_always else kept.signals
            return Kept(kept.steps, kept.outputs, signals, kept.skips + 1, decision.drift)
        count = (self.settings.order or 0) + 1
        return Kept(
            (step, *kept.steps)[:count],
            (tuple(output.clone() for output in outputs), *kept.outputs)[:count],  # they may be views
            signal if self.method.looks_always else (*signal, *kept.signals)[:count],
        )


def _left_out(decision: Decision) -> tuple[Tensor, ...]:
    """For how many steps each token [F, S] has not been run; nothing where all were."""
    if decision.active_FS is None:
        return ()
    idle_FS = 1 - decision.active_FS
    return ((decision.kept.signals[0] + 1) * idle_FS if decision.kept.signals else idle_FS,)


def make_cache(settings: CacheSettings) -> StepCache | None:
    """The cache that settings name, all that is left open filled in; None for "none".

    ValueError for `mag` without the magnitudes of a calibration.
    """
    if settings.method == "none":
        return None
    settings = settings.resolved()
    if settings.needs_calibration:
        raise ValueError(
            "cache=mag: nothing is known of this model's magnitudes; make a file with "
            "`vidgen measure calibration` and name it by calibration"
        )
    return StepCache(settings=settings, method=_method(settings))


def _method(settings: CacheSettings) -> Method:
    if settings.method == "tea":
        return Tea(coefficients=settings.coefficients) if settings.coefficients else Tea()
    if settings.method == "mag":
        assert settings.magnitudes is not None
        return Mag(magnitudes=settings.magnitudes)
    if settings.method == "gated_taylor":
        return Gated(order=settings.order or 0)
    return FirstBlock() if settings.method == "first_block" else Clock()
