"""Renders on ranks of a local Ray cluster: the same files as one process makes, and evidence of how."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from vidgen.render import Interrupted, render, resume

QUEUES = {
    "recompute": {"block_frames": 2, "context_frames": 1},
    "cache-anchor-stride": {
        "block_frames": 2, "context_frames": 1, "context_mode": "cache", "anchor_frames": 1, "stride": 2,
    },
}  # fmt: skip


def listening(pids: set[int]) -> list[str]:
    """Addresses on which these processes listen."""
    found = []
    for pid in pids:
        inodes = {
            link.readlink().name[8:-1]
            for link in Path(f"/proc/{pid}/fd").iterdir()
            if str(link.readlink()).startswith("socket:")
        }
        for table in ("tcp", "tcp6"):
            for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == "0A" and fields[9] in inodes:
                    found.append(fields[1])
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, jobs: Any) -> dict[str, dict[str, bytes]]:
    """What one process makes."""
    folder = tmp_path_factory.mktemp("whole")
    for name, queue in QUEUES.items():
        render(jobs.job(folder / f"{name}.mp4", 1, queue=queue))
    return {name: jobs.files(folder / f"{name}.job") for name in QUEUES}


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("name", QUEUES)
def test_any_number_of_ranks_leaves_the_same_bytes(
    name: str, ranks: int, tmp_path: Path, whole: Any, local_ray: None, jobs: Any
):
    done = render(jobs.job(tmp_path / "v.mp4", ranks, queue=QUEUES[name]))
    assert jobs.files(tmp_path / "v.job") == whole[name]
    assert done.evidence is not None
    (attempt,) = done.evidence["attempts"]
    assert attempt["num_ranks"] == ranks and done.evidence["restarts"] == 0
    assert attempt["slots"] == attempt["least_slots"]
    assert not jobs.leftovers()


def test_over_gloo_too_and_bytes_per_link_are_those_of_the_messages(
    tmp_path: Path, whole: Any, local_ray: None, jobs: Any
):
    settings = {"queue": QUEUES["recompute"], "parallel": {"links": "gloo"}}
    done = render(jobs.job(tmp_path / "v.mp4", 3, **settings))
    assert jobs.files(tmp_path / "v.job") == whole["recompute"]
    assert done.evidence is not None
    (attempt,) = done.evidence["attempts"]
    assert [rank["link"] for rank in attempt["ranks"]] == ["gloo"] * 3
    for rank, sent in zip(attempt["ranks"], attempt["bytes_per_link"].values(), strict=True):
        assert rank["items"] and sent % rank["items"] == 0, "every message has the same size"


def test_a_cut_by_hand_is_used_and_weights_are_read_once(
    tmp_path: Path, whole: Any, local_ray: None, jobs: Any
):
    from vidgen.builtin import load_small

    parallel = {"layers_per_rank": [1, 4, 1]}
    done = render(jobs.job(tmp_path / "v.mp4", 3, queue=QUEUES["recompute"], parallel=parallel))
    assert jobs.files(tmp_path / "v.job") == whole["recompute"]
    assert done.evidence is not None
    (attempt,) = done.evidence["attempts"]
    assert attempt["layers_per_rank"] == [1, 4, 1]
    dit = load_small().dit
    assert sum(rank["num_parameters"] for rank in attempt["ranks"]) == sum(
        p.numel() for p in dit.parameters()
    )
    layers = [sum(p.numel() for p in layer.parameters()) for layer in dit.layers]
    ends = sum(p.numel() for p in dit.parameters()) - sum(layers)
    for rank, count in zip(attempt["ranks"], [1, 4, 1], strict=True):
        assert rank["num_parameters"] <= count * layers[0] + ends


def test_stopped_and_resumed_on_other_numbers_of_ranks_the_bytes_are_the_same(
    tmp_path: Path, whole: Any, local_ray: None, jobs: Any
):
    queue = QUEUES["cache-anchor-stride"]
    ticks = []
    with pytest.raises(Interrupted):
        render(
            jobs.job(tmp_path / "v.mp4", 2, queue=queue), report=lambda p: ticks.append(p.ticks_done),
            should_stop=lambda: bool(ticks) and ticks[-1] >= 3,
        )  # fmt: skip
    assert not jobs.leftovers()
    with pytest.raises(Interrupted):
        resume(tmp_path / "v.job", parallel={"ranks": 1}, should_stop=lambda: True)
    resume(tmp_path / "v.job", parallel={"ranks": 3})
    assert jobs.files(tmp_path / "v.job") == whole["cache-anchor-stride"]
    runs = json.loads((tmp_path / "v.job" / "evidence.json").read_text())
    assert [run["attempts"][-1]["num_ranks"] for run in runs] == [2, 3]


def test_nothing_listens_beyond_loopback(local_ray: None, tmp_path: Path, jobs: Any):
    seen: list[str] = []

    def look(_: Any) -> None:
        if (tmp_path / "v.job" / "ranks.json").exists():
            mine = subprocess.run(["pgrep", "-f", "ray"], capture_output=True, text=True).stdout.split()
            places = json.loads((tmp_path / "v.job" / "ranks.json").read_text())
            seen.extend(listening({*map(int, mine), *(place["pid"] for place in places)} & _alive()))

    render(jobs.job(tmp_path / "v.mp4", 2, queue=QUEUES["recompute"]), report=look)
    assert seen
    loopback = ("0100007F:", "0000000000000000FFFF00000100007F:", "00000000000000000000000001000000:")
    assert all(address.startswith(loopback) for address in seen), seen


def _alive() -> set[int]:
    return {int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()}
