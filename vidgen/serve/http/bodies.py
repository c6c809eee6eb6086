"""How a request for a video is read, from JSON or from a form, with the picture that it may bring along."""

import asyncio
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import Request
from python_multipart.exceptions import FormParserError
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException

from vidgen.serve.config import input_file
from vidgen.serve.errors import ApiError, error, invalid, unsupported_media
from vidgen.serve.pictures import check_image, read_data_url
from vidgen.serve.schema import VideoRequest, form_values, parse_request

PICTURE = "input_reference"
MAX_FIELDS = 300  # segments in brackets are two each
MAX_FILES = 1
MAX_FIELD_BYTES = 1024 * 1024
SMALL_BYTES = 16 * 1024  # parsed on the event loop
FORM = "multipart/form-data"
JSON = "application/json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Picture:
    """A picture that a client sent, known to be one."""

    data: bytes
    suffix: str


async def read_request(request: Request, max_pixels: int) -> tuple[VideoRequest, Picture | None]:
    """What a client wants. ApiError 400, 413, 415 or 422 for a body that says nothing that can be done."""
    if _content_type(request) == FORM:
        values, data = await _read_form(request)
    else:
        values, data = await read_json(request), None
    wanted = await asyncio.to_thread(parse_request, values)
    if wanted.input_reference is not None:
        data = await asyncio.to_thread(read_data_url, wanted.input_reference.image_url)
    if data is None:
        return wanted, None
    return wanted, Picture(data=data, suffix=await asyncio.to_thread(check_image, data, max_pixels))


def write_input(data: Path, video_id: str, picture: Picture) -> Path:
    """Keep a picture where a worker looks for it."""
    from vidgen.media.segments import write_atomically

    path = input_file(data, video_id, picture.suffix)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, picture.data)
    return path


# the API page's description of what read_request reads by hand
BODIES = {
    "requestBody": {
        "required": True,
        "content": {
            JSON: {"schema": {"$ref": "#/components/schemas/VideoRequest"}},
            FORM: {"schema": {"$ref": "#/components/schemas/VideoRequest"}},
        },
    }
}


def _content_type(request: Request) -> str:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


async def read_json(request: Request) -> Any:
    """A JSON body. ApiError 400 or 415."""
    if _content_type(request) != JSON:
        raise unsupported_media(request.headers.get("content-type", ""))
    body = await request.body()
    return _parse(body) if len(body) <= SMALL_BYTES else await asyncio.to_thread(_parse, body)


def _parse(body: bytes) -> Any:
    """JSON of valid Unicode, each key once. ApiError 400."""
    try:
        return json.loads(body, object_pairs_hook=_object, parse_constant=_refuse_constant)
    except RecursionError:
        raise invalid("the body is nested too deeply", code="invalid_json") from None
    except ValueError as found:
        raise invalid(f"the body is no JSON: {found}", code="invalid_json") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        twice = next(name for i, (name, _) in enumerate(pairs) if name in dict(pairs[:i]))
        raise ValueError(f"{twice!r:.100} is there twice; give it once")
    return values


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a number in JSON")


async def _read_form(request: Request) -> tuple[dict[str, Any], bytes | None]:
    """(fields, the bytes of the picture or None). Its temporary file is gone when this returns."""
    try:
        form = await request.form(max_files=MAX_FILES, max_fields=MAX_FIELDS, max_part_size=MAX_FIELD_BYTES)
    except (HTTPException, FormParserError, UnicodeError, LookupError) as found:
        detail = getattr(found, "detail", "it is broken")
        raise error(400, "invalid_form", f"the body is no form that can be read: {detail}") from None
    try:
        return await _fields(form)
    finally:
        await form.close()


async def _fields(form: FormData) -> tuple[dict[str, Any], bytes | None]:
    data: bytes | None = None
    pairs: list[tuple[str, str]] = []
    for name, value in form.multi_items():
        if not isinstance(value, UploadFile):
            pairs.append((name, value))
        elif name == PICTURE:
            data = await value.read()  # no more than a body may have
        else:
            raise _unexpected_file(name)
    if data is not None and any(name == PICTURE for name, _ in pairs):
        raise invalid(f"{PICTURE} is in the form twice; give it once", PICTURE)
    return form_values(pairs), data


def _unexpected_file(name: str) -> ApiError:
    return invalid(f"{name!r:.100} is a file; only {PICTURE} may be one", "file", "unexpected_file")
