"""`Client`: the asynchronous client on a loop of its own."""

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self, TypeVar

from vidgen.serve.client.asynchronous import SERVER, AsyncClient, Order, Variant
from vidgen.serve.client.http import Event, Video
from vidgen.serve.client.live import Chunk, LiveStream, Policy, Report

CLEANUP_S = 10.0
T = TypeVar("T")


class Loop:
    """An event loop on a thread of its own, so that a client also works below another loop (a notebook)."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="vidgen-client", daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """What the coroutine returns. When its caller is interrupted, it is cancelled and tidies up first."""
        if self._loop.is_closed():
            work.close()
            raise RuntimeError("this client is closed")
        ended = threading.Event()

        async def tell_the_end() -> T:
            try:
                return await work
            finally:
                ended.set()

        future = asyncio.run_coroutine_threadsafe(tell_the_end(), self._loop)
        try:
            return future.result()
        except BaseException:
            if future.cancel():
                ended.wait(CLEANUP_S)
            raise

    def iterate(self, source: AsyncGenerator[T, None]) -> Iterator[T]:
        """The items of an asynchronous generator, which is closed when the caller stops."""
        try:
            while True:
                try:
                    item = self.run(anext(source))
                except StopAsyncIteration:
                    return
                yield item
        finally:
            if not self._loop.is_closed():
                self.run(source.aclose())

    def close(self) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()


class Session:
    """A live session. Two threads may use it: one reads chunks, the other changes the prompt."""

    def __init__(self, stream: LiveStream, loop: Loop) -> None:
        self._stream, self._loop = stream, loop

    @property
    def id(self) -> str | None:
        return self._stream.id

    def chunks(self) -> Iterator[Chunk]:
        """All chunks to come."""
        return self._loop.iterate(self._stream.chunks())

    def change_prompt(self, prompt: str, transition_chunks: int | None = None) -> int:
        """The first frame that is made for the prompt. ServerError when the change is refused."""
        return self._loop.run(self._stream.change_prompt(prompt, transition_chunks))

    def stop(self) -> None:
        """End the session with what is there; returns when the server has done so."""
        self._loop.run(self._stream.stop())


class Client:
    """A server's videos, see `AsyncClient`. One client may be used by several threads."""

    def __init__(
        self,
        server: str = SERVER,
        *,
        api_key: str | None = None,
        timeout_s: float = 30.0,
        patience_s: float = 30.0,
    ) -> None:
        self._client = AsyncClient(server, api_key=api_key, timeout_s=timeout_s, patience_s=patience_s)
        self._loop = Loop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._loop.run(self._client.close())
        self._loop.close()

    def create(self, prompt: str | None = None, *, image: Path | None = None, **fields: Any) -> Video:
        """The video that was queued for a prompt or `segments`, by OpenAI's or diffusers' names of fields."""
        return self._loop.run(self._client.create(prompt, image=image, **fields))

    def get(self, video_id: str) -> Video:
        """How a video stands."""
        return self._loop.run(self._client.get(video_id))

    def wait(
        self,
        video_id: str,
        *,
        timeout_s: float | None = None,
        report: Callable[[Video], None] = lambda video: None,
    ) -> Video:
        """The completed video; `report` gets it after every poll. VideoFailed, or TimeoutError when late."""
        return self._loop.run(self._client.wait(video_id, timeout_s=timeout_s, report=report))

    def list(self, *, limit: int | None = None, order: Order = "desc") -> Iterator[Video]:
        """Videos by age, newest first unless told otherwise, over all pages."""
        return self._loop.iterate(self._client.list(limit=limit, order=order))

    def cancel(self, video_id: str) -> Video:
        """The video, once nothing works on it any more."""
        return self._loop.run(self._client.cancel(video_id))

    def resume(self, video_id: str) -> Video:
        """A failed or cancelled video, queued again to go on where it stopped."""
        return self._loop.run(self._client.resume(video_id))

    def delete(self, video_id: str) -> None:
        """Stop a video and remove it."""
        self._loop.run(self._client.delete(video_id))

    def download(
        self, video_id: str, path: Path | str, *, variant: Variant = "video", partial: bool = False
    ) -> Path:
        """`path`, which is now the whole file; `partial` takes what there is of an unfinished video."""
        return self._loop.run(self._client.download(video_id, path, variant=variant, partial=partial))

    def events(self, video_id: str, *, after: int | None = None) -> Iterator[Event]:
        """What happens to a video, from its beginning or after an event's number, until it is over."""
        return self._loop.iterate(self._client.events(video_id, after=after))

    def watch(
        self,
        video_id: str,
        *,
        from_start: bool = True,
        policy: Policy = "pause",
        report: Report | None = None,
    ) -> Iterator[Chunk]:
        """The chunks of a video as they are made; `chunk.start.init` and their data in order are a file.

        With policy "drop" a reader who is too slow misses some (their `seq` tells); with "pause" the render
        waits for it. VideoFailed when the video ends otherwise than complete.
        """
        chunks = self._client.watch(video_id, from_start=from_start, policy=policy, report=report)
        return self._loop.iterate(chunks)

    @contextmanager
    def session(
        self, prompt: str, *, policy: Policy = "drop", report: Report | None = None, **fields: Any
    ) -> Iterator[Session]:
        """A live session, ended on the way out: `chunks()`, `change_prompt(prompt, transition_chunks)`."""
        session = self._client.session(prompt, policy=policy, report=report, **fields)
        stream = self._loop.run(session.__aenter__())
        try:
            yield Session(stream, self._loop)
        except BaseException as error:
            self._loop.run(session.__aexit__(type(error), error, error.__traceback__))
            raise
        self._loop.run(session.__aexit__(None, None, None))
