"""What the live socket refuses, and how, on a real server: nothing here needs a worker."""

import json
from collections.abc import Iterator
from contextlib import AbstractContextManager
from hashlib import sha256
from typing import Any

import pytest
from websockets.exceptions import InvalidStatus
from websockets.sync.client import ClientConnection

from tests.serve.conftest import RunningServer, running
from tests.serve.sockets import connected, receive, receive_until, resume

KEYS = {"ann": "key-of-ann", "bob": "key-of-bob"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A server of two owners whose workers are still starting."""
    keys = [{"name": name, "sha256": sha256(key.encode()).hexdigest()} for name, key in KEYS.items()]
    folder = tmp_path_factory.mktemp("refusals") / "data"
    timings = {"session_start_timeout_s": 3}
    with running(folder, ready=False, key=KEYS["ann"], keys=keys, timings=timings) as found:
        yield found


@pytest.fixture
def waiting(server: RunningServer) -> Iterator[str]:
    """A session of ann's that somebody watches."""
    with start(server) as client:
        yield receive_until(client, "queue.status")[-1]["session_id"]


def key_of(owner: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {KEYS[owner]}"}


def start(server: RunningServer, **request: Any) -> AbstractContextManager[ClientConnection]:
    first = {"type": "session.start", "prompt": "a red ball rolls to the left", **request}
    return connected(server.port, first, key_of("ann"))


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 401),
        ({"Authorization": "Bearer wrong"}, 401),
        ({**key_of("ann"), "Origin": "https://elsewhere.example"}, 403),
    ],
    ids=["no-key", "wrong-key", "foreign-page"],
)
def test_a_socket_is_refused_before_it_is_open(
    server: RunningServer, headers: dict[str, str], status: int
) -> None:
    with pytest.raises(InvalidStatus) as refused, connected(server.port, headers=headers):
        pass
    assert refused.value.response.status_code == status


def test_a_ticket_opens_one_socket_and_shows_only_its_video(server: RunningServer, waiting: str) -> None:
    with server.client(KEYS["ann"]) as client:
        answer = client.post("/v1/tickets", json={"video_id": waiting}).raise_for_status()
        query = f"?ticket={answer.json()['ticket']}"
    with start(server) as live:
        other = receive_until(live, "queue.status")[-1]["session_id"]
        with connected(server.port, resume(other), query=query) as client:
            assert receive(client)["code"] == "not_found"
            client.send(json.dumps({"type": "session.start", "prompt": "a ball"}))
            assert receive(client)["code"] == "only_one_video"
            client.send(json.dumps(resume(waiting)))
            assert receive(client)["session_id"] == waiting
    with pytest.raises(InvalidStatus) as refused, connected(server.port, query=query):
        pass
    assert refused.value.response.status_code == 401


def test_another_owners_session_is_not_there(server: RunningServer, waiting: str) -> None:
    codes = []
    for session_id in (waiting, "session_" + "0" * 32, "../" + waiting):
        with connected(server.port, resume(session_id), key_of("bob")) as client:
            codes.append(receive(client)["code"])
    assert codes == ["not_found"] * 3


@pytest.mark.parametrize(
    "request_",
    [
        {"num_frames": 10**9}, {"width": 33}, {"model": "none"}, {"unknown": 1}, {"prompt": ""},
        {"prompt": "x" * 5000}, {"policy": "wait"}, {"num_inference_steps": 10**6}, {"seed": -1},
        {"input_reference": {"image_url": "http://127.0.0.1/x.png"}},
        {"input_reference": {"image_url": "data:image/png;base64,AAAA"}},
    ],
    ids=lambda request_: json.dumps(request_)[:40],
)  # fmt: skip
def test_a_session_that_cannot_be_is_refused_in_one_line_and_another_may_be_asked_for(
    server: RunningServer, request_: dict[str, Any]
) -> None:
    with start(server, **request_) as client:
        refused = receive(client)
        assert refused["type"] == "error" and refused["message"] and "\n" not in refused["message"]
        client.send('{"type": "session.ping", "nonce": 1}')
        assert receive(client)["type"] == "session.pong"


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ('{"type": "session.interaction", "event_id": "a", "event": {"prompt": "x"}}', "not_started"),
        ('{"type": "session.stop"}', "not_started"),
        ("{", "invalid_json"),
    ],
)
def test_before_its_start_a_session_takes_no_orders(server: RunningServer, text: str, code: str) -> None:
    with connected(server.port, headers=key_of("ann")) as client:
        client.send(text)
        assert receive(client)["code"] == code


def test_a_socket_that_asks_for_nothing_is_closed_with_an_error(server: RunningServer) -> None:
    with connected(server.port, headers=key_of("ann")) as client:
        assert receive(client)["code"] == "start_timeout"


def test_the_log_has_no_traceback(server: RunningServer) -> None:
    assert "Traceback" not in server.log, server.log
