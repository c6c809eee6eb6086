"""What goes back to a client: JSON, errors in one form, and files in ranges."""

import asyncio
import hashlib
import re
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from email.utils import formatdate
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response, StreamingResponse

from vidgen.serve.errors import ApiError, error, from_validation
from vidgen.serve.http.gate import render_json
from vidgen.serve.schema import ErrorBody

PIECE_BYTES = 256 * 1024  # of a file, held in memory for a client at a time
RANGE = re.compile(r"bytes=(?P<first>[0-9]{1,18})?-(?P<last>[0-9]{1,18})?")
CODES = {404: "unknown_route", 405: "method_not_allowed", 400: "bad_request"}
MESSAGES = {404: "nothing is here; GET /docs lists what is", 405: "this cannot be done here; see GET /docs"}


class JsonResponse(JSONResponse):
    """JSON in ASCII, see gate.render_json."""

    def render(self, content: Any) -> bytes:
        return render_json(content)


def error_response(refused: ApiError) -> Response:
    return JsonResponse(refused.body(), refused.status, refused.headers)


def install_error_handlers(app: FastAPI) -> None:
    """Have every error leave as {"error": ...}; what is none of ours is the gate's."""

    async def refused(request: Request, found: Exception) -> Response:
        assert isinstance(found, ApiError)
        return error_response(found)

    async def routing(request: Request, found: Exception) -> Response:
        assert isinstance(found, HTTPException)
        status = found.status_code
        message = MESSAGES.get(status, str(found.detail))
        return error_response(error(status, CODES.get(status, "refused"), message, headers=found.headers))

    async def invalid(request: Request, found: Exception) -> Response:
        assert isinstance(found, RequestValidationError)
        return error_response(from_validation(found.errors(), _AnyParameter))

    app.add_exception_handler(ApiError, refused)
    app.add_exception_handler(HTTPException, routing)
    app.add_exception_handler(RequestValidationError, invalid)


class _AnyParameter(BaseModel):
    """Of queries and paths: unknown ones are no errors."""


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The refusals of a route, for the API page; 401, 403 and 500 may come anywhere."""
    about = {
        400: "Cannot be done as it stands", 401: "No valid key", 403: "Not from there", 404: "No such video",
        409: "Not in this state", 413: "Too large", 415: "Neither JSON nor a form", 416: "Range past the end",
        422: "Not as described", 429: "Try again later", 500: "The server failed", 503: "Try again later",
        507: "No room on the disk",
    }  # fmt: skip
    return {
        status: {"model": ErrorBody, "description": about[status]}
        for status in sorted({400, 401, 403, 413, 500, *statuses})
    }


@dataclass(frozen=True, kw_only=True)
class Files:
    """Files that are sent one after the other as if they were one."""

    paths: Sequence[Path]
    sizes: Sequence[int]
    modified_at: float  # unix seconds

    @property
    def num_bytes(self) -> int:
        return sum(self.sizes)

    @property
    def etag(self) -> str:
        text = "\n".join([str(self.modified_at), *map(str, self.sizes), *(path.name for path in self.paths)])
        return f'"{hashlib.sha256(text.encode()).hexdigest()[:32]}"'

    async def read(self, start: int, stop: int) -> AsyncIterator[bytes]:
        """The bytes [start, stop) in pieces; FileNotFoundError when they are deleted meanwhile."""
        place = 0
        for path, size in zip(self.paths, self.sizes, strict=True):
            first, last = max(start - place, 0), min(stop - place, size)
            place += size
            if first < last:
                async for piece in _read_file(path, first, last):
                    yield piece


async def _read_file(path: Path, start: int, stop: int) -> AsyncIterator[bytes]:
    file = await asyncio.to_thread(path.open, "rb")
    try:
        await asyncio.to_thread(file.seek, start)
        while start < stop:
            piece = await asyncio.to_thread(file.read, min(PIECE_BYTES, stop - start))
            if not piece:
                raise EOFError(f"{path} ended at {start}, not at {stop}")
            start += len(piece)
            yield piece
    finally:
        file.close()


def look(paths: Sequence[Path]) -> Files:
    """Files with their sizes as they are now. FileNotFoundError when one is missing. Reads the disk."""
    stats = [path.stat() for path in paths]
    return Files(
        paths=paths,
        sizes=[stat.st_size for stat in stats],
        modified_at=max(stat.st_mtime for stat in stats),
    )


def files_response(request: Request, files: Files, media_type: str, name: str) -> Response:
    """All of the files, or the range that is asked for: 200, 206, 304 or 416.

    Several ranges at once, and ranges that make no sense, get everything, as HTTP allows.
    """
    headers = {
        "accept-ranges": "bytes",
        "content-disposition": f'inline; filename="{name}"',
        "etag": files.etag,
        "last-modified": formatdate(files.modified_at, usegmt=True),
    }
    total = files.num_bytes
    if _has_tag(request.headers.get("if-none-match"), files.etag):
        return Response(status_code=304, headers=headers)
    wanted = request.headers.get("range")
    if request.headers.get("if-range", files.etag) not in (files.etag, headers["last-modified"]):
        wanted = None
    try:
        part = _range(wanted, total)
    except IndexError:
        raise error(
            416,
            "range_not_satisfiable",
            f"the file has {total} bytes",
            headers={"content-range": f"bytes */{total}"},
        ) from None
    start, stop = part or (0, total)
    if part is not None:
        headers["content-range"] = f"bytes {start}-{stop - 1}/{total}"
    headers["content-length"] = str(stop - start)
    status = 200 if part is None else 206
    if request.method == "HEAD":
        return Response(status_code=status, headers=headers, media_type=media_type)
    return StreamingResponse(files.read(start, stop), status, headers, media_type)


def _has_tag(header: str | None, etag: str) -> bool:
    tags = {tag.strip().removeprefix("W/") for tag in (header or "").split(",")}
    return etag in tags or "*" in tags


def _range(header: str | None, total: int) -> tuple[int, int] | None:
    """[start, stop) of a Range header; None for everything. IndexError when it begins past the end."""
    match = RANGE.fullmatch(header.replace(" ", "")) if header else None
    if match is None or not (match["first"] or match["last"]):
        return None
    if not match["first"]:
        count = min(int(match["last"]), total)
        if count == 0:
            raise IndexError
        return total - count, total
    start = int(match["first"])
    stop = min(int(match["last"]) + 1, total) if match["last"] else total
    if match["last"] and int(match["last"]) < start:
        return None
    if start >= total:
        raise IndexError
    return start, stop
