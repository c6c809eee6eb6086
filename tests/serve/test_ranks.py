"""A server whose replica works on ranks: they wait between videos, each is watched, and prompts change."""

import json
import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import psutil
import pytest

from tests.serve.conftest import RunningServer, running
from tests.serve.sockets import connected, receive_chunks, receive_until, seqs

START_DEADLINE_S = 90.0
JOB = {
    "num_inference_steps": 4,
    "parallel": {"ranks": 2, "heartbeat_timeout_s": 30, "queue_blocks": 1},
}
PROMPT = "a red circle moving left over a gray background"
ANOTHER = "a blue square moving up over a white background"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """One replica of two ranks."""
    models = {"builtin": {"model": "builtin", "job": JOB, "session": JOB}}
    with running(tmp_path_factory.mktemp("ranks") / "data", models=models) as found:
        yield found


def rank_pids(server: RunningServer) -> list[int]:
    """Processes of ranks below the server."""
    found = []
    for process in psutil.Process(server.pid).children(recursive=True):
        try:
            if "RankActor" in " ".join(process.cmdline()):
                found.append(process.pid)
        except psutil.NoSuchProcess:
            continue
    return sorted(found)


def metrics(client: Any) -> dict[str, float]:
    lines = client.get("/metrics").text.splitlines()
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if line[0] != "#"}


def test_videos_one_after_another_are_made_by_the_same_ranks(server: RunningServer):
    pids = rank_pids(server)
    assert len(pids) == 2
    with server.client() as client:
        for _ in range(2):
            made = client.post("/v1/videos", json={"prompt": PROMPT, "num_frames": 33}).json()
            assert server.wait(made["id"])["status"] == "completed"
    assert rank_pids(server) == pids


def test_a_prompt_changes_while_ranks_make_the_session(server: RunningServer):
    with connected(server.port, {"type": "session.start", "prompt": PROMPT}) as client:
        messages = receive_chunks(client, 2)
        client.send(
            json.dumps({"type": "session.interaction", "event_id": "e1", "event": {"prompt": ANOTHER}})
        )
        messages += receive_until(client, "session.interaction.applied")
        applied = messages[-1]
        while max(seqs(messages)) < applied["seq"] + 1:
            messages += receive_chunks(client, 1)
        client.send(json.dumps({"type": "session.stop"}))
        messages += receive_until(client, "session.done")
    assert messages[-1]["status"] == "completed" and applied["seq"] >= 2
    assert seqs(messages) == list(range(len(seqs(messages))))


def test_each_rank_is_told_by_ready_and_metrics_and_one_that_dies_is_missed_then_replaced(
    server: RunningServer,
):
    with server.client() as client:
        (replica,) = client.get("/ready").json()["replicas"]
        assert replica["ranks"] == 2 and len(replica["rank_ages_s"]) == 3
        assert max(replica["rank_ages_s"]) < 15
        found = metrics(client)
        for rank in ("0", "1", "decoder"):
            assert found[f'vidgen_rank_up{{rank="{rank}",replica="0"}}'] == 1
        before = rank_pids(server)
        os.kill(before[0], signal.SIGKILL)
        deadline = time.monotonic() + START_DEADLINE_S
        while (answer := client.get("/ready")).status_code == 200:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert answer.status_code == 503 and "0 of its 2 ranks" in answer.text
        assert metrics(client)['vidgen_rank_up{rank="1",replica="0"}'] == 0
        while client.get("/ready").status_code != 200:
            assert time.monotonic() < deadline, server.log
            time.sleep(0.2)
        assert not set(before) & set(rank_pids(server))
        made = client.post("/v1/videos", json={"prompt": PROMPT, "num_frames": 17}).json()
        assert server.wait(made["id"])["status"] == "completed"
