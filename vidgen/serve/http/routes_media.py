"""A video's bytes: the finished file in ranges, what there is of a running one, a growing stream, HLS."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Annotated, Literal

from fastapi import APIRouter, Query, Request
from fastapi import Path as InPath
from starlette.responses import Response, StreamingResponse

from vidgen.serve.errors import ApiError, conflict, error, not_found, not_ready
from vidgen.serve.http import hls
from vidgen.serve.http.answers import Files, errors, files_response, look
from vidgen.serve.http.routes_videos import VideoId
from vidgen.serve.http.state import Server, find, server_of, unless_draining
from vidgen.serve.live.audience import audience_of
from vidgen.serve.records import Record, Status
from vidgen.serve.work.feeds import Feed

FIRST_CHUNK_S = 10.0  # a playlist without a segment helps no player: it is waited for
MP4 = "video/mp4"
BYTES = {"schema": {"type": "string", "format": "binary"}}
FILE = {200: {"content": {MP4: BYTES, "image/jpeg": BYTES, "image/png": BYTES}}}
PART = {
    206: {"description": "A range of it", "content": FILE[200]["content"]},
    304: {"description": "Unchanged"},
}
Ticket = Annotated[str | None, Query(description="Instead of a key, see POST /v1/tickets")]
router = APIRouter(tags=["watching"])


@router.head("/v1/videos/{video_id}/content", include_in_schema=False)
@router.get(
    "/v1/videos/{video_id}/content",
    responses={**FILE, **PART, **errors(404, 409, 416, 422)},
    response_class=Response,
)
async def content(
    request: Request,
    video_id: VideoId,
    variant: Literal["video", "thumbnail", "spritesheet"] = "video",
    partial: Annotated[bool, Query(description="What there is of a video that has not completed")] = False,
    ticket: Ticket = None,
) -> Response:
    """The finished MP4, its first frame (JPEG) or its contact sheet (PNG). Takes Range."""
    record = await find(request, video_id)
    server = server_of(request)
    folder = server.folder(record)
    try:
        if variant == "thumbnail":
            files = await asyncio.to_thread(look, [folder / "thumbnail.jpg"])
            return files_response(request, files, "image/jpeg", f"{record.id}.jpg")
        if variant == "spritesheet":
            _check_completed(record)
            files = await asyncio.to_thread(look, [folder / "spritesheet.png"])
            return files_response(request, files, "image/png", f"{record.id}.png")
        if partial and record.status is not Status.COMPLETED:
            files = await _partial(server, record)
        else:
            _check_completed(record)
            files = await asyncio.to_thread(look, [folder / "video.mp4"])
        return files_response(request, files, MP4, f"{record.id}.mp4")
    except FileNotFoundError:
        raise await _missing(server, record) from None


@router.get(
    "/v1/videos/{video_id}/stream",
    responses={200: {"content": {MP4: BYTES}}, **errors(404, 409, 503)},
    response_class=StreamingResponse,
)
async def stream(request: Request, video_id: VideoId, ticket: Ticket = None) -> Response:
    """A fragmented MP4 from the first frame on that grows as the video does, and ends with it."""
    record = await find(request, video_id)
    server = server_of(request)
    feed = server.feeds.of(record.id)
    if feed.is_ended and not feed.chunks:
        raise _no_frames(feed.record)
    audience = audience_of(request.app)
    audience.check_room()

    async def growing() -> AsyncIterator[bytes]:
        with audience.seat(record.id, request):
            async for piece in _grow(server, feed):
                yield piece

    return StreamingResponse(growing(), media_type=MP4, headers={"x-accel-buffering": "no"})


@router.get(
    "/v1/videos/{video_id}/hls/index.m3u8",
    responses={200: {"content": {hls.MIME: {"schema": {"type": "string"}}}}, **errors(404, 409)},
    response_class=Response,
)
async def playlist(request: Request, video_id: VideoId, ticket: Ticket = None) -> Response:
    """The HLS playlist; a player asks for it again until it ends."""
    record = await find(request, video_id)
    server = server_of(request)
    feed = server.feeds.of(record.id)
    try:
        async with asyncio.timeout(FIRST_CHUNK_S):
            await unless_draining(server, feed.next_chunk(-1))
    except TimeoutError:
        pass
    if not feed.chunks:
        raise _no_frames(feed.record)
    text = hls.playlist(
        feed.chunks,
        record.fps,
        is_ended=feed.is_ended,
        frames_per_chunk=-(-record.num_frames // max(1, record.chunks_total)),
        ticket=ticket,
    )
    return Response(text, media_type=hls.MIME)


@router.get(
    "/v1/videos/{video_id}/hls/init.mp4",
    responses={200: {"content": {MP4: BYTES}}, **PART, **errors(404, 416)},
    response_class=Response,
)
async def init_segment(request: Request, video_id: VideoId, ticket: Ticket = None) -> Response:
    """What comes before every segment."""
    record = await find(request, video_id)
    return await _segment(request, record, "init.mp4")


@router.get(
    "/v1/videos/{video_id}/hls/{index}.m4s",
    responses={200: {"content": {MP4: BYTES}}, **PART, **errors(404, 416, 422)},
    response_class=Response,
)
async def segment(
    request: Request,
    video_id: VideoId,
    index: Annotated[int, InPath(ge=0, le=999_999)],
    ticket: Ticket = None,
) -> Response:
    """One chunk."""
    record = await find(request, video_id)
    if index >= len(server_of(request).feeds.of(record.id).chunks):
        raise error(404, "no_such_chunk", f"chunk {index} is not there (yet); see index.m3u8", "index")
    return await _segment(request, record, f"{index:06d}.m4s")


async def _segment(request: Request, record: Record, name: str) -> Response:
    path = server_of(request).segments(record) / name
    try:
        files = await asyncio.to_thread(look, [path])
    except FileNotFoundError:
        raise error(404, "no_such_chunk", "nothing of it is there (yet); see index.m3u8") from None
    return files_response(request, files, MP4, name)


async def _partial(server: Server, record: Record) -> Files:
    """The init segment and all chunks so far: a fragmented MP4 that plays. ApiError 409 without any."""
    feed = server.feeds.of(record.id)
    if not feed.chunks:
        raise _no_frames(feed.record)
    return await asyncio.to_thread(look, _segment_paths(server.segments(record), feed))


def _segment_paths(folder: Path, feed: Feed) -> list[Path]:
    return [folder / "init.mp4", *(folder / f"{chunk.index:06d}.m4s" for chunk in feed.chunks)]


async def _grow(server: Server, feed: Feed) -> AsyncIterator[bytes]:
    """The init segment, then every chunk once it is there. Holds one chunk's piece at a time."""
    folder, after = server.segments(feed.record), -1
    while (chunk := await unless_draining(server, feed.next_chunk(after))) is not None:
        names = ["init.mp4"] if after < 0 else []
        files = await asyncio.to_thread(look, [folder / name for name in [*names, f"{chunk.index:06d}.m4s"]])
        async for piece in files.read(0, files.num_bytes):
            yield piece
        after = chunk.index


def _check_completed(record: Record) -> None:
    """ApiError 409 unless there is a finished file."""
    if record.status is Status.FAILED:
        raise conflict(
            f"video {record.id} has failed ({record.error_code}); resume it, or ask with partial=true for "
            "what there is",
            "video_failed",
        )
    if record.status is not Status.COMPLETED:
        raise not_ready(record.id, record.status.value)


def _no_frames(record: Record) -> ApiError:
    return conflict(f"video {record.id} is {record.status.value} and has no frames yet", "no_frames")


async def _missing(server: Server, record: Record) -> ApiError:
    """Why a file that belongs to a video is not there."""
    if await asyncio.to_thread(server.store.get, record.id) is None:
        return not_found(record.id)
    if record.status is Status.COMPLETED:
        return error(404, "no_such_file", f"video {record.id} has none of this")
    return _no_frames(record)
