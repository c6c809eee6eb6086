"""Requests for tests, admitted or refused, and records for the queue."""

from collections.abc import Callable
from typing import Any

import httpx
import pytest

from vidgen.config import parse_job
from vidgen.serve.admission import make_record
from vidgen.serve.config import ServerConfig, load_server_config
from vidgen.serve.errors import ApiError
from vidgen.serve.records import Kind, Record, make_id
from vidgen.serve.schema import SessionStart, parse_request

PROMPT = "a red circle moving left over a gray background"
SHORT = {"prompt": "a red circle", "num_frames": 17, "num_inference_steps": 2}
SERVER = ServerConfig()


def config(**changes: Any) -> ServerConfig:
    return load_server_config(None, changes)


def admitted(config: ServerConfig = SERVER, owner: str = "local", **fields: Any) -> Record:
    return make_record(parse_request({"prompt": PROMPT, **fields}), config, owner)


def session(config: ServerConfig = SERVER, **fields: Any) -> Record:
    request = parse_request({"prompt": PROMPT, **fields}, SessionStart)
    return make_record(request, config, "local", Kind.SESSION)


def refused(config: ServerConfig = SERVER, make: Callable[..., Any] = admitted, **fields: Any) -> ApiError:
    """How a request is refused; its body is the one there is, its message one short line."""
    with pytest.raises(ApiError) as refusal:
        make(config, **fields)
    error = refusal.value
    assert error.status in (400, 422)
    assert set(error.body()) == {"error"}
    assert set(error.body()["error"]) == {"type", "code", "message", "param"}
    assert error.type == "invalid_request_error" and error.message.isprintable()
    assert 0 < len(error.message) <= 600
    return error


def job_of(record: Record) -> Any:
    return parse_job(record.job)


def made(**changes: Any) -> Record:
    """A queued video."""
    values: dict[str, Any] = {
        "id": make_id(changes.get("kind", Kind.VIDEO)), "owner": "ada", "model": "builtin", "created_at": 1,
        "prompt": "a red circle", "request": {"prompt": "a red circle"}, "job": {"seed": 3}, "width": 256,
        "height": 256, "num_frames": 64, "fps": 16, "seed": 3, "chunks_total": 4,
    }  # fmt: skip
    return Record(**{**values, **changes})


def code(answer: httpx.Response) -> str:
    """Of an answer that is an error."""
    body = answer.json()
    assert set(body) == {"error"} and "Traceback" not in answer.text
    return body["error"]["code"]
