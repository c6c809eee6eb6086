"""Ranks on several nodes: when a node is lost a render goes on with those that are left, to the same bytes.

A node is a raylet on this machine. Each case runs as a script, `python test_node_loss.py FOLDER FAULT CPUS`,
because a process can be in one Ray cluster only and other tests keep theirs; it leaves FOLDER/told.json.
"""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from vidgen.config import JobConfig
from vidgen.render import render
from vidgen.types import Progress

NUM_RANKS, MIN_RANKS = 3, 2
LOST_AT_TICK = 2  # of 17
TIMEOUT_S = 400.0
# else a placement group waits for ever for a node that is gone without closing its connections, and with it
# all later ones, even when Ray has declared the node dead (2.60; measured with stopped processes)
KEEPALIVE = {"grpc_client_keepalive_time_ms": 5000, "grpc_client_keepalive_timeout_ms": 5000}


def job(jobs: Any, output: Path, ranks: int) -> JobConfig:
    parallel: dict[str, Any] = {}
    if ranks > 1:
        parallel = {"placement": "spread", "min_ranks": MIN_RANKS, "max_restarts": 10}
        parallel |= {"heartbeat_timeout_s": 4, "link_timeout_s": 20}
    return jobs.job(
        output, ranks, num_inference_steps=4, parallel=parallel,
        segments=[{"prompt": "a blue square moving up over a white background", "num_frames": 109}],
        queue={"block_frames": 2, "context_frames": 1, "context_mode": "cache", "anchor_frames": 1},
    )  # fmt: skip


def lost(fault: str, folder: Path, jobs: Any, **spare: int) -> dict[str, Any]:
    """What happened to a render, and that of one process beside it."""
    command = [sys.executable, __file__, str(folder), fault, str(spare.get("cpus", 0))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.returncode == 0, done.stderr
    told = json.loads((folder / "told.json").read_text())
    render(job(jobs, folder / "whole.mp4", 1))
    assert jobs.files(folder / "v.job") == jobs.files(folder / "whole.job")
    assert any(
        name in note and str(pid) in note for name, pid in told["lost"].items() for note in told["notes"]
    )
    assert told["num_ranks"][0] == NUM_RANKS and not told["leftovers"]
    return told


def test_a_removed_node_is_named_and_the_render_goes_on_with_fewer_ranks(tmp_path: Path, jobs: Any):
    told = lost("removed", tmp_path, jobs)
    assert told["num_ranks"][-1] == MIN_RANKS, "there is no room for more"


@pytest.mark.slow
def test_a_node_that_stops_answering_is_named_and_the_render_goes_on_with_as_many(tmp_path: Path, jobs: Any):
    told = lost("frozen", tmp_path, jobs, cpus=1)
    assert told["num_ranks"][-1] == NUM_RANKS, "there is room on the others"


def processes_of(node: Any) -> list[int]:
    """A node's raylet and what it has started: agents and workers."""
    raylet = node.all_processes["raylet"][0].process.pid
    children = Path(f"/proc/{raylet}/task/{raylet}/children").read_text().split()
    return [raylet, *map(int, children)]


def main(folder: Path, fault: str, spare_cpus: int) -> None:
    import ray
    from ray.cluster_utils import Cluster

    os.environ["RAY_worker_niceness"] = (
        "0"  # 15 of a worker, as Ray starts them, is for ever on a busy machine
    )
    jobs = _load_jobs()
    lost: dict[str, int] = {}
    frozen: list[int] = []
    notes: list[str] = []

    def strike(progress: Progress) -> None:
        if lost or progress.ticks_done < LOST_AT_TICK:
            return
        places = json.loads((folder / "v.job" / "ranks.json").read_text())
        for node in workers:
            pids = processes_of(node)
            there = {place["name"]: place["pid"] for place in places if place["pid"] in pids}
            if any(name.startswith("rank") for name in there):
                lost.update(there)
                if fault == "removed":
                    cluster.remove_node(node, allow_graceful=False)
                    return
                frozen.extend(pids)
                for pid in pids:
                    os.kill(pid, signal.SIGSTOP)
                return
        raise AssertionError(f"no rank on a worker node: {places}")

    head = {"num_cpus": 2, "include_dashboard": False, "_system_config": KEEPALIVE}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        workers = [cluster.add_node(num_cpus=1 + spare_cpus) for _ in range(2)]
        ray.init(address=cluster.address, log_to_driver=False)
        start = time.monotonic()
        done = render(job(jobs, folder / "v.mp4", NUM_RANKS), report=strike, note=notes.append)
        assert done.evidence is not None
        told = {
            "lost": lost,
            "notes": notes,
            "num_ranks": [attempt["num_ranks"] for attempt in done.evidence["attempts"]],
            "leftovers": len(jobs.leftovers()),
            "seconds": time.monotonic() - start,
        }
        (folder / "told.json").write_text(json.dumps(told))  # not on stdout, where Ray speaks as well
    finally:
        for pid in frozen:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        ray.shutdown()
        cluster.shutdown()


def _load_jobs() -> ModuleType:
    spec = importlib.util.spec_from_file_location("parallel_jobs", Path(__file__).with_name("jobs.py"))
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
