"""The client of a vidgen server for programs with an event loop."""

import asyncio
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Literal, Self

import httpx

from vidgen.serve.client.files import download
from vidgen.serve.client.http import (
    FINAL,
    Connection,
    Event,
    ServerError,
    Unreachable,
    Video,
    VideoFailed,
    checked_id,
    read_events,
    read_json,
)
from vidgen.serve.client.live import Chunk, LiveStream, Policy, Report

SERVER = "http://127.0.0.1:8711"
POLL_S = 1.0  # where the server does not say
PAGE = 100
Variant = Literal["video", "thumbnail", "spritesheet"]
Order = Literal["asc", "desc"]


class AsyncClient:
    """A server's videos. What was reached once and is away is waited for, `patience_s` long."""

    def __init__(
        self,
        server: str = SERVER,
        *,
        api_key: str | None = None,
        timeout_s: float = 30.0,
        patience_s: float = 30.0,
    ) -> None:
        self._connection = Connection(server, api_key, timeout_s, patience_s)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        await self._connection.close()

    async def create(self, prompt: str | None = None, *, image: Path | None = None, **fields: Any) -> Video:
        """The video that was queued for a prompt or `segments`, by OpenAI's or diffusers' names of fields."""
        values = {key: value for key, value in fields.items() if value is not None}
        if prompt is not None:
            values["prompt"] = prompt
        if image is None:
            facts = await self._connection.ask_json("POST", "/v1/videos", json=values)
        else:
            texts = {key: v if isinstance(v, str) else json.dumps(v) for key, v in values.items()}
            files = {"input_reference": (image.name, await asyncio.to_thread(image.read_bytes))}
            facts = await self._connection.ask_json("POST", "/v1/videos", data=texts, files=files)
        return Video.of(facts)

    async def get(self, video_id: str) -> Video:
        """How a video stands."""
        return (await self._poll(video_id))[0]

    async def wait(
        self,
        video_id: str,
        *,
        timeout_s: float | None = None,
        report: Callable[[Video], None] = lambda video: None,
    ) -> Video:
        """The completed video; `report` gets it after every poll. VideoFailed, or TimeoutError when late."""
        deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            video, pause_s = await self._poll(video_id)
            report(video)
            self._raise_if_failed(video)
            if video.is_final:
                return video
            left_s = pause_s if deadline_s is None else deadline_s - time.monotonic()
            if left_s <= 0:
                raise TimeoutError(f"{video_id}: {video.status} after {timeout_s:g} s, {video.progress} %")
            await asyncio.sleep(min(pause_s, left_s))

    async def list(self, *, limit: int | None = None, order: Order = "desc") -> AsyncGenerator[Video, None]:
        """Videos by age, newest first unless told otherwise, over all pages."""
        left, after = limit, None
        while left is None or left > 0:
            size = PAGE if left is None else min(left, PAGE)
            params = {"limit": size, "order": order} | ({"after": after} if after else {})
            page = await self._connection.ask_json("GET", "/v1/videos", again=True, params=params)
            videos = [Video.of(facts) for facts in page["data"]]
            for video in videos:
                yield video
            if not videos or not page["has_more"]:
                return
            left, after = None if left is None else left - len(videos), videos[-1].id

    async def cancel(self, video_id: str) -> Video:
        """The video, once nothing works on it any more."""
        path = _path(video_id, "/cancel")
        return Video.of(await self._connection.ask_json("POST", path, again=True))

    async def resume(self, video_id: str) -> Video:
        """A failed or cancelled video, queued again to go on where it stopped."""
        path = _path(video_id, "/resume")
        return Video.of(await self._connection.ask_json("POST", path, again=True))

    async def delete(self, video_id: str) -> None:
        """Stop a video and remove it."""
        await self._connection.ask_json("DELETE", _path(video_id))

    async def download(
        self,
        video_id: str,
        path: Path | str,
        *,
        variant: Variant = "video",
        partial: bool = False,
    ) -> Path:
        """`path`, which is now the whole file; `partial` takes what there is of an unfinished video."""
        params = {"variant": variant} | ({"partial": "true"} if partial else {})
        return await download(self._connection, _path(video_id, "/content"), params, Path(path))

    async def events(self, video_id: str, *, after: int | None = None) -> AsyncGenerator[Event, None]:
        """What happens to a video, from its beginning or after an event's number, until it is over."""
        outage = self._connection.outage()
        while True:
            headers = {"Accept": "text/event-stream"}
            headers |= {} if after is None else {"Last-Event-ID": str(after)}
            try:
                async with self._connection.stream(_path(video_id, "/events"), headers) as response:
                    async for event in read_events(response):
                        outage.over()
                        after = event.number if event.number >= 0 else after
                        yield event
                        if event.name == "status" and event.data.get("status") in FINAL:
                            return
                if (await self.get(video_id)).is_final:
                    return  # nothing came after `after`
                cut: Exception = ConnectionError("the events ended early")
            except httpx.TransportError as error:
                cut = error
            await outage.sit_out(cut)

    async def watch(
        self,
        video_id: str,
        *,
        from_start: bool = True,
        policy: Policy = "pause",
        report: Report | None = None,
    ) -> AsyncGenerator[Chunk, None]:
        """The chunks of a video as they are made; `chunk.start.init` and their data in order are a file.

        With policy "drop" a reader who is too slow misses some (their `seq` tells); with "pause" the render
        waits for it. VideoFailed when the video ends otherwise than complete.
        """
        opening: dict[str, Any] = {"type": "session.resume", "session_id": checked_id(video_id)}
        opening |= {"last_seq": -1 if from_start else "live", "policy": policy}
        stream = LiveStream(self._connection, opening, report)
        try:
            while chunk := await stream.next_chunk():
                yield chunk
        except ServerError as error:
            if error.status == 0 and not isinstance(error, Unreachable):
                self._raise_if_failed(await self.get(video_id))
            raise
        finally:
            await stream.close()
        self._raise_if_failed(await self.get(video_id))

    def _raise_if_failed(self, video: Video) -> None:
        if video.status == "failed":
            raise VideoFailed(video)

    @asynccontextmanager
    async def session(
        self,
        prompt: str,
        *,
        policy: Policy = "drop",
        report: Report | None = None,
        **fields: Any,
    ) -> AsyncIterator[LiveStream]:
        """A live session, ended on the way out: `chunks()`, `change_prompt(prompt, transition_chunks)`."""
        values = {key: value for key, value in fields.items() if value is not None}
        opening = {"type": "session.start", "prompt": prompt, "policy": policy, **values}
        stream = LiveStream(self._connection, opening, report)
        try:
            await stream.open()
            yield stream
            await stream.stop()
        finally:
            await stream.leave()

    async def _poll(self, video_id: str) -> tuple[Video, float]:
        """A video and how long to wait before the next look."""
        response = await self._connection.ask("GET", _path(video_id), again=True)
        wait = response.headers.get("openai-poll-after-ms", "")
        pause_s = int(wait) / 1000 if wait.isdecimal() else POLL_S
        return Video.of(read_json(response, self._connection.url)), max(pause_s, 0.05)


def _path(video_id: str, rest: str = "") -> str:
    return f"/v1/videos/{checked_id(video_id)}{rest}"
