"""What a step cache keeps of a block between its steps; it travels in checkpoints."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

Outputs = tuple[Tensor, ...]  # the model's velocities [1, C, F, Y, X] of one step, one per branch of guidance


@dataclass(frozen=True, slots=True)
class Kept:
    """Of the steps that ran, newest first; and how far the block has gone on without since."""

    steps: tuple[int, ...] = ()
    outputs: tuple[Outputs, ...] = ()
    signals: tuple[Tensor, ...] = ()  # what the method looks at: of those steps, or of the last step
    skips: int = 0  # in a row
    drift: float = 0.0  # since the last step that ran, as the method counts it

    def each(self, change: Callable[[Tensor], Tensor]) -> "Kept":
        """The same with every tensor changed."""
        return replace(
            self,
            outputs=tuple(tuple(change(tensor) for tensor in outputs) for outputs in self.outputs),
            signals=tuple(change(tensor) for tensor in self.signals),
        )


NOTHING_KEPT = Kept()


def forecast(values: tuple[Tensor, ...], at: tuple[float, ...], to: float, order: int) -> Tensor:
    """The value at `to` of the polynomial through the newest order + 1 of those known, or through all.

    `values` come newest first, at the places `at`. Order 0 says the newest again, order 1 goes on in a line.
    Newton's divided differences: TaylorSeer's finite differences (arXiv 2503.06923) for any spacing.
    """
    values, at = values[: order + 1], at[: order + 1]
    differences, total, reach = list(values), values[0], 1.0
    for degree in range(1, len(values)):
        differences = [
            (differences[i] - differences[i + 1]) / (at[i] - at[i + degree])
            for i in range(len(differences) - 1)
        ]
        reach *= to - at[degree - 1]
        total = total + reach * differences[0]
    return total
