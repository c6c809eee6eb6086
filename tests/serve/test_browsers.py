"""What pages of other sites, other names and odd paths can do: nothing."""

import os
import re
from urllib.parse import quote

import pytest

from tests.serve.conftest import RunningServer, running
from tests.serve.requests_made import SHORT, code
from tests.serve.sockets import handshake, raw


@pytest.mark.parametrize(
    ("origin", "allowed"),
    [
        ("http://127.0.0.1:{port}", True), ("https://127.0.0.1:{port}", True), ("http://evil.example", False),
        ("http://127.0.0.1:1", False), ("http://localhost:{port}", False), ("null", False), ("", False),
        ("file://127.0.0.1:{port}", False), ("http://127.0.0.1:{port}.evil.example", False), ("http://[",
        False),
    ],
)  # fmt: skip
def test_pages_of_other_sites_can_change_nothing(server: RunningServer, origin: str, allowed: bool) -> None:
    origin = origin.format(port=server.port)
    with server.client() as client:
        answer = client.post("/v1/tickets", headers={"Origin": origin})
        assert answer.status_code == (200 if allowed else 403), answer.text
        assert allowed or code(answer) == "origin_not_allowed"
        assert "access-control-allow-origin" not in answer.headers
    assert handshake(server, Origin=origin) == (101 if allowed else 403)


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1", 200), ("localhost:1234", 200), ("[::1]:80", 200), ("LOCALHOST", 200), ("evil.example",
        403),
        ("127.0.0.1.evil.example", 403), ("", 400), ("a b", 400), ("x; script-src *", 400), ("localhost:x",
        400),
    ],
)  # fmt: skip
def test_a_name_that_is_not_the_servers_is_refused(server: RunningServer, host: str, status: int) -> None:
    for path in ("/health", "/", "/v1/videos"):
        text = raw(server, f"GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
        assert text.startswith(f"HTTP/1.1 {status}".encode()), (path, text[:200])


def test_an_allowed_page_elsewhere_may_ask(tmp_path_factory: pytest.TempPathFactory) -> None:
    site = "https://video.example.org"
    data = tmp_path_factory.mktemp("cors") / "data"
    with running(data, ready=False, allowed_origins=[site]) as found, found.client() as client:
        preflight = {"Origin": site, "Access-Control-Request-Method": "POST"}
        assert client.options("/v1/videos", headers=preflight).headers["access-control-allow-origin"] == site
        answer = client.post("/v1/tickets", headers={"Origin": site})
        assert answer.status_code == 200 and answer.headers["access-control-allow-origin"] == site
        assert "access-control-allow-credentials" not in answer.headers
        other = client.post("/v1/tickets", headers={"Origin": "https://evil.example"})
        assert other.status_code == 403 and "access-control-allow-origin" not in other.headers


def test_answers_tell_browsers_to_be_strict(server: RunningServer) -> None:
    with server.client() as client:
        for path in ("/", "/v1/videos", "/nothing", "/health", "/docs", "/metrics"):
            headers = client.get(path).headers
            assert headers["x-content-type-options"] == "nosniff", path
            assert "frame-ancestors 'none'" in headers["content-security-policy"], path
            assert "unsafe-eval" not in headers["content-security-policy"]
            assert "server" not in headers and "access-control-allow-origin" not in headers
            assert path == "/" or headers["cache-control"] == "no-store", path
        assert "blob:" in client.get("/").headers["content-security-policy"]


NAMES = [
    "../../etc/passwd", "/etc/passwd", "....//....//etc/passwd", "..\\..\\windows", "C:\\x", "\\\\host\\x",
    "video_../../../../etc/passwd", "video_" + "0" * 31 + "/", "video_" + "0" * 32 + "/..", "%2e%2e%2fetc",
    "\x00",
    "video_" + "0" * 31 + "\x00", "video_" + "g" * 32, "VIDEO_" + "0" * 32, "video_" + "0" * 33, "video_",
    "*", "~",
    "video_" + "0" * 32 + "\n", "\u202e", "\uff0e\uff0e", "a" * 5000, "server.sqlite", "con",
    "'; DROP TABLE videos",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES, ids=[ascii(name)[:30] for name in NAMES])
def test_names_that_are_no_ids_reach_no_file(server: RunningServer, name: str) -> None:
    before = _names(server)
    with server.client() as client:
        for path in ("", "/content", "/hls/init.mp4", "/hls/index.m3u8", "/events", "/stream"):
            answer = client.get(f"/v1/videos/{quote(name, safe='')}{path}")
            assert answer.status_code in (400, 404), answer.text
            assert "root:" not in answer.text and "SQLite format" not in answer.text
        for path in (name, f"{name}.m4s", "..%2f..%2fjob.yaml", "-1.m4s", "1e1.m4s", "9" * 30 + ".m4s"):
            answer = client.get(f"/v1/videos/video_{'0' * 32}/hls/{quote(path, safe='%')}")
            assert answer.status_code in (400, 404, 405, 422), answer.text
        assert client.delete(f"/v1/videos/{quote(name, safe='')}").status_code in (400, 404)
        assert client.post("/v1/videos", json={**SHORT, "model": name}).status_code in (400, 422)
        assert client.post("/v1/videos", json={**SHORT, "output_path": name}).status_code == 422
    assert _names(server) == before


def test_dots_in_a_path_lead_nowhere(server: RunningServer) -> None:
    for path in (
        "/v1/videos/../../etc/passwd", "/page/../../vidgen/serve/app.py", "/page/x/..%2fapp.py",
        "/../server.sqlite",
        "/page/x/%2e%2e/routes_page.py", "/v1/videos/%00/content", "/page//etc/passwd", "\\..\\x",
    ):  # fmt: skip
        text = raw(server, f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        assert re.match(rb"HTTP/1.1 4\d\d", text), (path, text[:100])
        assert b"import" not in text and b"root:" not in text


def _names(server: RunningServer) -> set[str]:
    return {name for _, _, names in os.walk(server.data) for name in names}
