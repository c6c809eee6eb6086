"""What a client is told when something is refused: an HTTP status and one line, always in the same body.

{"error": {"type", "code", "message", "param"}}, after OpenAI's API. `message` says what was given, what is
allowed and what to do; `param` is the field at fault.
"""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, get_args

from pydantic import BaseModel

INVALID = "invalid_request_error"
MAX_SHOWN_CHARACTERS = 100
MAX_MESSAGE_CHARACTERS = 600
PARTS = ("body", "query", "path", "header", "cookie")
CODES = {"missing": "missing_field", "json_invalid": "invalid_json", "extra_forbidden": "unknown_field"}
TYPES = {
    400: INVALID, 401: "authentication_error", 403: "permission_error", 404: "not_found_error",
    405: INVALID, 409: "conflict_error", 413: INVALID, 415: INVALID, 416: INVALID, 422: INVALID,
    429: "rate_limit_error", 503: "unavailable_error", 507: "storage_error",
}  # fmt: skip


class ApiError(Exception):
    """A refusal, as it goes over the wire."""

    def __init__(
        self,
        status: int,
        type: str,
        code: str,
        message: str,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        # one line, and short: prompts and whole bodies may be in it
        message = " ".join(message.split())
        if len(message) > MAX_MESSAGE_CHARACTERS:
            message = message[: MAX_MESSAGE_CHARACTERS - 3] + "..."
        super().__init__(message)
        self.status, self.type, self.code = status, type, code
        self.message, self.param, self.headers = message, param, dict(headers or {})

    def body(self) -> dict[str, dict[str, str | None]]:
        """The JSON body of the response."""
        return {"error": {"type": self.type, "code": self.code, "message": self.message, "param": self.param}}


def error(
    status: int,
    code: str,
    message: str,
    param: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> ApiError:
    """An error of the type that belongs to its status."""
    kind = TYPES.get(status, INVALID if status < 500 else "server_error")
    return ApiError(status, kind, code, message, param, headers)


def invalid(message: str, param: str | None = None, code: str = "invalid_value") -> ApiError:
    """400: the request cannot be done as it stands."""
    return error(400, code, message, param)


def over_limit(param: str, given: object, allowed: object, advice: str) -> ApiError:
    """400: more than this server allows."""
    return error(400, "over_limit", f"{param}={shown(given)}: at most {allowed} here; {advice}", param)


def unauthorized() -> ApiError:
    """401: no key, or an unknown one."""
    message = "no valid API key; send the header Authorization: Bearer KEY"
    return error(401, "invalid_api_key", message, headers={"WWW-Authenticate": "Bearer"})


def forbidden(message: str, code: str = "forbidden") -> ApiError:
    """403: known, but not allowed."""
    return error(403, code, message)


def not_found(id: str) -> ApiError:
    """404: no such video, or another owner's."""
    return error(404, "not_found", f"no video {shown(id)}; list yours with GET /v1/videos", "video_id")


def unknown_model(name: str, known: Iterable[str]) -> ApiError:
    """404: there is no such model."""
    message = f"model={shown(name)}: this server has {', '.join(known)}"
    return error(404, "model_not_found", message, "model")


def conflict(message: str, code: str = "conflict") -> ApiError:
    """409: not in this state of the video."""
    return error(409, code, message)


def not_ready(id: str, status: str) -> ApiError:
    """409: there is no finished file yet."""
    advice = "poll until it is completed, or ask with partial=true for what there is"
    return error(409, "not_ready", f"video {id} is {status}; {advice}")


def too_large(message: str, param: str | None = None) -> ApiError:
    """413: too many bytes, or a picture that would unpack to too many."""
    return error(413, "too_large", message, param)


def unsupported_media(given: str) -> ApiError:
    """415: neither JSON nor a form."""
    message = f"content-type {shown(given)}: send application/json or multipart/form-data"
    return error(415, "unsupported_media_type", message)


def queue_full(retry_after_s: int, max_queue: int | None = None) -> ApiError:
    """429 with Retry-After."""
    limit = "" if max_queue is None else f" with {max_queue} videos"
    message = f"the queue is full{limit}; try again in {retry_after_s} s"
    return error(429, "queue_full", message, headers={"Retry-After": str(retry_after_s)})


def unavailable(message: str, retry_after_s: int = 5) -> ApiError:
    """503: starting or stopping."""
    return error(503, "unavailable", message, headers={"Retry-After": str(retry_after_s)})


def disk_full(used_bytes: int | None = None, quota_bytes: int | None = None) -> ApiError:
    """507: no room for another video."""
    used = "" if used_bytes is None or quota_bytes is None else f" ({used_bytes} of {quota_bytes} bytes)"
    return error(507, "disk_full", f"the server's disk quota is used up{used}; delete videos and try again")


def internal() -> ApiError:
    """500, without details: those are in the server's log."""
    return error(500, "internal_error", "the server failed to do this; its log says why")


def from_validation(errors: Sequence[Any], model: type[BaseModel]) -> ApiError:
    """422 of what pydantic says about a body; `model` is what it should have been.

    The part of a request that FastAPI names first, such as "query", is left out.
    """
    found = []
    for one in errors:
        place = tuple(one["loc"])
        is_part = len(place) > 1 and place[0] in PARTS and place[0] not in model.model_fields
        found.append({**one, "loc": place[1:] if is_part else place})
    first = found[0]
    code = CODES.get(first["type"], "invalid_value")
    message = "; ".join(explain(one, model) for one in found[:3])
    return error(422, code, message, ".".join(shown(part) for part in first["loc"]) or None)


def explain(one: Any, model: type[BaseModel]) -> str:
    """One of pydantic's errors in a line: the key, what was given, what is allowed."""
    key = ".".join(shown(part) for part in one["loc"])
    message = one["msg"].removeprefix("Value error, ")
    if one["type"] == "extra_forbidden":
        known = _keys(model, one["loc"][:-1])
        near = difflib.get_close_matches(str(one["loc"][-1]), known, n=1, cutoff=0.5)
        advice = f"did you mean {near[0]}?" if near else f"known keys: {', '.join(known)}"
        return f"unknown key {key}; {advice}"
    if one["type"] == "missing":
        return f"{key}: is missing; give it"
    if not key:
        return message
    if one["type"] == "value_error" and isinstance(one["input"], dict | BaseModel):
        return f"{key}: {message}"  # which names the setting
    return f"{key}={shown(one['input'])}: {message[0].lower()}{message[1:]}"


def shown(value: object) -> str:
    """What was given, short enough for one line, in characters that any encoding takes."""
    text = "nothing" if value is None else value if isinstance(value, str) else repr(value)
    text = ascii(text)[1:-1] if not text.isprintable() else text
    return text if len(text) <= MAX_SHOWN_CHARACTERS else text[: MAX_SHOWN_CHARACTERS - 3] + "..."


def _keys(model: type[BaseModel], path: Sequence[int | str]) -> list[str]:
    """Keys known at a place of a model."""
    for part in path:
        field = model.model_fields.get(str(part))
        if field is None:
            continue  # a place in a list, or a case of a union
        inner = _models(field.annotation)
        if not inner:
            return []
        model = inner[0]
    return list(model.model_fields)


def _models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in get_args(annotation) for model in _models(argument)]
