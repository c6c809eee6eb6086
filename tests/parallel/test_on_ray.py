"""Renders on ranks of a local Ray cluster: the same files as one process makes, and evidence of how."""

import contextlib
import json
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from vidgen.parallel.actors import from_bytes, to_bytes
from vidgen.render import render, resume
from vidgen.run import Interrupted

QUEUES = {
    "recompute": {"block_frames": 2, "context_frames": 1},
    "cache-anchor-stride": {
        "block_frames": 2, "context_frames": 1, "context_mode": "cache", "anchor_frames": 1, "stride": 2,
    },
}  # fmt: skip


def listening() -> set[str]:
    """Addresses on which this process and all below it listen."""
    found = set()
    own = psutil.Process()
    for process in (own, *own.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess, FileNotFoundError):
            connections = process.net_connections(kind="inet")
            found |= {c.laddr.ip for c in connections if c.status == psutil.CONN_LISTEN}
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, jobs: Any) -> dict[str, dict[str, bytes]]:
    """What one process makes."""
    folder = tmp_path_factory.mktemp("whole")
    for name, queue in QUEUES.items():
        render(jobs.job(folder / f"{name}.mp4", 1, queue=queue))
    return {name: jobs.files(folder / f"{name}.job") for name in QUEUES}


SOME = {("recompute", 2), ("recompute", 4), ("cache-anchor-stride", 3)}  # threads try all, many times over


@pytest.mark.parametrize(
    ("name", "ranks"),
    [
        pytest.param(name, ranks, marks=() if (name, ranks) in SOME else pytest.mark.slow)
        for name in QUEUES
        for ranks in (2, 3, 4)
    ],
)
def test_any_number_of_ranks_leaves_the_same_bytes(
    name: str, ranks: int, tmp_path: Path, whole: Any, local_ray: None, jobs: Any
):
    done = render(jobs.job(tmp_path / "v.mp4", ranks, queue=QUEUES[name]))
    assert jobs.files(tmp_path / "v.job") == whole[name]
    assert done.evidence is not None
    (attempt,) = done.evidence["attempts"]
    assert attempt["num_ranks"] == ranks and done.evidence["restarts"] == 0
    # a render this quick may wait for its blocks to be committed, which drains the stages
    assert attempt["least_slots"] <= attempt["slots"] <= 1.2 * attempt["least_slots"]
    assert not jobs.leftovers()


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.float8_e4m3fn]
)
@pytest.mark.parametrize("shape", [(), (0, 3), (5,), (2, 3, 4)], ids=str)
def test_a_tensor_that_a_rank_sends_arrives_as_it_was(dtype: torch.dtype, shape: tuple[int, ...]):
    sent = (torch.rand(shape) * 3).to(dtype)
    name, size, data = to_bytes(sent.mT if len(shape) == 3 else sent)
    if data is not None:
        data.flags.writeable = False  # as Ray hands it over
    arrived = from_bytes((name, size, data))
    arrived = arrived.mT if len(shape) == 3 else arrived
    assert arrived.dtype == dtype and arrived.shape == sent.shape
    assert torch.equal(arrived.float(), sent.float())
    arrived.fill_(0)  # it is the receiver's own


def test_sparse_attention_leaves_the_same_bytes_on_ranks_and_is_told(
    tmp_path: Path, local_ray: None, jobs: Any
):
    sparsity = {"policy": "adaspa", "density": 0.5, "query_block": 16, "key_block": 16, "dense_above": 1.0}
    settings = {"queue": QUEUES["recompute"], "attention": {"sparsity": sparsity}, "num_inference_steps": 5}
    one = render(jobs.job(tmp_path / "one.mp4", 1, **settings))
    two = render(jobs.job(tmp_path / "two.mp4", 2, **settings))
    assert jobs.files(tmp_path / "one.job") == jobs.files(tmp_path / "two.job")
    assert one.evidence is not None and two.evidence is not None
    on_ranks = [row for rank in two.evidence["attempts"][0]["ranks"] for row in rank["attention"]]
    for alone, row in zip(one.evidence["attention"], on_ranks, strict=True):
        assert row["sparse"] > 0 and {**alone, "search_s": 0} == {**row, "search_s": 0}


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
    tmp_path: Path, local_ray: None, jobs: Any
):
    prompt = "a blue square moving up over a white background"
    settings = {  # long enough that the wish to stop comes before the end
        "segments": [{"prompt": prompt, "num_frames": 241}], "num_inference_steps": 6,
        "queue": QUEUES["cache-anchor-stride"],
    }  # fmt: skip
    render(jobs.job(tmp_path / "whole.mp4", 1, **settings))
    ticks = []
    with pytest.raises(Interrupted):
        render(
            jobs.job(tmp_path / "v.mp4", 2, **settings), report=lambda p: ticks.append(p.ticks_done),
            should_stop=lambda: bool(ticks) and ticks[-1] >= 3,
        )  # fmt: skip
    assert not jobs.leftovers()
    with pytest.raises(Interrupted):
        resume(tmp_path / "v.job", parallel={"ranks": 1}, should_stop=lambda: True)
    resume(tmp_path / "v.job", parallel={"ranks": 3})
    assert jobs.files(tmp_path / "v.job") == jobs.files(tmp_path / "whole.job")
    runs = json.loads((tmp_path / "v.job" / "evidence.json").read_text())
    assert [run["attempts"][-1]["num_ranks"] for run in runs] == [2, 3]


def test_nothing_listens_beyond_loopback(local_ray: None, tmp_path: Path, jobs: Any):
    seen: set[str] = set()
    render(
        jobs.job(tmp_path / "v.mp4", 2, queue=QUEUES["recompute"]), report=lambda _: seen.update(listening())
    )
    assert seen and seen <= {"127.0.0.1", "::ffff:127.0.0.1", "::1"}, seen
