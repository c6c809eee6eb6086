"""A server as its clients see it: its address, its errors, and requests that sit out its restarts."""

import asyncio
import json
import re
import ssl
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx

FINAL = ("completed", "failed")
QUIET_S = 60.0  # events and files are cut when nothing comes for so long; the server speaks every 15 s
IDENTIFIER = re.compile(r"[A-Za-z0-9_-]{1,100}")
AWAY = (502, 503, 504)  # statuses of a server that restarts, or of what stands before it


class ServerError(Exception):
    """A request that the server did not grant: HTTP status (0 over a WebSocket), code and one line."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        param: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message
        self.param, self.retry_after_s = param, retry_after_s


class Unreachable(ServerError):
    """Nothing answers at the server's address, or not any more."""

    def __init__(self, url: str, error: BaseException, was_there: bool) -> None:
        why = str(error) or type(error).__name__
        if was_there:
            super().__init__(0, "lost", f"the server at {url} is gone ({why})")
        else:
            super().__init__(0, "unreachable", f"no server at {url} ({why}); start one with: vidgen serve")


class VideoFailed(ServerError):
    """A video that ended without being complete: the server's code and message, and the video."""

    def __init__(self, video: "Video") -> None:
        message = f"{video.id}: {video.error_message or 'failed'}"
        super().__init__(200, video.error_code or "failed", message)
        self.video = video


@dataclass(frozen=True, kw_only=True, slots=True)
class Video:
    """A video or session as the server tells of it; `facts` is all that it said."""

    id: str
    status: str  # queued, in_progress, completed, failed
    progress: int  # 0 to 100
    prompt: str
    size: str  # WxH
    created_at: int  # unix seconds
    error_code: str | None
    error_message: str | None
    facts: dict[str, Any] = field(repr=False)

    @property
    def is_final(self) -> bool:
        return self.status in FINAL

    @staticmethod
    def of(facts: Mapping[str, Any]) -> "Video":
        """ServerError when that is no video."""
        try:
            error = facts.get("error") or {}
            return Video(
                **{key: facts[key] for key in ("id", "status", "progress", "size", "created_at")},
                prompt=facts.get("prompt") or "",
                error_code=error.get("code"),
                error_message=error.get("message"),
                facts=dict(facts),
            )
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ServerError(200, "not_vidgen", f"the answer is no video: {str(facts)[:200]}") from error


class Outage:
    """How long a server may be away: `patience_s` from its last sign of life, and 0 before the first."""

    def __init__(self, url: str, patience_s: float) -> None:
        self._url, self._patience_s = url, patience_s
        self.is_known = False
        self._begin_s: float | None = None
        self._pause_s = 0.1

    def over(self) -> None:
        """The server gave a sign of life."""
        self.is_known, self._begin_s, self._pause_s = True, None, 0.1

    async def sit_out(self, error: BaseException) -> None:
        """Wait a little before the next try. Unreachable (or the ServerError) when it took too long."""
        now_s = time.monotonic()
        self._begin_s = now_s if self._begin_s is None else self._begin_s
        if not self.is_known or now_s - self._begin_s > self._patience_s:
            if isinstance(error, ServerError):
                raise error
            raise Unreachable(self._url, error, self.is_known) from error
        await asyncio.sleep(self._pause_s)
        self._pause_s = min(2 * self._pause_s, 2.0)


class Connection:
    """Requests to one server. Nothing is read from the environment: no proxies, no key."""

    def __init__(self, server: str, api_key: str | None, timeout_s: float, patience_s: float) -> None:
        self.url = checked_address(server)
        self.headers = {"Authorization": f"Bearer {checked_key(api_key)}"} if api_key is not None else {}
        self._patience_s = patience_s
        self._was_seen = False
        self.tls = ssl.create_default_context() if self.url.startswith("https:") else None
        self._http = httpx.AsyncClient(
            headers=self.headers,
            timeout=httpx.Timeout(timeout_s, read=timeout_s, connect=min(timeout_s, 10.0)),
            limits=httpx.Limits(max_connections=None),
            verify=self.tls or False,
            trust_env=False,
        )

    async def close(self) -> None:
        await self._http.aclose()

    def outage(self) -> Outage:
        """A new count of how long the server is away."""
        outage = Outage(self.url, self._patience_s)
        outage.is_known = self._was_seen
        return outage

    async def ask(self, method: str, path: str, *, again: bool = False, **parts: Any) -> httpx.Response:
        """The answer to a request, tried again while the server is away if that does no harm."""
        outage = self.outage()
        while True:
            try:
                response = await self._http.request(method, self.url + path, **parts)
                self._was_seen = True
                if response.is_error:
                    raise error_of(response)
                return response
            except (httpx.TransportError, ServerError) as error:
                if isinstance(error, ServerError) and (error.status not in AWAY or not again):
                    raise
                if not again:
                    raise Unreachable(self.url, error, self._was_seen) from error
                await outage.sit_out(error)

    async def ask_json(self, method: str, path: str, *, again: bool = False, **parts: Any) -> dict[str, Any]:
        """The same, for answers that are a JSON object."""
        return read_json(await self.ask(method, path, again=again, **parts), self.url)

    @asynccontextmanager
    async def stream(
        self, path: str, headers: Mapping[str, str], params: Mapping[str, str] | None = None
    ) -> AsyncIterator[httpx.Response]:
        """An answer whose body is read as it comes. ServerError when the request is not granted."""
        timeout = httpx.Timeout(QUIET_S, connect=10.0)
        async with self._http.stream(
            "GET", self.url + path, headers=dict(headers), params=params, timeout=timeout
        ) as response:
            self._was_seen = True
            if response.is_error:
                await response.aread()
                raise error_of(response)
            yield response


def checked_address(server: str) -> str:
    """The address without a slash at its end. ValueError in one line."""
    try:
        url = httpx.URL(server)
        is_good = url.scheme in ("http", "https") and url.host and not url.userinfo
        is_good = is_good and not url.query and not url.fragment and 0 < (url.port or 1) < 2**16
    except (httpx.InvalidURL, ValueError, TypeError):
        is_good = False
    if not is_good:
        raise ValueError(f"server={server!r}: need an address like http://127.0.0.1:8711")
    return server.rstrip("/")


def checked_key(api_key: str) -> str:
    """A key that can stand in a header. ValueError in one line that does not show it."""
    if not api_key or not api_key.isascii() or not api_key.isprintable() or " " in api_key:
        raise ValueError("api_key: need the printable ASCII characters that `vidgen serve --new-key` printed")
    return api_key


def checked_id(video_id: str) -> str:
    """An id that is one part of a path. ValueError in one line."""
    if not IDENTIFIER.fullmatch(video_id):
        raise ValueError(f"id {video_id!r}: need one as the server gave it, for example video_0123abcd")
    return video_id


def read_json(response: httpx.Response, url: str) -> dict[str, Any]:
    """The JSON object of an answer. ServerError when it is something else."""
    try:
        found = response.json()
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ServerError(
            response.status_code, "not_vidgen", f"{url} answers, but not as a vidgen server does"
        )
    return found


def error_of(response: httpx.Response) -> ServerError:
    """The error that an answer of status 400 or more tells of, whoever sent it."""
    status = response.status_code
    try:
        told = response.json()["error"]
        code, message, param = str(told["code"]), str(told["message"]), told.get("param")
    except (ValueError, KeyError, TypeError, AttributeError):
        code, param = f"http_{status}", None
        message = f"status {status} from {response.request.url}: {response.text[:200].strip() or 'no text'}"
    wait = response.headers.get("retry-after", "")
    retry_after_s = float(wait) if wait.isdecimal() else None
    return ServerError(status, code, message, param=param, retry_after_s=retry_after_s)


@dataclass(frozen=True, kw_only=True, slots=True)
class Event:
    """One happening of a video, numbered from its beginning."""

    number: int
    name: str  # progress, chunk, status, prompt_applied, note
    data: dict[str, Any]


async def read_events(response: httpx.Response) -> AsyncIterator[Event]:
    """The server-sent events of an answer (WHATWG HTML, 9.2.6), those whose data is a JSON object."""
    number, name, data = -1, "message", []
    async for line in _lines(response):
        label, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if not line:
            if data:
                found = json.loads("\n".join(data))
                yield Event(number=number, name=name, data=found if isinstance(found, dict) else {})
            name, data = "message", []
        elif label == "event":
            name = value
        elif label == "data":
            data.append(value)
        elif label == "id" and value.isdecimal():
            number = int(value)


async def _lines(response: httpx.Response) -> AsyncIterator[str]:
    # not aiter_lines: it also breaks lines where a prompt holds U+2028 or U+0085
    rest = b""
    async for part in response.aiter_bytes():
        *lines, rest = (rest + part).split(b"\n")
        for line in lines:
            yield line.removesuffix(b"\r").decode()
