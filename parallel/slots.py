"""The least time a queue of blocks can take on a row of stages, counted in slots.

A slot is the time in which one stage handles one item: a run of the model for one block, one step and, with
split guidance, one branch. Items enter the first stage in the timetable's order, one a slot.
"""

from vidgen.denoise.timetable import Timetable
from vidgen.types import ContextMode


def tick_bound(timetable: Timetable, tick: int, num_stages: int, runs_per_forward: int) -> int:
    """Slots between the start of a tick and that of the next one, at the least.

    A block's next step needs its last one back: all its runs, through all stages. With recomputed context it
    also needs that of the block before it, which entered one forward later.
    """
    live, runs = timetable.live(tick), runs_per_forward
    waits_for_neighbour = (
        timetable.mode == ContextMode.RECOMPUTE and timetable.context_frames > 0 and len(live) > 1
    )
    latency = num_stages + runs - 1 + (runs if waits_for_neighbour else 0)
    return max(len(live) * runs, latency)


def slot_bound(timetable: Timetable, num_stages: int, runs_per_forward: int, first_tick: int = 0) -> int:
    """Slots of all ticks from `first_tick` on: max(live, W + 1) each, max(live, W) with cached context."""
    ticks = range(first_tick, timetable.num_ticks)
    return sum(tick_bound(timetable, tick, num_stages, runs_per_forward) for tick in ticks)
