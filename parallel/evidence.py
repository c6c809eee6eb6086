"""What a run on ranks did, in figures: for `--json`, the job folder, and whoever doubts."""

import json
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from vidgen.denoise.loop import Task
from vidgen.parallel.pipeline import Span
from vidgen.parallel.slots import least_slots
from vidgen.parallel.topology import AXES, Topology

COLUMNS = ["attempt", "rank", *Span.__slots__]


class Evidence:
    """Gathers the ranks' figures, one attempt after another."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.failures: list[str] = []
        self._attempts: list[dict[str, Any]] = []
        self._started_s = time.monotonic()

    def begin(self, topology: Topology, first_tick: int, places: list[dict[str, Any]]) -> None:
        """An attempt starts its work."""
        self._started_s = time.monotonic()
        self._attempts.append(
            {
                "num_ranks": topology.num_ranks,
                "layers_per_rank": list(topology.layers_per_stage),
                "lanes": {axis: getattr(topology.lanes, axis) for axis in AXES},
                "first_tick": first_tick,
                "least_slots": least_slots(
                    self.task.timetable,
                    topology.num_stages,
                    lambda step: -(-self.task.runs_at(step) // topology.lanes.guidance),
                    first_tick=first_tick,
                ),
                "ranks": places,
            }
        )

    def update(self, stats: dict[int, dict[str, float]], decoder: dict[str, float]) -> None:
        """The ranks' newest figures."""
        attempt = self._attempts[-1]
        attempt["seconds"] = round(time.monotonic() - self._started_s, 3)
        for rank, found in stats.items():
            attempt["ranks"][rank] |= {name: _rounded(value) for name, value in found.items()}
        attempt["decoder"] = decoder
        last = attempt["ranks"][-1]
        items, slots = last.get("items", 0), last.get("last_slot", 0)
        num_ranks, num_stages = attempt["num_ranks"], len(attempt["layers_per_rank"])
        attempt["slots"] = slots
        cache = attempt["ranks"][0].get("cache")
        if cache is not None:
            attempt["cache"] = cache
        # steps that a cache skips take no slots, so that there is no bound to hold them against
        is_bound = slots and not (cache and cache["skipped"])
        attempt["utilisation"] = round(attempt["least_slots"] / slots, 4) if is_bound else 0.0
        attempt["bubble_share"] = round(1 - items / slots, 4) if slots else 0.0
        began = min(rank.get("began_s", 0) for rank in attempt["ranks"])
        attempt["working_s"] = round(max(rank.get("ended_s", 0) for rank in attempt["ranks"]) - began, 3)
        busy = sum(rank.get("busy_s", 0) for rank in attempt["ranks"])
        attempt["busy_share"] = round(busy / num_ranks / max(attempt["working_s"], 1e-9), 4)
        attempt["bytes_per_link"] = {
            f"{rank}->{rank + 1 - num_stages * ((rank + 1) % num_stages == 0)}": found.get("bytes_sent", 0)
            for rank, found in enumerate(attempt["ranks"])
        }
        attempt["bytes_between_lanes"] = sum(found.get("lane_bytes_sent", 0) for found in attempt["ranks"])

    def as_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return {
            "restarts": len(self.failures),
            "failures": self.failures,
            "attempts": self._attempts,
        }


class SpanFile:
    """The trace of a job, JOB/trace.jsonl: a line of column names, then a line per run of the model."""

    def __init__(self, path: Path) -> None:
        self.path = path
        # attempts of earlier processes come first
        self._first_attempt = 0
        if path.exists():
            data = path.read_bytes()
            whole = data[: data.rfind(b"\n") + 1]  # without the row in which a process was killed
            os.truncate(path, len(whole))
            rows = [json.loads(line) for line in whole.splitlines()[1:]]
            self._first_attempt = 1 + max((row[0] for row in rows), default=-1)

    def write(self, attempt: int, spans: list[tuple[int, tuple[float, ...]]]) -> None:
        """Add spans, given with their rank. On a full disk they are dropped: the render is worth more."""
        if not spans:
            return
        rows: list[list[Any]] = []
        for rank, (*numbers, start_s, stop_s) in spans:
            number = self._first_attempt + attempt
            rows.append([number, rank, *numbers, round(start_s, 6), round(stop_s, 6)])
        with suppress(OSError), self.path.open("ab", buffering=0) as file:
            end = file.seek(0, os.SEEK_END)
            data = "".join(json.dumps(row) + "\n" for row in (rows if end else [COLUMNS, *rows])).encode()
            if file.write(data) != len(data):
                file.truncate(end)  # no room for all of it


def _rounded(value: float) -> float:
    return round(value, 4) if isinstance(value, float) else value
