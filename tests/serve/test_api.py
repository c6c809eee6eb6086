"""The HTTP API of a running server: videos as jobs, their bytes, and what the server says of itself."""

import asyncio
import io
import json
import re
import signal
import time
from collections.abc import Iterator
from typing import Any

import av
import httpx
import psutil
import pytest
from PIL import Image

from tests.serve.conftest import RunningServer, running
from vidgen.serve.app import make_app
from vidgen.serve.config import load_server_config

PROMPT = "a red circle moving left over a gray background"
SHORT = {"prompt": PROMPT, "num_frames": 33, "num_inference_steps": 4, "seed": 3}
LONG = {"prompt": PROMPT, "num_frames": 4000, "num_inference_steps": 8, "seed": 3}
VIDEO_FIELDS = {
    "id", "object", "model", "status", "progress", "created_at", "completed_at", "expires_at", "prompt",
    "seconds", "size", "remixed_from_video_id", "error", "queue_position", "chunks_done", "chunks_total",
    "frames_done", "eta_s", "attempt", "seed",
}  # fmt: skip


@pytest.fixture(scope="module")
def client(server: RunningServer) -> Iterator[httpx.Client]:
    with server.client() as found:
        yield found


@pytest.fixture(scope="module")
def done(server: RunningServer, client: httpx.Client) -> dict[str, Any]:
    """A completed video."""
    return server.wait(create(client, **SHORT)["id"])


@pytest.fixture
def long(server: RunningServer, client: httpx.Client) -> Iterator[dict[str, Any]]:
    """A video that is being made, with chunks already."""
    video = create(client, **LONG)
    yield server.wait(video["id"], until=lambda now: now["chunks_done"] >= 2)
    client.delete(f"/v1/videos/{video['id']}")


def create(client: httpx.Client, **fields: Any) -> dict[str, Any]:
    answer = client.post("/v1/videos", json=fields)
    assert answer.status_code == 200, answer.text
    return answer.json()


def refused(answer: httpx.Response, status: int, code: str | None = None) -> dict[str, Any]:
    """The error of an answer, held against the form that all have."""
    assert answer.status_code == status, answer.text
    body = answer.json()
    assert set(body) == {"error"} and set(body["error"]) == {"type", "code", "message", "param"}
    assert code in (None, body["error"]["code"]), body
    assert "\n" not in body["error"]["message"] and "Traceback" not in answer.text
    return body["error"]


def decoded(data: bytes) -> list[int]:
    """Presentation times of all frames that a player gets out of these bytes."""
    with av.open(io.BytesIO(data), "r") as container:
        return [frame.pts for frame in container.decode(video=0) if frame.pts is not None]


def test_a_video_is_made_with_the_fields_of_the_api(done: dict[str, Any]) -> None:
    assert set(done) >= VIDEO_FIELDS
    assert (done["object"], done["status"], done["progress"]) == ("video", "completed", 100)
    assert (done["size"], done["seed"]) == ("256x256", 3)
    assert float(done["seconds"]) == pytest.approx(33 / done["fps"], abs=1e-3)
    assert done["frames_done"] == 33 and done["chunks_done"] == done["chunks_total"]
    assert done["error"] is None and done["completed_at"] >= done["created_at"]


def test_a_form_says_the_same_as_json(
    client: httpx.Client, server: RunningServer, done: dict[str, Any]
) -> None:
    fields = {name: (None, str(value)) for name, value in SHORT.items()}
    answer = client.post("/v1/videos", files=fields)
    assert answer.status_code == 200, answer.text
    again = server.wait(answer.json()["id"])
    mine, theirs = (client.get(f"/v1/videos/{video['id']}/content").content for video in (again, done))
    assert decoded(mine) == decoded(theirs)
    assert client.get(f"/v1/videos/{again['id']}/hls/1.m4s").content == (
        client.get(f"/v1/videos/{done['id']}/hls/1.m4s").content
    )


def test_a_picture_comes_by_form_or_inside_json_and_begins_the_video(
    client: httpx.Client, server: RunningServer
) -> None:
    picture = io.BytesIO()
    Image.new("RGB", (32, 32), (200, 40, 40)).save(picture, "PNG")
    form = client.post(
        "/v1/videos",
        data={name: str(value) for name, value in SHORT.items()},
        files={"input_reference": ("../../etc/passwd", picture.getvalue(), "image/png")},
    )
    assert form.status_code in (200, 400), form.text
    if form.status_code == 400:
        pytest.skip(f"the model takes no picture: {form.json()['error']['message']}")
    video = server.wait(form.json()["id"])
    assert video["status"] == "completed", video
    kept = [path for path in (server.data / "inputs").iterdir() if video["id"] in path.name]
    assert [path.name for path in kept] == [f"{video['id']}.png"]


def test_polling_is_told_when_to_ask_again_until_the_end(
    client: httpx.Client, done: dict[str, Any], long: dict[str, Any]
) -> None:
    assert int(client.get(f"/v1/videos/{long['id']}").headers["openai-poll-after-ms"]) > 0
    assert "openai-poll-after-ms" not in client.get(f"/v1/videos/{done['id']}").headers


@pytest.mark.parametrize("order", ["asc", "desc"])
def test_pages_show_every_video_once_in_order(client: httpx.Client, done: dict[str, Any], order: str) -> None:
    for _ in range(3):
        create(client, **SHORT)
    whole = client.get("/v1/videos", params={"limit": 100, "order": order}).json()
    assert whole["object"] == "list" and not whole["has_more"]
    ids, after = [], None
    while True:
        page = client.get(
            "/v1/videos", params={"limit": 2, "order": order, **({"after": after} if after else {})}
        )
        found = page.json()
        ids += [video["id"] for video in found["data"]]
        assert (found["first_id"], found["last_id"]) == (found["data"][0]["id"], found["data"][-1]["id"])
        if not found["has_more"]:
            break
        after = found["last_id"]
    assert ids == [video["id"] for video in whole["data"]] and len(set(ids)) == len(ids) >= 4
    for video in whole["data"]:
        if video["id"] != done["id"] and video["status"] in ("queued", "in_progress"):
            client.delete(f"/v1/videos/{video['id']}")


RANGES = [
    ("bytes=0-0", 206, (0, 1)), ("bytes=0-99", 206, (0, 100)), ("bytes=100-", 206, (100, None)),
    ("bytes=-1", 206, (-1, None)), ("bytes=-100", 206, (-100, None)), ("bytes=-999999999", 206, (0, None)),
    ("bytes=5-999999999", 206, (5, None)), ("BYTES=0-9", 200, (0, None)), ("bytes=9-5", 200, (0, None)),
    ("bytes=", 200, (0, None)), ("bytes=-", 200, (0, None)), ("bytes=a-b", 200, (0, None)),
    ("bytes=0-1,5-6", 200, (0, None)), ("frames=0-1", 200, (0, None)), ("bytes=-0", 416, None),
    ("bytes=99999999-", 416, None), ("bytes=99999999-100000000", 416, None),
    ("bytes=" + "9" * 40 + "-", 200, (0, None)),
]  # fmt: skip


@pytest.mark.parametrize(("header", "status", "part"), RANGES, ids=[case[0][:24] for case in RANGES])
def test_a_range_is_that_part_of_the_whole(
    client: httpx.Client, done: dict[str, Any], header: str, status: int, part: tuple[int, int | None] | None
) -> None:
    url = f"/v1/videos/{done['id']}/content"
    whole = client.get(url).content
    answer = client.get(url, headers={"Range": header})
    if part is None:
        refused(answer, 416)
        assert answer.headers["content-range"] == f"bytes */{len(whole)}"
        return
    assert answer.status_code == status
    wanted = whole[slice(*part)]
    assert answer.content == wanted and int(answer.headers["content-length"]) == len(wanted)
    if status == 206:
        start = len(whole) + part[0] if part[0] < 0 else part[0]
        assert answer.headers["content-range"] == f"bytes {start}-{start + len(wanted) - 1}/{len(whole)}"


def test_a_range_of_another_version_is_the_whole(client: httpx.Client, done: dict[str, Any]) -> None:
    url = f"/v1/videos/{done['id']}/content"
    etag = client.get(url).headers["etag"]
    assert client.get(url, headers={"Range": "bytes=0-9", "If-Range": etag}).status_code == 206
    assert client.get(url, headers={"Range": "bytes=0-9", "If-Range": '"other"'}).status_code == 200
    assert client.get(url, headers={"If-None-Match": etag}).status_code == 304
    head = client.head(url)
    assert head.status_code == 200 and not head.content
    assert int(head.headers["content-length"]) == len(client.get(url).content)


def test_the_file_plays_and_its_name_is_the_servers(client: httpx.Client, done: dict[str, Any]) -> None:
    answer = client.get(f"/v1/videos/{done['id']}/content")
    assert answer.headers["content-type"] == "video/mp4"
    assert answer.headers["content-disposition"] == f'inline; filename="{done["id"]}.mp4"'
    assert len(decoded(answer.content)) == 33


@pytest.mark.parametrize(("variant", "kind"), [("thumbnail", "JPEG"), ("spritesheet", "PNG")])
def test_pictures_of_a_video_are_pictures(
    client: httpx.Client, done: dict[str, Any], variant: str, kind: str
) -> None:
    answer = client.get(f"/v1/videos/{done['id']}/content", params={"variant": variant})
    assert answer.status_code == 200, answer.text
    with Image.open(io.BytesIO(answer.content)) as picture:
        assert picture.format == kind and answer.headers["content-type"] == f"image/{kind.lower()}"
        assert picture.width >= 256


def test_an_unfinished_video_is_a_conflict_unless_a_part_is_wanted(
    client: httpx.Client, long: dict[str, Any]
) -> None:
    url = f"/v1/videos/{long['id']}/content"
    refused(client.get(url), 409, "not_ready")
    refused(client.get(url, params={"variant": "spritesheet"}), 409, "not_ready")
    part = client.get(url, params={"partial": "true"})
    assert part.status_code == 200, part.text
    times = decoded(part.content)
    assert len(times) >= 2 * 13 and times == sorted(set(times))
    tail = client.get(url, params={"partial": "true"}, headers={"Range": "bytes=10-29"})
    assert tail.status_code == 206 and tail.content == part.content[10:30]


def test_deleting_a_running_video_lets_the_next_begin_and_leaves_nothing(
    client: httpx.Client, server: RunningServer
) -> None:
    video = create(client, **LONG)
    server.wait(video["id"], until=lambda now: now["chunks_done"] >= 1)
    started = time.monotonic()
    answer = client.delete(f"/v1/videos/{video['id']}")
    assert answer.json() == {"id": video["id"], "object": "video.deleted", "deleted": True}
    after = server.wait(create(client, **SHORT)["id"])
    assert after["status"] == "completed" and time.monotonic() - started < 15
    refused(client.get(f"/v1/videos/{video['id']}"), 404, "not_found")
    refused(client.delete(f"/v1/videos/{video['id']}"), 404, "not_found")
    assert not list((server.data / "videos").glob(f"*{video['id']}*"))


def test_cancel_and_resume_may_be_said_twice_and_the_video_comes_out_whole(
    client: httpx.Client, server: RunningServer, done: dict[str, Any]
) -> None:
    fields = {**SHORT, "num_frames": 161}
    video = create(client, **fields)
    url = f"/v1/videos/{video['id']}"
    server.wait(video["id"], until=lambda now: now["chunks_done"] >= 1)
    first, second = (client.post(f"{url}/cancel").json() for _ in range(2))
    assert first["status"] == second["status"] == "failed" and first["error"]["code"] == "cancelled"
    refused(client.get(f"{url}/content"), 409, "video_failed")
    assert decoded(client.get(f"{url}/content", params={"partial": "true"}).content)
    assert {client.post(f"{url}/resume").json()["status"] for _ in range(2)} <= {"queued", "in_progress"}
    ended = server.wait(video["id"])
    assert ended["status"] == "completed" and ended["frames_done"] == 161
    assert client.post(f"{url}/cancel").json() == client.post(f"{url}/resume").json() == ended
    assert len(decoded(client.get(f"{url}/content").content)) == 161


def events(
    client: httpx.Client, video_id: str, last: str | None = None, stop_after: int | None = None
) -> list[Any]:
    """(id, name, data) of the events, to the end of the stream."""
    found: list[Any] = []
    headers = {} if last is None else {"Last-Event-ID": last}
    with client.stream("GET", f"/v1/videos/{video_id}/events", headers=headers, timeout=40) as answer:
        assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/event-stream")
        lines: dict[str, str] = {}
        for line in answer.iter_lines():
            if line:
                name, _, value = line.partition(": ")
                lines[name] = value
            elif "data" in lines:
                found.append((lines["id"], lines["event"], json.loads(lines["data"])))
                lines = {}
                if stop_after is not None and len(found) >= stop_after:
                    break
    return found


def test_events_tell_every_chunk_and_end_with_the_status(client: httpx.Client) -> None:
    video = create(client, **SHORT)
    found = events(client, video["id"])
    chunks = [data["index"] for _, name, data in found if name == "chunk"]
    assert chunks == list(range(video["chunks_total"]))
    assert found[-1][1] == "status" and found[-1][2]["status"] == "completed"
    numbers = [int(number) for number, _, _ in found]
    assert numbers == sorted(numbers)


def test_events_go_on_after_the_last_one_that_was_seen(client: httpx.Client, done: dict[str, Any]) -> None:
    whole = events(client, done["id"])
    seen = events(client, done["id"], stop_after=2)
    assert seen + events(client, done["id"], last=seen[-1][0]) == whole
    assert events(client, done["id"], last=whole[-1][0]) == []
    assert events(client, done["id"], last="99999999999999999999999") == []


def test_a_stream_grows_with_the_video_and_has_every_frame(
    client: httpx.Client, server: RunningServer
) -> None:
    video = create(client, **{**SHORT, "num_frames": 129})
    pieces: list[bytes] = []
    statuses: set[str] = set()
    with client.stream("GET", f"/v1/videos/{video['id']}/stream", timeout=40) as answer:
        assert answer.status_code == 200 and answer.headers["content-type"] == "video/mp4"
        for piece in answer.iter_bytes():
            pieces.append(piece)
            statuses.add(client.get(f"/v1/videos/{video['id']}").json()["status"])
    assert "in_progress" in statuses, "nothing came before the video's end"
    times = decoded(b"".join(pieces))
    assert len(times) == 129 and times == sorted(set(times))


def viewers(client: httpx.Client) -> float:
    return metric(client.get("/metrics").text, "vidgen_viewers")


def metric(text: str, name: str) -> float:
    found = re.search(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)
    assert found, f"{name} is not in\n{text}"
    return float(found[1])


def eventually(holds: Any, what: str, deadline_s: float = 10) -> None:
    deadline = time.monotonic() + deadline_s
    while not holds():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


@pytest.mark.parametrize("kind", ["stream", "events"])
def test_a_viewer_who_leaves_frees_the_place(client: httpx.Client, long: dict[str, Any], kind: str) -> None:
    eventually(lambda: viewers(client) == 0, "viewers of earlier tests stay")
    for _ in range(3):
        with client.stream("GET", f"/v1/videos/{long['id']}/{kind}") as answer:
            pieces = answer.iter_raw()
            next(pieces)
            assert viewers(client) == 1
            del pieces
    eventually(lambda: viewers(client) == 0, "a viewer who left still counts")


def test_hls_lists_what_is_there_and_ends_when_the_video_does(
    client: httpx.Client, done: dict[str, Any], long: dict[str, Any]
) -> None:
    growing = client.get(f"/v1/videos/{long['id']}/hls/index.m3u8").text
    assert "#EXT-X-ENDLIST" not in growing and "PLAYLIST-TYPE" not in growing
    answer = client.get(f"/v1/videos/{done['id']}/hls/index.m3u8")
    assert answer.headers["content-type"].startswith("application/vnd.apple.mpegurl")
    lines = answer.text.splitlines()
    assert lines[0] == "#EXTM3U" and lines[-1] == "#EXT-X-ENDLIST"
    durations = [float(line[8:-1]) for line in lines if line.startswith("#EXTINF:")]
    assert sum(durations) == pytest.approx(33 / 16, abs=1e-5)
    target = next(int(line.partition(":")[2]) for line in lines if line.startswith("#EXT-X-TARGETDURATION"))
    assert all(round(duration) <= target for duration in durations)
    names = [line for line in lines if not line.startswith("#")]
    init = next(re.findall('URI="(.*)"', line)[0] for line in lines if line.startswith("#EXT-X-MAP"))
    data = b"".join(client.get(f"/v1/videos/{done['id']}/hls/{name}").content for name in [init, *names])
    assert len(decoded(data)) == 33
    refused(client.get(f"/v1/videos/{done['id']}/hls/{len(names)}.m4s"), 404, "no_such_chunk")


def test_the_server_tells_its_models_and_that_it_is_ready(client: httpx.Client) -> None:
    models = client.get("/v1/models").json()
    assert models["object"] == "list" and [model["id"] for model in models["data"]] == ["builtin"]
    assert models["data"][0]["defaults"]["size"] == "256x256"
    assert client.get("/health").json() == {"status": "ok"}
    ready = client.get("/ready").json()
    assert ready["status"] == "ready" and len(ready["replicas"]) == 1


def test_metrics_count_what_happened(client: httpx.Client, server: RunningServer) -> None:
    before = client.get("/metrics").text
    server.wait(create(client, **SHORT)["id"])

    def grew(name: str) -> bool:
        return metric(client.get("/metrics").text, name) > metric(before, name)

    for name in (
        'vidgen_first_frame_seconds_count{kind="video"}', 'vidgen_chunk_gap_seconds_count{kind="video"}',
        'vidgen_videos{status="completed"}',
        'vidgen_request_seconds_count{method="POST",route="/v1/videos",status="200"}',
    ):  # fmt: skip
        eventually(lambda name=name: grew(name), f"{name} did not grow")
    assert metric(before, "vidgen_ready") == 1 and metric(before, "vidgen_queue_depth") >= 0


def test_the_api_is_described_without_a_network(client: httpx.Client) -> None:
    api = client.get("/openapi.json").json()
    assert "/v1/videos/{video_id}/content" in api["paths"] and "VideoRequest" in api["components"]["schemas"]
    page = client.get("/docs")
    assert page.headers["content-type"].startswith("text/html") and "/v1/videos/{video_id}" in page.text
    assert "<script" not in page.text and "http://" not in page.text.replace(str(client.base_url), "")


def test_what_is_not_there_is_told_in_the_same_form(client: httpx.Client) -> None:
    refused(client.get("/v1/nothing"), 404, "unknown_route")
    refused(client.get("/v1/videos/"), 404)
    wrong = client.put("/v1/videos", json={})
    refused(wrong, 405, "method_not_allowed")
    assert "POST" in wrong.headers["allow"] or "GET" in wrong.headers["allow"]


def test_a_route_that_fails_tells_nothing_of_the_code(
    tmp_path_factory: pytest.TempPathFactory, caplog: pytest.LogCaptureFixture
) -> None:
    data = tmp_path_factory.mktemp("failing") / "data"
    app = make_app(load_server_config(None, {"data": str(data)}))
    app.add_api_route("/boom", lambda: 1 // 0)

    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as asking:
            return await asking.get("/boom")

    answer = asyncio.run(ask())
    app.state.server.store.close()
    refused(answer, 500, "internal_error")
    assert "ZeroDivision" not in answer.text and "ZeroDivisionError" in caplog.text
    assert answer.headers["x-content-type-options"] == "nosniff"


def test_ready_says_no_while_a_worker_is_gone(tmp_path_factory: pytest.TempPathFactory) -> None:
    with running(tmp_path_factory.mktemp("unready") / "data") as found, found.client() as client:
        workers = [
            one for one in psutil.Process(found.pid).children() if "spawn_main" in " ".join(one.cmdline())
        ]
        assert len(workers) == 1
        workers[0].kill()
        eventually(lambda: client.get("/ready").status_code == 503, "a dead worker counts as ready")
        refused(client.get("/ready"), 503, "unavailable")
        assert client.get("/health").status_code == 200
        assert metric(client.get("/metrics").text, "vidgen_ready") == 0
        eventually(lambda: client.get("/ready").status_code == 200, "no worker in its place", 90)


def test_a_server_told_to_stop_ends_its_streams_and_itself(tmp_path_factory: pytest.TempPathFactory) -> None:
    with running(tmp_path_factory.mktemp("drain") / "data") as found, found.client() as client:
        video = create(client, **LONG)
        found.wait(video["id"], until=lambda now: now["chunks_done"] >= 1)
        with client.stream("GET", f"/v1/videos/{video['id']}/stream") as answer:
            pieces = answer.iter_raw()
            next(pieces)
            started = time.monotonic()
            found.process.send_signal(signal.SIGTERM)
            for _ in pieces:
                pass
        assert found.process.wait(20) == 0, found.log
        assert time.monotonic() - started < 15
        assert "Traceback" not in found.log
