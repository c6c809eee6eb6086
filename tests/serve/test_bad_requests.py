"""What no client should send: the server says no in one form, at once, and lives on.

By hand for what people and attackers do, and by schemathesis from the API's own description.
"""

import base64
import io
import json
import socket
import struct
import zlib
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from PIL import Image
from schemathesis import GenerationMode, checks
from schemathesis.core.result import Ok

from tests.serve.conftest import RunningServer, running

DEADLINE_S = 10.0
EXAMPLES = 25  # of every operation, right and wrong
QUIET = [HealthCheck.too_slow, HealthCheck.filter_too_much]
ACCEPTED = (200, 429)  # 429: the queue is full of those accepted before
REFUSED = (400, 404, 405, 409, 413, 415, 422, 429)
# small jobs only, and few: what is accepted here by chance is made, too
LIMITS = {"max_queue": 2, "max_frames": 64, "max_steps": 4, "max_body_bytes": 2**20, "max_pixels": 256 * 256}
PROMPT = "a red circle"
PNG_HEAD = b"\x89PNG\r\n\x1a\n"

VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 2**31, 2**63, 2**64, -(2**63), 10**400, 1.5, -0.0, 1e308, "", " ", "x",
    "NaN", "1",
    "-1", "1e400", "0x10", "null", "\x00", "\ud800", "\u202e", "a" * 5000, "\U0001f600" * 300,
    "../../etc/passwd",
    "${jndi:ldap://x}", "'; DROP TABLE videos; --", "<script>", "http://169.254.169.254/", [], [None], [[]],
    [1] * 100,
    {}, {"a": 1}, {"prompt": None}, {"$ref": "#"}, [{}], {"": ""}, {"__class__": "x"}, {"name": "../x"},
    [{"prompt": "a"}],
    [{"prompt": "a", "num_frames": -1}], [{"prompt": "\x00", "num_frames": 16}], {"codec": "mpeg2"},
    {"path": "/tmp/x"},
    {"image_url": "file:///etc/passwd"}, {"image_url": "http://127.0.0.1:1/x.png"},
    {"image_url": "data:image/png;base64,!"},
    {"image_url": "data:image/png;base64," + base64.b64encode(PNG_HEAD).decode()}, {"solver": ["euler"]},
    {"block_frames": -1}, {"device": "cuda"}, {"output": {"path": "/tmp/x"}},
]  # fmt: skip
FIELDS = [
    "prompt", "model", "seconds", "size", "input_reference", "negative_prompt", "width", "height",
    "num_frames", "fps",
    "num_inference_steps", "guidance_scale", "guidance_scale_2", "flow_shift", "seed", "lora", "extra_params",
    "segments", "output", "priority", "output_path", "id", "",
]  # fmt: skip
BODIES: list[bytes] = [
    b"", b" ", b"{", b"}", b"{}", b"[]", b"null", b"true", b"1", b'"x"', b"nan", b'{"prompt": NaN}',
    b"{'prompt': 'a'}",
    b'{"prompt": "a",}', b'{"prompt": "a"} x', b'{"prompt": "a", "prompt": "b"}', b"\xff\xfe",
    b"\xef\xbb\xbf{}",
    '{"prompt": "a"}'.encode("utf-16"), '{"prompt": "a"}'.encode("utf-32"), b'{"prompt": "\xff"}',
    b"\x00" * 100,
    b"[" * 100_000, b'{"a":' * 50_000, b"1" * 100_000, b'{"seed": ' + b"9" * 20_000 + b"}",
    b'{"prompt": "\\ud800"}',
    b'{"prompt": "\\u0000"}', b'{"prompt": {"a": ' + b"[" * 500 + b"]" * 500 + b"}}", b'{"seed": 1e999}',
    b'{"prompt": "a", "seed": -0}', b"\x1f\x8b\x08\x00", b"PK\x03\x04", b"<xml/>", b"prompt=a", b"--x\r\n",
    b'{"\\ud800": 1}',
    b'{"' + b"k" * 100_000 + b'": 1}', b"{" + b",".join(b'"k%d": 1' % i for i in range(20_000)) + b"}",
    b'{"segments": [' + b",".join([b'{"prompt": "a", "num_frames": 1}'] * 5000) + b"]}", b"x" * (2**20 + 1),
]  # fmt: skip
KINDS = [
    "application/json", "application/json; charset=utf-8", "APPLICATION/JSON",
    "application/json; charset=klingon",
    "text/plain", "", "application/x-www-form-urlencoded", "application/xml", "multipart/form-data",
    "a/b/c", ";",
    "multipart/form-data; boundary=", "multipart/form-data; boundary=" + "x" * 300,
    "application/octet-stream",
    "multipart/mixed; boundary=x", "application/jsonx", "multipart/form-data; boundary=x; charset=klingon",
]  # fmt: skip
PART = b'--x\r\nContent-Disposition: form-data; name="%s"%s\r\n\r\n%s\r\n'
FORMS: list[bytes] = [
    b"", b"--x", b"--x--", b"--x--\r\n", b"--y--\r\n", b"--x\r\n\r\n--x--\r\n", b"garbage", b"\r\n" * 1000,
    PART % (b"prompt", b"", b"a"), PART % (b"prompt", b"", b"a") * 2 + b"--x--\r\n", PART % (b"", b"",
    b"a") + b"--x--\r\n",
    PART % (b"prompt", b"", b"\xff\xfe") + b"--x--\r\n", PART % (b"\xff", b"", b"a") + b"--x--\r\n",
    PART % (b"prompt", b'; filename="x"', b"a") + b"--x--\r\n", PART % (b"segments", b"",
    b"{") + b"--x--\r\n",
    PART % (b"segments[][prompt]", b"", b"a") + b"--x--\r\n", PART % (b"output[crf]", b"",
    b"x") + b"--x--\r\n",
    PART % (b"output[crf]", b"", b"1") + PART % (b"output", b"", b"{}") + b"--x--\r\n",
    PART % (b"prompt[a]", b"", b"a") + b"--x--\r\n", PART % (b"[]", b"", b"a") + b"--x--\r\n",
    PART % (b"seconds", b"", b"-4") + b"--x--\r\n", PART % (b"size", b"", b"0x0") + b"--x--\r\n",
    PART % (b"input_reference", b"", b"text") + b"--x--\r\n", PART % (b"extra_params", b"",
    b"[" * 20_000) + b"--x--\r\n",
    PART % (b"input_reference", b'; filename="../../x"', b"no picture") + b"--x--\r\n",
    PART % (b"input_reference", b'; filename="a\x00b.png"', PNG_HEAD) + b"--x--\r\n",
    (PART % (b"input_reference", b'; filename="a"', PNG_HEAD)) * 2 + b"--x--\r\n", PART % (b"a", b"",
    b"a") * 400 + b"--x--\r\n",
    b"--x\r\nContent-Disposition: form-data\r\n\r\na\r\n--x--\r\n",
    b"--x\r\nContent-Disposition: x\r\n\r\na\r\n--x--\r\n",
    b"--x\r\nX: " + b"y" * 100_000 + b"\r\n\r\n--x--\r\n",
    b"--x\r\n" + b"A: b\r\n" * 5000 + b"\r\na\r\n--x--\r\n",
    PART % (b"prompt", b"", b"p" * 500_000) + b"--x--\r\n",
]  # fmt: skip
QUERIES = [
    "limit=0", "limit=-1", "limit=101", "limit=x", "limit=", "limit=1e2", "limit=99999999999999999999",
    "order=up", "order=",
    "after=", "after=x", "after=../..", "after=%00", "after=%ff", "after=video_" + "0" * 32,
    "limit=1&limit=2", "&&&", "%",
    "after=" + "a" * 10_000, "order=desc&order=x", "limit=1;drop", "limit[]=1", "limit=٣",
    "after=%F0%9F%98%80", "x=1",
]  # fmt: skip


@pytest.fixture(scope="module")
def strict(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A server with tight limits. To the end it lives, has no traceback in its log, and no worker has died or
    stumbled over what was accepted here."""
    with running(tmp_path_factory.mktemp("bad") / "data", limits=LIMITS) as found:
        yield found
        with found.client() as client:
            assert client.get("/health").status_code == 200
            videos = client.get("/v1/videos", params={"limit": 100}).json()["data"]
        codes = {video["error"]["code"] for video in videos if video["error"]}
        assert codes <= {"invalid_request"}, [video["error"] for video in videos]
        assert "Traceback" not in found.log, found.log


@pytest.fixture(scope="module")
def client(strict: RunningServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=strict.url, timeout=DEADLINE_S, trust_env=False) as found:
        yield found


def check(answer: httpx.Response, what: Any) -> None:
    """The answer is a yes, or a no in the one form."""
    shown = f"{ascii(what)[:200]} -> {answer.status_code} {answer.text[:300]}"
    assert answer.status_code in (*ACCEPTED, *REFUSED), shown
    assert "Traceback" not in answer.text and 'File "' not in answer.text, shown
    if answer.status_code == 200:
        return
    body = answer.json()
    assert set(body) == {"error"} and set(body["error"]) == {"type", "code", "message", "param"}, shown
    assert body["error"]["message"] and "\n" not in body["error"]["message"], shown
    assert len(answer.content) < 4000, shown


def send(client: httpx.Client, body: bytes, kind: str = "application/json") -> httpx.Response:
    return client.post("/v1/videos", content=body, headers={"Content-Type": kind})


def test_there_are_enough_cases() -> None:
    assert len(FIELDS) * len(VALUES) + len(BODIES) + len(KINDS) + len(FORMS) + len(QUERIES) >= 300


@pytest.mark.parametrize("field", FIELDS)
def test_a_field_may_be_anything(client: httpx.Client, field: str) -> None:
    for value in VALUES:
        body = {"prompt": PROMPT, "num_frames": 17, "num_inference_steps": 1, field: value}
        check(send(client, json.dumps(body).encode()), {field: value})


def test_a_body_may_be_anything(client: httpx.Client) -> None:
    for body in BODIES:
        answer = send(client, body)
        check(answer, body)
        assert answer.status_code != 200 or body == b'{"prompt": "a", "seed": -0}', body[:100]


def test_a_content_type_may_be_anything(client: httpx.Client) -> None:
    for kind in KINDS:
        answer = send(client, b'{"prompt": "a"}', kind)
        check(answer, kind)
        if kind.partition(";")[0].lower() not in ("application/json", "multipart/form-data"):
            assert answer.status_code == 415, kind


def test_a_form_may_be_anything(client: httpx.Client) -> None:
    for body in FORMS:
        check(send(client, body, "multipart/form-data; boundary=x"), body)


def test_a_query_may_be_anything(client: httpx.Client) -> None:
    for query in QUERIES:
        check(client.get(f"/v1/videos?{query}"), query)
        check(client.get(f"/v1/videos/video_{'0' * 32}/content?variant={query}&partial={query}"), query)


def test_a_ticket_request_may_be_anything(client: httpx.Client) -> None:
    for value in VALUES:
        answer = client.post(
            "/v1/tickets",
            content=json.dumps({"video_id": value}).encode(),
            headers={"Content-Type": "application/json"},
        )
        check(answer, value)
        assert (answer.status_code == 200) == (value is None), value


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def pictures() -> dict[str, bytes]:
    """Pictures that are none, or too large once unpacked, or broken."""
    good = io.BytesIO()
    Image.new("RGB", (64, 64)).save(good, "PNG")
    whole = good.getvalue()
    gif = io.BytesIO()
    Image.new("P", (8, 8)).save(gif, "GIF")
    size = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    bomb = (
        PNG_HEAD + chunk(b"IHDR", size) + chunk(b"IDAT", zlib.compress(b"\0" * 10**7)) + chunk(b"IEND", b"")
    )
    text = chunk(b"zTXt", b"a\0\0" + zlib.compress(b"\0" * 10**8, 9))
    return {
        "empty": b"", "text": b"hello", "head": PNG_HEAD, "cut": whole[: len(whole) // 2], "bomb": bomb,
        "gif": gif.getvalue(),
        "text_bomb": whole[:33] + text + whole[33:], "svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        "crc": whole[:40] + b"\xff\xff" + whole[42:], "zeros": bytes(1000), "pdf": b"%PDF-1.4",
        "eps": b"%!PS-Adobe-3.0 EPSF-3.0",
        "no_pixels": PNG_HEAD + chunk(b"IHDR", struct.pack(">IIBBBBB", 0, 0, 8, 2, 0, 0,
        0)) + chunk(b"IEND", b""),
    }  # fmt: skip


@pytest.mark.parametrize("name", pictures())
def test_a_picture_that_is_none_is_refused(client: httpx.Client, strict: RunningServer, name: str) -> None:
    data = pictures()[name]
    before = set(strict.data.rglob("*.png"))
    form = client.post(
        "/v1/videos", data={"prompt": PROMPT}, files={"input_reference": (f"{name}.png", data, "image/png")}
    )
    url = "data:image/png;base64," + base64.b64encode(data).decode()
    inside = client.post("/v1/videos", json={"prompt": PROMPT, "input_reference": {"image_url": url}})
    for answer in (form, inside):
        check(answer, name)
        assert answer.status_code in (400, 413), answer.text
    assert {path for path in strict.data.rglob("*.png") if path.parent.name == "inputs"} <= before


RAW = [
    b"\r\n\r\n", b"GET\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"\x00" * 100, b"\x16\x03\x01\x02\x00" * 20,
    b"SSH-2.0-x\r\n",
    b"GET / HTTP/1.1\r\n\r\n", b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
    b"GET " + b"/" * 100_000 + b" HTTP/1.1\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"y" * 200_000 + b"\r\n\r\n",
    b"FOO /v1/videos HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"A: b\r\n" * 20_000 + b"\r\n",
    b"GET http://evil/ HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"POST /v1/videos HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"POST /v1/videos HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9999999999999999999999\r\n\r\n",
    b"POST /v1/videos HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
    b"POST /v1/videos HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n"
    b"0\r\n\r\nGET",
    b"POST /v1/videos HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    b"POST /v1/videos HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: gzip\r\n\r\n",
    b"OPTIONS * HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET /v1/videos/%zz HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET /v1/videos/\xff HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"TRACE / HTTP/1.1\r\nHost: localhost\r\n\r\n", b"CONNECT evil:80 HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET /v1/realtime/video HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\n"
    b"Upgrade: websocket\r\n\r\n",
    b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n",
    b"GET /v1/videos HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    b"Sec-WebSocket-Version: 13\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n",
]  # fmt: skip


@pytest.mark.parametrize("data", RAW, ids=[ascii(data)[:40] for data in RAW])
def test_bytes_that_are_no_request_end_in_an_answer(
    client: httpx.Client, strict: RunningServer, data: bytes
) -> None:
    with socket.create_connection(("127.0.0.1", strict.port), timeout=DEADLINE_S) as found:
        try:
            found.sendall(data)
            found.shutdown(socket.SHUT_WR)
            text = b""
            while piece := found.recv(65536):
                text += piece
        except TimeoutError:
            raise
        except OSError:
            text = b""  # hung up on while still talking
    assert b"Traceback" not in text and not text.startswith(b"HTTP/1.1 5"), text[:300]
    assert client.get("/health").status_code == 200


def test_who_leaves_in_the_middle_of_a_body_is_forgotten(client: httpx.Client, strict: RunningServer) -> None:
    for kind in KINDS[:1] + ["multipart/form-data; boundary=x"]:
        fields = "Host: localhost", f"Content-Type: {kind}", "Content-Length: 9999"
        head = "\r\n".join(["POST /v1/videos HTTP/1.1", *fields, "", ""])
        with socket.create_connection(("127.0.0.1", strict.port), timeout=DEADLINE_S) as found:
            found.sendall(head.encode() + b'--x\r\nContent-Disposition: form-data; name="prompt"\r\n\r\na')
    assert client.get("/health").status_code == 200


# what a schema allows a server's limits may still refuse, and numbers in text are taken as forms have them:
# so neither positive_data_acceptance nor negative_data_rejection
CHECKS = [
    checks.not_a_server_error, checks.status_code_conformance, checks.content_type_conformance,
    checks.response_headers_conformance, checks.response_schema_conformance, checks.unsupported_method,
]  # fmt: skip


@pytest.mark.parametrize("mode", GenerationMode)
def test_the_server_does_what_its_description_says(strict: RunningServer, mode: GenerationMode) -> None:
    api = schemathesis.openapi.from_url(f"{strict.url}/openapi.json")
    results = list(api.get_all_operations())
    operations = [result.ok() for result in results if isinstance(result, Ok)]
    assert len(operations) == len(results) >= 15
    for operation in operations:

        @settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=QUIET)
        @given(case=operation.as_strategy(generation_mode=mode))
        def holds(case: schemathesis.Case) -> None:
            case.validate_response(case.call(timeout=DEADLINE_S), checks=CHECKS)

        try:
            holds()
        except Unsatisfiable:  # nothing about it can be wrong
            assert mode is GenerationMode.NEGATIVE
