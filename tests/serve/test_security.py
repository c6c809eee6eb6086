"""Who may do what on a running server, and what never gets in."""

import hashlib
import http.client
import json
import os
import re
import secrets
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from fastapi.routing import iter_route_contexts

from tests.serve.conftest import RunningServer, running
from tests.serve.requests_made import SHORT, code
from tests.serve.sockets import PATH, handshake, raw
from vidgen.serve.app import make_app, serve
from vidgen.serve.config import load_server_config
from vidgen.serve.http.security import Tickets

KEYS = {"ada": "key-of-ada", "ben": "key-of-ben"}
BODY_LIMIT = 256 * 1024
OPEN = {"/health", "/", "/page/{version}/{name}"}


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A server with two keys."""
    keys = [{"name": name, "sha256": hashlib.sha256(key.encode()).hexdigest()} for name, key in KEYS.items()]
    data = tmp_path_factory.mktemp("locked") / "data"
    limits = {"max_body_bytes": BODY_LIMIT, "max_viewers": 2}
    with running(data, key=KEYS["ada"], keys=keys, limits=limits) as found:
        yield found


@pytest.fixture(scope="module")
def ada(locked: RunningServer) -> Iterator[httpx.Client]:
    with locked.client(KEYS["ada"]) as found:
        yield found


@pytest.fixture(scope="module")
def nobody(locked: RunningServer) -> Iterator[httpx.Client]:
    with locked.client() as found:
        yield found


@pytest.fixture(scope="module")
def video(ada: httpx.Client) -> dict[str, Any]:
    """A completed video of Ada's."""
    made = ada.post("/v1/videos", json=SHORT)
    assert made.status_code == 200, made.text
    deadline = time.monotonic() + 60
    while (found := ada.get(f"/v1/videos/{made.json()['id']}").json())["status"] != "completed":
        assert time.monotonic() < deadline and found["status"] != "failed", found
        time.sleep(0.05)
    return found


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FastAPI]:
    """The same application, to read its routes."""
    found = make_app(load_server_config(None, {"data": str(tmp_path_factory.mktemp("app") / "data")}))
    yield found
    found.state.server.store.close()


def ticket(client: httpx.Client, video_id: str | None = None) -> str:
    answer = client.post("/v1/tickets", json={} if video_id is None else {"video_id": video_id})
    assert answer.status_code == 200, answer.text
    assert answer.json()["expires_at"] > time.time()
    return answer.json()["ticket"]


def test_every_route_but_health_and_the_page_wants_a_key(
    app: FastAPI, nobody: httpx.Client, locked: RunningServer, video: dict[str, Any]
) -> None:
    tried = set()
    for route in iter_route_contexts(app.routes):
        path: str = getattr(route, "path", None) or route.original_route.path  # type: ignore[union-attr]
        url = path.replace("{video_id}", video["id"]).replace("{index}", "0")
        url = re.sub(r"\{[^}]*\}", "x", url)
        methods = getattr(route, "methods", None) or getattr(route.original_route, "methods", None)
        if methods is None:
            assert handshake(locked) == 401
            tried.add(path)
            continue
        for method in methods:
            answer = nobody.request(method, url)
            if path in OPEN:
                assert answer.status_code in (200, 404), (method, path)
                continue
            assert answer.status_code == 401, (method, path, answer.text)
            assert method == "HEAD" or code(answer) == "invalid_api_key"
            assert answer.headers["www-authenticate"] == "Bearer"
        tried.add(path)
    assert tried >= OPEN | {
        PATH, "/v1/videos", "/v1/videos/{video_id}", "/v1/videos/{video_id}/content", "/v1/models",
        "/v1/tickets",
        "/v1/videos/{video_id}/cancel", "/v1/videos/{video_id}/resume", "/v1/videos/{video_id}/events",
        "/ready",
        "/v1/videos/{video_id}/stream", "/v1/videos/{video_id}/hls/index.m3u8", "/metrics", "/openapi.json",
        "/docs",
    }  # fmt: skip


@pytest.mark.parametrize(
    "path",
    ["/nothing", "/v1/videos/", "/page", "/health/", "//health", "/docs/", "/%2Fhealth",
    "/v1/videos/../../health"],
)  # fmt: skip
def test_unknown_paths_tell_nothing_without_a_key(locked: RunningServer, path: str) -> None:
    text = raw(locked, f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
    assert text.startswith(b"HTTP/1.1 401"), text[:200]


@pytest.mark.parametrize("path", ["/page/../v1/models", "/page/x/../../v1/videos", "/page//v1/videos"])
def test_the_pages_folder_is_no_way_around_the_key(locked: RunningServer, path: str) -> None:
    text = raw(locked, f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
    assert re.match(rb"HTTP/1.1 40[14]", text) and b"builtin" not in text, text[:200]


@pytest.mark.parametrize(
    "header",
    [
        "", "Bearer", "Bearer wrong", "bearer", "Basic a2V5", "key-of-ada", "Bearer key-of-ada2",
        "Bearer \u00e9",
        "Bearer key-of-ad", "Bearer KEY-OF-ADA", "Token key-of-ada", "Bearer " + "x" * 10_000,
        "Bearer " + hashlib.sha256(b"key-of-ada").hexdigest(),
    ],
    ids=str,
)  # fmt: skip
def test_only_the_exact_key_opens(nobody: httpx.Client, header: str) -> None:
    answer = nobody.get("/v1/videos", headers=[(b"authorization", header.encode())])
    assert answer.status_code == 401 and code(answer) == "invalid_api_key"


def test_a_key_is_refused_before_its_body_is_read(locked: RunningServer) -> None:
    fields = "Host: 127.0.0.1", "Content-Type: application/json", "Content-Length: 9999"
    head = "\r\n".join(["POST /v1/videos HTTP/1.1", *fields, "", ""])
    assert raw(locked, head.encode(), deadline_s=5).startswith(b"HTTP/1.1 401")


def test_what_is_anothers_is_not_there(
    locked: RunningServer, ada: httpx.Client, video: dict[str, Any]
) -> None:
    with locked.client(KEYS["ben"]) as ben:
        url = f"/v1/videos/{video['id']}"
        for method, path in (
            ("GET", ""), ("DELETE", ""), ("GET", "/content"), ("POST", "/cancel"), ("POST", "/resume"),
            ("GET", "/events"), ("GET", "/stream"), ("GET", "/hls/index.m3u8"), ("GET", "/hls/init.mp4"),
            ("GET", "/hls/0.m4s"),
        ):  # fmt: skip
            theirs = ben.request(method, url + path)
            assert theirs.status_code == 404 and code(theirs) == "not_found", path
        missing = ben.get(f"/v1/videos/video_{'0' * 32}")
        assert missing.json() == json.loads(
            json.dumps(ben.get(url).json()).replace(video["id"], f"video_{'0' * 32}")
        )
        assert ben.get("/v1/videos").json()["data"] == []
        assert code(ben.get("/v1/videos", params={"after": video["id"]})) == "invalid_value"
        assert ben.post("/v1/tickets", json={"video_id": video["id"]}).status_code == 404
    assert ada.get(url).status_code == 200


def test_a_ticket_reads_the_one_video_it_was_made_for(
    ada: httpx.Client, nobody: httpx.Client, video: dict[str, Any]
) -> None:
    text = ticket(ada, video["id"])
    url = f"/v1/videos/{video['id']}"
    for path in ("/content", "/stream", "/events", "/hls/index.m3u8", "/hls/init.mp4", "/hls/0.m4s"):
        for _ in range(2):  # a player asks again and again
            assert nobody.get(url + path, params={"ticket": text}).status_code == 200, path
    listed = nobody.get(f"{url}/hls/index.m3u8", params={"ticket": text}).text
    names = [line for line in listed.splitlines() if not line.startswith("#")]
    assert names and all(nobody.get(f"{url}/hls/{name}").status_code == 200 for name in names)
    other = ada.post("/v1/videos", json=SHORT).json()["id"]
    for method, path in (
        ("GET", f"/v1/videos/{other}/content"), ("GET", url), ("DELETE", url), ("POST", f"{url}/cancel"),
        ("GET", "/v1/videos"), ("GET", "/metrics"), ("POST", f"{url}/content"), ("GET", f"{url}/hls/../../x"),
    ):  # fmt: skip
        assert nobody.request(method, path, params={"ticket": text}).status_code == 401, (method, path)
    ada.delete(f"/v1/videos/{other}")
    for wrong in ("", "x", text[:-1], text + "x", secrets.token_urlsafe(32)):
        assert nobody.get(f"{url}/content", params={"ticket": wrong}).status_code == 401


def test_a_ticket_opens_one_socket_and_reads_nothing(
    locked: RunningServer, ada: httpx.Client, nobody: httpx.Client, video: dict[str, Any]
) -> None:
    text = ticket(ada)
    assert nobody.get(f"/v1/videos/{video['id']}/content", params={"ticket": text}).status_code == 401
    assert [handshake(locked, f"?ticket={text}") for _ in range(2)] == [101, 401]
    assert handshake(locked) == 401 and handshake(locked, "?ticket=x") == 401
    assert handshake(locked, Authorization=f"Bearer {KEYS['ada']}") == 101


def test_an_expired_ticket_opens_nothing(tmp_path_factory: pytest.TempPathFactory) -> None:
    data = tmp_path_factory.mktemp("expiring") / "data"
    keys = [{"name": "ada", "sha256": hashlib.sha256(b"k").hexdigest()}]
    with running(data, ready=False, keys=keys, timings={"ticket_s": 1}) as found, found.client("k") as client:
        answer = client.post("/v1/tickets", json={}).json()
        time.sleep(max(answer["expires_at"] - time.time(), 0) + 0.1)
        assert handshake(found, f"?ticket={answer['ticket']}") == 401


@pytest.mark.parametrize("part", [0.0, 0.001, 0.5, 0.999])
def test_a_ticket_lasts_as_long_as_was_said(part: float, monkeypatch: pytest.MonkeyPatch) -> None:
    started = 1_795_823_099 + part
    monkeypatch.setattr(time, "time", lambda: started)
    tickets = Tickets(1.0)
    text, issued = tickets.issue("ada")
    monkeypatch.setattr(time, "time", lambda: started + 0.99)
    assert tickets.to_connect(text) is issued
    text, issued = tickets.issue("ada")
    monkeypatch.setattr(time, "time", lambda: float(issued.expires_at))
    assert tickets.to_connect(text) is None


def test_a_body_over_the_limit_is_refused_while_it_comes(locked: RunningServer, ada: httpx.Client) -> None:
    before = _open_files(locked.pid)
    for kind in ("application/json", "multipart/form-data; boundary=x"):
        answer = ada.post("/v1/videos", content=b"x" * (BODY_LIMIT + 1), headers={"Content-Type": kind})
        assert answer.status_code == 413 and code(answer) == "too_large"
        assert _sent_without_length(locked, kind) == 413
    picture = {"input_reference": ("x.png", b"\0" * (BODY_LIMIT - 1000), "image/png")}
    assert ada.post("/v1/videos", files=picture, data={"prompt": "a"}).status_code == 400
    deadline = time.monotonic() + 10
    while left := [
        name for name in _open_files(locked.pid) - before if "/tmp" in name and "socket" not in name
    ]:
        assert time.monotonic() < deadline, f"temporary files stay: {left}"
        time.sleep(0.05)


def _sent_without_length(server: RunningServer, kind: str) -> int:
    """The status for an endless body in chunks: it comes before the body's end, which never comes."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    connection.putrequest("POST", "/v1/videos")
    for name, value in (
        ("Authorization", f"Bearer {KEYS['ada']}"), ("Content-Type", kind), ("Transfer-Encoding", "chunked"),
    ):  # fmt: skip
        connection.putheader(name, value)
    connection.endheaders()
    piece = (
        b'--x\r\nContent-Disposition: form-data; name="input_reference"; filename="a"\r\n\r\n' + b"a" * 65_000
    )
    try:
        for _ in range(BODY_LIMIT // len(piece) + 3):
            connection.send(b"%x\r\n" % len(piece) + piece + b"\r\n")
            piece = b"a" * len(piece)
    except (BrokenPipeError, ConnectionResetError):
        pass  # it has been refused already
    status = connection.getresponse().status
    connection.close()
    return status


def _open_files(pid: int) -> set[str]:
    found = set()
    for entry in os.scandir(f"/proc/{pid}/fd"):
        try:
            found.add(os.readlink(entry.path))
        except FileNotFoundError:
            continue
    return found


def test_no_more_viewers_than_allowed(ada: httpx.Client, video: dict[str, Any]) -> None:
    made = ada.post("/v1/videos", json={**SHORT, "num_frames": 8000, "num_inference_steps": 8}).json()
    url = f"/v1/videos/{made['id']}/events"
    with ada.stream("GET", url) as first, ada.stream("GET", url) as second:
        assert (first.status_code, second.status_code) == (200, 200)
        watching = first.iter_raw(), second.iter_raw()
        assert all(next(pieces) for pieces in watching)
        third = ada.get(url)
        assert third.status_code == 503 and code(third) == "too_many_viewers"
        assert ada.get(f"/v1/videos/{made['id']}/stream").status_code == 503
    ada.delete(f"/v1/videos/{made['id']}")
    deadline = time.monotonic() + 10
    while ada.get(f"/v1/videos/{video['id']}/events").status_code != 200:
        assert time.monotonic() < deadline, "a viewer who left keeps a place"
        time.sleep(0.05)


def test_other_machines_are_let_in_by_key_only(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("open")
    for host in ("0.0.0.0", "::", "192.0.2.1", "example.org"):
        with pytest.raises(ValueError, match="keys") as caught:
            load_server_config(None, {"host": host, "data": str(folder)})
        assert "\n" not in str(caught.value)


def test_a_taken_address_or_folder_is_told_in_a_line(server: RunningServer, tmp_path_factory: Any) -> None:
    folder = tmp_path_factory.mktemp("taken")
    for settings in ({"port": server.port, "data": str(folder)}, {"port": 0, "data": str(server.data)}):
        with pytest.raises(ValueError) as caught:
            serve(load_server_config(None, settings))
        assert "\n" not in str(caught.value) and str(list(settings.values())[0]) in str(caught.value) + "0"
