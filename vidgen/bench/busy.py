"""What ranks of one machine cost, and cost each other: from short renders on one rank and on several.

Ranks share cores, caches and memory with each other, with the decoder, the driver and Ray. What each of them
costs the others is not measured apart: how much longer a render takes than its parts is.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace

from vidgen.bench.plans import PlanCase, in_own_process, predict
from vidgen.parallel.planner.hardware import Hardware, Rate

FRAMES, STEPS = 129, 12
QUEUE = {"timetable": "dualparal", "block_frames": 4, "context_frames": 2, "context_mode": "recompute"}
MOST_RANKS = 4
TURNS = 2


def among_ranks(hardware: Hardware, cores: int) -> Hardware:
    """A machine whose other rates are known, with how much slower so many ranks at work are, and how large.

    A render on several ranks is held against one process, both against what they take of all but each other;
    they take turns. Ranks beyond the cores share them. A process holds what the largest one did at most, less
    what is known of its part of the video.
    """
    counts = sorted({min(2, MOST_RANKS), min(cores, MOST_RANKS)} - {1})
    cases = [PlanCase(ranks=count, queue=QUEUE) for count in (1, *counts)]
    alone = replace(
        hardware, busy=(), layers=_with_fp32(hardware.layers), attention=_with_fp32(hardware.attention)
    )
    foretold = [predict(alone, case, FRAMES, STEPS) for case in cases]
    parts_s = [float(plan["seconds"]) for plan in foretold]
    parts_bytes = [int(plan["memory_bytes"]) - hardware.process_bytes for plan in foretold]
    readings: Sequence[list[float]] = [[] for _ in cases]
    process_bytes = hardware.process_bytes
    for _ in range(TURNS):
        for case, taken, part_bytes in zip(cases, readings, parts_bytes, strict=True):
            found = in_own_process(case, FRAMES, STEPS)
            taken.append(found["seconds"])
            process_bytes = max(process_bytes, int(found["memory_bytes"]) - part_bytes)
    ratios = [statistics.median(taken) / part_s for taken, part_s in zip(readings, parts_s, strict=True)]
    rising = [(1.0, 1.0)]
    for count, ratio in zip(counts, ratios[1:], strict=True):
        rising.append((float(count), max(rising[-1][1], ratio / ratios[0])))
    if cores > rising[-1][0]:  # more are taken to cost each other no more, until they share cores
        rising.append((float(cores), rising[-1][1]))
    count, factor = rising[-1]
    return replace(hardware, busy=(*rising, (2 * count, 2 * factor)), process_bytes=process_bytes)


def _with_fp32(rates: Mapping[str, Rate]) -> dict[str, Rate]:
    """The renders are of the built-in model; another's rates do, as only ratios count."""
    return {"fp32": next(iter(rates.values())), **rates}
