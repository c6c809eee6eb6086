"""Why plans lost against the best one, a line for each class of them."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from vidgen.parallel.planner.plan import Planned

MUCH_WAITING = 0.15  # of a layer's time, more than the winner's
MUCH_WORK = 1.15  # times the winner's
LITTLE_USE = 0.85  # times the winner's


@dataclass(frozen=True, slots=True)
class Reason:
    """A class of plans, and why its best one is not the choice."""

    name: str
    text: str


def reasons(found: Sequence[Planned], choice: Planned) -> list[Reason]:
    """For every other way to share the choice's video, then for every other video."""
    same = [plan for plan in found if plan.scheme.label == choice.scheme.label]
    ways = [
        Reason(f"{kind} for the same video", why(plan, choice))
        for kind, plan in _best_of(same, lambda plan: plan.kind)
        if kind != choice.kind
    ]
    videos = [
        Reason(f"{label} by {plan.kind}", why(plan, choice))
        for label, plan in _best_of(found, lambda plan: plan.scheme.label)
        if label != choice.scheme.label
    ]
    return [*ways, *videos]


def why(plan: Planned, choice: Planned) -> str:
    """What a plan loses by, in figures."""
    if plan.does_not_fit is not None:
        return f"does not fit: {plan.does_not_fit}"
    slower = f"{plan.seconds / choice.seconds:.2f} times as long"
    causes = []
    if plan.waiting_share > choice.waiting_share + MUCH_WAITING:
        causes.append(f"{plan.waiting_share:.0%} of its layers' time is waiting for other lanes")
    if plan.flops > MUCH_WORK * choice.flops:
        causes.append(f"{plan.flops / choice.flops:.1f} times the work")
    if plan.utilisation < LITTLE_USE * choice.utilisation:
        causes.append(f"ranks have work for {plan.utilisation:.0%} of the time")
    return f"{slower}: {', '.join(causes)}" if causes else slower


def _best_of(found: Iterable[Planned], key: Callable[[Planned], str]) -> list[tuple[str, Planned]]:
    """The first plan of each class, in the order given: that of plans, the best first."""
    first: dict[str, Planned] = {}
    for plan in found:
        first.setdefault(key(plan), plan)
    return list(first.items())
