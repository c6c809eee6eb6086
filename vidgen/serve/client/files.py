"""Files from a server, whole or not at all."""

import asyncio
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import httpx

from vidgen.serve.client.http import AWAY, Connection, ServerError


async def download(connection: Connection, path: str, params: Mapping[str, str], target: Path) -> Path:
    """The file of a URL, at `target`: written beside the target, then renamed over it.

    A cut is mended with Range where the server names the version (ETag), else begun anew.
    """
    temporary = target.with_name(f".vidgen-{secrets.token_hex(8)}.part")
    try:
        with temporary.open("xb") as file:
            await _fetch(connection, path, params, file)
            file.flush()
            await asyncio.to_thread(os.fsync, file.fileno())
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return target


async def _fetch(connection: Connection, path: str, params: Mapping[str, str], file: BinaryIO) -> None:
    outage, tag, size = connection.outage(), None, None
    while size is None or file.tell() != size:
        headers = {"Accept-Encoding": "identity"}
        if tag and file.tell():
            headers |= {"Range": f"bytes={file.tell()}-", "If-Range": tag}
        try:
            async with connection.stream(path, headers, params) as response:
                if response.status_code != 206:  # all of it: the first time, or it has changed
                    file.seek(0)
                    file.truncate()
                elif not response.headers.get("content-range", "").startswith(f"bytes {file.tell()}-"):
                    raise ServerError(206, "bad_range", f"{path}: the server sent another range than asked")
                tag = response.headers.get("etag")
                tag = None if tag is None or tag.startswith("W/") else tag
                length = response.headers.get("content-length")
                size = None if length is None else file.tell() + int(length)
                async for data in response.aiter_raw():
                    outage.over()
                    file.write(data)
            if size is None:
                return  # a body without a length ends where its connection says so
        except (httpx.TransportError, ServerError) as error:
            if isinstance(error, ServerError) and error.status not in AWAY:
                raise
            if size is None or file.tell() != size:
                await outage.sit_out(error)
