"""OpenAI's own Python client, unchanged, against a running server."""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import av
import openai
import pytest

from tests.serve.conftest import RunningServer

# its video calls are marked for removal, the shape of /v1/videos stays
pytestmark = pytest.mark.filterwarnings("ignore:.*Sora API.*:DeprecationWarning")
PROMPT = "a blue square moving right over a gray background"
MORE: Any = {"extra_body": {"num_inference_steps": "4", "seed": "5", "num_frames": "33"}}


@pytest.fixture(scope="module")
def client(server: RunningServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=f"{server.url}/v1", api_key="none is needed", timeout=30, max_retries=0
    ) as found:
        yield found


def test_a_video_is_created_polled_downloaded_listed_and_deleted(
    client: openai.OpenAI, tmp_path: Path
) -> None:
    made = client.videos.create(prompt=PROMPT, **MORE)
    assert made.object == "video" and made.status in ("queued", "in_progress") and made.prompt == PROMPT
    done = client.videos.poll(made.id, poll_interval_ms=100)
    assert (done.status, done.progress, done.error) == ("completed", 100, None)
    target = tmp_path / "video.mp4"
    client.videos.download_content(done.id).write_to_file(target)
    with av.open(target) as container:
        assert sum(1 for _ in container.decode(video=0)) == 33
    picture = client.videos.download_content(done.id, variant="thumbnail").read()
    assert picture[:3] == b"\xff\xd8\xff"
    assert client.videos.download_content(done.id, variant="spritesheet").read()[:4] == b"\x89PNG"
    assert done.id in [video.id for video in client.videos.list(limit=2)]
    gone = client.videos.delete(done.id)
    assert (gone.id, gone.deleted, gone.object) == (done.id, True, "video.deleted")
    with pytest.raises(openai.NotFoundError) as caught:
        client.videos.retrieve(done.id)
    assert cast(Any, caught.value.body)["code"] == "not_found"


def test_the_clients_own_waiting_follows_the_servers_header(client: openai.OpenAI) -> None:
    done = client.videos.create_and_poll(prompt=PROMPT, **MORE)
    assert done.status == "completed"
    client.videos.delete(done.id)


def test_the_client_walks_all_pages(client: openai.OpenAI) -> None:
    made = [client.videos.create(prompt=PROMPT, **MORE).id for _ in range(3)]
    found = [video.id for video in client.videos.list(limit=1, order="asc")]
    assert found == made
    for video_id in made:
        client.videos.delete(video_id)


def test_openais_sizes_and_seconds_are_understood_or_refused_in_words(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.videos.create(prompt=PROMPT, size=cast(Any, "7x7"), seconds="4")
    error = cast(Any, caught.value.body)
    assert error["param"] in ("size", "width", "height") and "7" in error["message"]
    made = client.videos.create(prompt=PROMPT, size=cast(Any, "256x256"), seconds=cast(Any, "2"))
    assert (made.size, made.seconds) == ("256x256", "2")
    client.videos.delete(made.id)


def test_a_picture_is_sent_as_the_client_sends_files(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.videos.create(prompt=PROMPT, input_reference=("x.png", io.BytesIO(b"no picture"), "image/png"))
    assert cast(Any, caught.value.body)["param"] == "input_reference"


def test_the_clients_list_of_models_is_the_servers(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["builtin"]
    assert client.models.retrieve("builtin").id == "builtin"
    with pytest.raises(openai.NotFoundError, match="this server has builtin"):
        client.models.retrieve("sora-2")
