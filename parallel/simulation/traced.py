"""A simulator's work from a render that really ran: its evidence, and its trace of what ran when."""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from vidgen.denoise.timetable import Timetable
from vidgen.parallel.simulation.attempt import item_of
from vidgen.parallel.simulation.workload import Item, Work


def work_from_trace(timetable: Timetable, evidence: dict[str, Any], spans_file: Path, **options: Any) -> Work:
    """The times of a render's first attempt, to be simulated again or for another timetable.

    `evidence` is one entry of JOB/evidence.json and `spans_file` the JOB/trace.jsonl of the same render. A
    stage's seconds for an item are its mean, of lanes the slowest, and what the rank does beside running the
    model; their spread is the jitter. Sizes that did not occur take the time of the nearest one that did.
    `options` are those of Work. ValueError for a render without a trace.
    """
    attempt = evidence["attempts"][0]
    num_stages, ranks = len(attempt["layers_per_rank"]), attempt["ranks"]
    spent: dict[tuple[int, Item], list[float]] = defaultdict(list)  # by rank
    runs: dict[tuple[int, int], set[int]] = defaultdict(set)  # of a block's step
    sizes: dict[int, dict[int, Item]] = {}  # by tick and block
    for number, rank, tick, block, step, run, start_s, stop_s in _rows(spans_file):
        if number == 0:
            if tick not in sizes:
                forwards = timetable.forwards(tick)
                sizes[tick] = {forward.block: item_of(timetable, forward) for forward in forwards}
            spent[rank, sizes[tick][block]].append(stop_s - start_s)
            if rank == 0:
                runs[block, step].add(run)
    if not spent:
        raise ValueError(f"{spans_file}: holds no run of the model; render with parallel.trace on")
    # a sender waits for room too, but the one that waits least only copies its message
    handing_s = min(rank["send_wait_s"] / rank["items"] for rank in ranks)
    besides = [_rest_s(rank) / rank["items"] * (index % num_stages > 0) for index, rank in enumerate(ranks)]
    means: dict[Item, list[float]] = defaultdict(lambda: [0.0] * num_stages)
    for (rank, item), found in spent.items():
        seconds, stage = sum(found) / len(found) + handing_s + besides[rank], rank % num_stages
        means[item][stage] = max(means[item][stage], seconds)
    spread = [(second * len(found) / sum(found) - 1) ** 2 for found in spent.values() for second in found]
    times: dict[str, Any] = {"jitter": min(1.0, (sum(spread) / len(spread)) ** 0.5)}
    runs_at = {int(step): 0 for step in attempt.get("cache", {}).get("skipped_at", {})}
    runs_at |= {step: len(found) for (_, step), found in runs.items()}  # if any block ran it, all do
    return Work(
        stage_s=lambda item: means[min(means, key=lambda known: _distance(known, item))],
        runs_at=lambda step: runs_at.get(step, max(runs_at.values())),
        solver_s=_rest_s(ranks[0]) / len(runs),  # the first stage's windows and solver's steps
        num_lanes=attempt["num_ranks"] // num_stages,
        **times | options,
    )


def _rows(spans_file: Path) -> list[list[Any]]:
    return [json.loads(line) for line in spans_file.read_text().splitlines()[1:]]


def _rest_s(rank: dict[str, float]) -> float:
    """What a rank did beside running the model and waiting for others."""
    waited = rank["receive_wait_s"] + rank["send_wait_s"]
    return max(rank["ended_s"] - rank["began_s"] - rank["busy_s"] - waited, 0.0)


def _distance(known: Item, item: Item) -> tuple[int, int]:
    return abs(known.window - item.window), abs(known.context - item.context)
