"""What step caches must know of a model, measured on exact videos: see vidgen/stepcache/calibration.py."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from torch import Tensor

from vidgen.denoise.loop import Task, denoise
from vidgen.stepcache.cache import Decision, StepCache
from vidgen.stepcache.kept import Kept
from vidgen.stepcache.methods import Tea, relative_change
from vidgen.stepcache.settings import CacheSettings

DEGREE = 2  # of the polynomial; TeaCache's are of degree 4, of many more samples


@dataclass(frozen=True, kw_only=True)
class Recorder(StepCache):
    """A step cache that skips nothing and remembers what it saw."""

    levels: list[float] = field(default_factory=list, compare=False)
    magnitudes: dict[float, list[float]] = field(default_factory=lambda: defaultdict(list), compare=False)
    changes: list[tuple[float, float]] = field(default_factory=list, compare=False)  # of input, of output

    def decide(
        self, kept: Kept, step: int, levels: Sequence[float], signal: Tensor | None, branches: int
    ) -> Decision:
        """To run the model."""
        self.levels[:] = levels
        return Decision(kept, signal)

    def after(self, decision: Decision, step: int, outputs: Sequence[Tensor]) -> Kept:
        """See StepCache; called for all steps but the last."""
        kept = decision.kept
        self.magnitudes[self.levels[step]].append(float(outputs[0].float().square().mean().sqrt()))
        if kept.steps and decision.signal is not None:
            self.changes.append(
                (
                    relative_change(decision.signal, kept.signals[0]),
                    relative_change(outputs[0], kept.outputs[0][0]),
                )
            )
        return super().after(decision, step, outputs)


def calibrate(tasks: Iterable[Task]) -> dict[str, Any]:
    """The root mean square of velocities by noise level, and the polynomial from input to output changes.

    Means over exact runs of the tasks, of one model; the prompt's branch speaks for both.
    """
    recorder = Recorder(settings=CacheSettings(method="tea").resolved(), method=Tea())
    for task in tasks:
        for _ in denoise(replace(task, cache=recorder)):
            pass
    inputs, outputs = np.array(recorder.changes).T
    means = {level: float(np.mean(found)) for level, found in recorder.magnitudes.items()}
    return {
        "magnitudes": [[level, round(means[level], 6)] for level in sorted(means, reverse=True)],
        "coefficients": [float(f"{number:.6g}") for number in np.polyfit(inputs, outputs, DEGREE)],
    }
