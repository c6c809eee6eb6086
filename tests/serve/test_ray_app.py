"""The same server behind Ray Serve: a job, a live session, and the page."""

import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

pytest.importorskip("grpc", reason="Ray Serve is not installed: pip install 'vidgen[ray-serve]'")

from websockets.sync.client import connect  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # of Ray Serve
PROMPT = "a red circle moving left over a gray background"
READY_S, DONE_S = 120.0, 60.0


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """host:port of a server that is ready."""
    import ray
    from ray import serve
    from ray.serve.config import HTTPOptions

    from vidgen.serve.ray_app import Arguments, build

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        serve.start(http_options=HTTPOptions(host="127.0.0.1", port=port))
        serve.run(build(Arguments(data=tmp_path_factory.mktemp("data"))), name="vidgen")
        until = time.monotonic() + READY_S
        while httpx.get(f"http://127.0.0.1:{port}/ready", timeout=10).status_code != 200:
            assert time.monotonic() < until, "not ready"
            time.sleep(0.5)
        yield f"127.0.0.1:{port}"
    finally:
        serve.shutdown()
        ray.shutdown()


def test_a_job_is_made_and_downloaded(address: str) -> None:
    with httpx.Client(base_url=f"http://{address}", timeout=30) as client:
        made = client.post("/v1/videos", json={"prompt": PROMPT, "num_frames": 33, "seed": 1}).json()
        until = time.monotonic() + DONE_S
        while (found := client.get(f"/v1/videos/{made['id']}").json())["status"] != "completed":
            assert found["status"] != "failed" and time.monotonic() < until, found
            time.sleep(0.2)
        content = client.get(f"/v1/videos/{made['id']}/content")
        assert content.status_code == 200 and content.content[4:8] == b"ftyp"
        assert client.get("/").status_code == 200


def test_a_live_session_sends_chunks(address: str) -> None:
    with connect(f"ws://{address}/v1/realtime/video", open_timeout=20, close_timeout=5) as live:
        live.send(json.dumps({"type": "session.start", "prompt": PROMPT, "num_frames": 160}))
        until, fragments = time.monotonic() + DONE_S, 0
        while fragments < 3:
            assert time.monotonic() < until
            message = live.recv(timeout=DONE_S)
            fragments += isinstance(message, bytes)
        live.send(json.dumps({"type": "session.stop"}))


def test_a_configuration_that_cannot_be_is_one_line(tmp_path: Path) -> None:
    from vidgen.serve.ray_app import Arguments, build

    (tmp_path / "bad.yaml").write_text("replica: 2\n")
    with pytest.raises(ValueError, match="did you mean replicas"):
        build(Arguments(config=tmp_path / "bad.yaml"))
