"""The bench against diffusers runs at a tiny size, and what it says adds up. No time is judged."""

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from vidgen.bench.peers import OURS, THEIRS, PeersCase, _timed, bench_peers, load_fullest_rank, rows
from vidgen.bench.random_wan import TINY, make_wan

CASE = PeersCase(
    sizes=TINY, height=64, width=64, num_frames=5, rounds=1, threads=1, num_ranks=3, compile=False
)


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    return bench_peers(CASE)


def test_both_engines_give_the_same_latents(found: dict[str, Any]):
    theirs, ours = found["steps"]
    assert (theirs["engine"], ours["engine"]) == (THEIRS, OURS)
    assert theirs["max error"] == 0 and theirs["speed-up"] == 1
    assert ours["max error"] <= 1e-4 * ours["scale"] and ours["scale"] > 1


def test_ratios_are_those_of_the_medians_and_the_first_step_is_left_out(found: dict[str, Any]):
    theirs, ours = found["steps"]
    assert ours["speed-up"] == pytest.approx(theirs["seconds"] / ours["seconds"], rel=0.05)
    for row in (theirs, ours):
        assert row["readings"] == CASE.rounds * (CASE.num_steps - 1)
        assert 0 < row["least"] <= row["seconds"] <= row["most"]


def test_a_rank_reads_its_own_weights_and_no_others(found: dict[str, Any]):
    loading = found["loading"]
    assert loading["read MB"] == loading["weights MB"] and loading["rank"] == 0
    assert 1 / CASE.num_ranks < loading["read"] < 1
    assert loading["peak MB"] >= loading["weights MB"]


def test_the_table_has_a_row_per_ratio_and_equal_columns(found: dict[str, Any]):
    table = rows(found)
    assert [row["what"].split(",")[0] for row in table] == [
        "step", "step", "share of bytes read by a rank", "peak of its load / weights",
    ]  # fmt: skip
    assert len({tuple(row) for row in table}) == 1
    assert [row["target"] for row in table] == ["", ">= 1.15", "<= 0.35", "<= 1.1"]


def test_one_rank_of_one_reads_everything(tmp_path: Path):
    loading = load_fullest_rank(make_wan(tmp_path / "wan", "t2v"), 1)
    assert loading["read"] == 1 and loading["num_ranks"] == 1


def test_a_step_is_timed_from_call_to_call():
    def run(told: Any) -> torch.Tensor:
        for seconds in (0.0, 0.05, 0.1):
            time.sleep(seconds)
            assert told(None, 0, 0, {"latents": 1}) == {"latents": 1}
        return torch.ones(1)

    _, taken = _timed(run)
    walls, cpus = zip(*taken, strict=True)
    assert len(taken) == 3 and walls[1] >= 0.05 and walls[2] >= 0.1
    assert sum(cpus) < 0.1, "sleep takes no CPU time"


def test_too_few_steps_to_time_are_an_error():
    with pytest.raises(ValueError, match="num_steps=1, rounds=3: need 2 and 1 at least"):
        PeersCase(num_steps=1)
