"""The least time a queue of blocks can take on a row of stages, counted in slots.

A slot is the time in which one stage handles one item: a run of the model for one block, one step and, with
split guidance, one branch. Items enter the first stage in the timetable's order, one a slot at most. In the
middle of a long queue a tick takes max(live, W + 1) of them, or max(live, W) with cached context.
"""

from collections.abc import Callable

from vidgen.denoise.timetable import Timetable


def least_slots(
    timetable: Timetable,
    num_stages: int,
    runs_per_forward: int | Callable[[int], int],
    *,
    first_tick: int = 0,
    max_in_flight: int | None = None,
) -> int:
    """Slots of all ticks from `first_tick` on if every item starts as soon as it may.

    That is a slot after the item before it, after the versions it reads have come back through all stages,
    and, if `max_in_flight` is given, after there is room. `runs_per_forward` may depend on the step.
    """
    starts: list[int] = []
    came_back: dict[tuple[int, int], int] = {}  # (block, steps done) -> slot
    for tick in timetable.ticks(first_tick):
        for forward in tick:
            reads = [(forward.block, forward.step)]
            if forward.before_latents is not None:
                reads.append((forward.before_latents.block, forward.before_latents.step))
            earliest = max(came_back.get(read, 0) for read in reads)
            runs = runs_per_forward
            for _ in range(runs if isinstance(runs, int) else runs(forward.step)):
                if max_in_flight is not None and len(starts) >= max_in_flight:
                    earliest = max(earliest, starts[-max_in_flight] + num_stages - 1)
                starts.append(1 + max(earliest, starts[-1] if starts else 0))
            came_back[forward.block, forward.step + 1] = starts[-1] + num_stages - 1
    return starts[-1] + num_stages - 1 if starts else 0
