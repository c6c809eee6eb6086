"""What happens to a video, as server-sent events that a client can take up again where it lost them."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import APIRouter, Header, Request
from starlette.responses import Response, StreamingResponse

from vidgen.serve.http.answers import errors
from vidgen.serve.http.routes_videos import VideoId
from vidgen.serve.http.state import Server, find, server_of, unless_draining
from vidgen.serve.live.audience import audience_of
from vidgen.serve.work.feeds import Event, Feed

SILENCE_S = 15.0  # then a comment, so that nobody in between takes the connection for dead
MAX_NUMBER = 2**62
router = APIRouter(tags=["watching"])


@router.get(
    "/v1/videos/{video_id}/events",
    responses={200: {"content": {"text/event-stream": {}}}, **errors(404, 503)},
    response_class=StreamingResponse,
)
async def events(
    request: Request, video_id: VideoId, last_event_id: Annotated[str | None, Header()] = None
) -> Response:
    """Events `status`, `chunk`, `progress`, `prompt_applied`: those after Last-Event-ID, then as they come.

    Ends after the video's last one.
    """
    record = await find(request, video_id)
    server = server_of(request)
    feed = server.feeds.of(record.id)
    audience = audience_of(request.app)
    audience.check_room()
    after = int(last_event_id) if last_event_id and last_event_id[:19].isdecimal() else 0

    async def told() -> AsyncIterator[bytes]:
        with audience.seat(record.id, request):
            yield b"retry: 1000\n\n"
            async for text in _tell(server, feed, min(after, MAX_NUMBER)):
                yield text

    return StreamingResponse(told(), media_type="text/event-stream", headers={"x-accel-buffering": "no"})


async def _tell(server: Server, feed: Feed, after: int) -> AsyncIterator[bytes]:
    while True:
        try:
            async with asyncio.timeout(SILENCE_S):
                event = await unless_draining(server, feed.next_event(after))
        except TimeoutError:
            yield b": still here\n\n"
            continue
        if event is None:
            return
        after = event.number
        yield as_text(event)


def as_text(event: Event) -> bytes:
    """An event as it goes over the wire; JSON in ASCII has no line breaks."""
    return f"id: {event.number}\nevent: {event.name}\ndata: {json.dumps(event.data)}\n\n".encode("ascii")
