"""How much ranks of one machine slow each other down, from short renders on one rank and on several.

Ranks share cores, caches and memory with each other, with the decoder, the driver and Ray. What each of them
costs the others is not measured apart: how much longer a render takes than its parts is.
"""

import statistics
from collections.abc import Sequence
from dataclasses import replace

from vidgen.bench.plans import PlanCase, in_own_process, predict
from vidgen.parallel.planner.hardware import Hardware

FRAMES, STEPS = 129, 12
QUEUE = {"timetable": "dualparal", "block_frames": 4, "context_frames": 2, "context_mode": "recompute"}
MOST_RANKS = 4
TURNS = 2


def measured_busy(hardware: Hardware, cores: int) -> tuple[tuple[float, float], ...]:
    """(ranks at work, how much slower each is) on a machine whose other rates are known.

    A render on several ranks is held against one process, both against what they take of all but each other;
    they take turns. Ranks beyond the cores share them.
    """
    counts = sorted({min(2, MOST_RANKS), min(cores, MOST_RANKS)} - {1})
    cases = [PlanCase(ranks=count, queue=QUEUE) for count in (1, *counts)]
    alone = replace(hardware, busy=())
    parts_s = [float(predict(alone, case, FRAMES, STEPS)["seconds"]) for case in cases]
    readings: Sequence[list[float]] = [[] for _ in cases]
    for _ in range(TURNS):
        for case, taken in zip(cases, readings, strict=True):
            taken.append(in_own_process(case, FRAMES, STEPS)["seconds"])
    ratios = [statistics.median(taken) / part_s for taken, part_s in zip(readings, parts_s, strict=True)]
    rising = [(1.0, 1.0)]
    for count, ratio in zip(counts, ratios[1:], strict=True):
        rising.append((float(count), max(rising[-1][1], ratio / ratios[0])))
    count, factor = rising[-1]
    return (*rising, (2 * count, 2 * factor))
