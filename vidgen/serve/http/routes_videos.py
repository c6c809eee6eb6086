"""Videos as jobs: make, list, look, delete, cancel, resume. OpenAI's /v1/videos, and ours beside it."""

import asyncio
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Path, Query, Request
from starlette.responses import Response

from vidgen.serve.admission import make_record
from vidgen.serve.errors import invalid, unavailable
from vidgen.serve.http.answers import JsonResponse, errors
from vidgen.serve.http.bodies import BODIES, read_request, write_input
from vidgen.serve.http.security import require
from vidgen.serve.http.state import find, server_of
from vidgen.serve.records import ENDED, Record, Status, video_object
from vidgen.serve.schema import Deleted, VideoList, VideoObject

POLL_AFTER_MS = 500
router = APIRouter(tags=["videos"])
VideoId = Annotated[str, Path(description="As the server gave it out")]


@router.post(
    "/v1/videos", response_model=VideoObject, responses=errors(415, 422, 429, 503, 507), openapi_extra=BODIES
)
async def create_video(request: Request) -> Response:
    """Ask for a video: it waits in the queue, durably, when this answers. JSON or a form."""
    server, owner = server_of(request), require(request)
    if server.draining.is_set():
        raise unavailable("the server is about to stop; ask the next one")
    wanted, picture = await read_request(request, server.config.limits.max_image_pixels)
    record = await asyncio.to_thread(
        make_record, wanted, server.config, owner, input_suffix=picture.suffix if picture else None
    )
    if picture is None:
        return await _shown(request, await server.scheduler.submit(record))
    file = await asyncio.to_thread(write_input, server.config.data, record.id, picture)
    try:
        return await _shown(request, await server.scheduler.submit(record))
    except BaseException:
        file.unlink(missing_ok=True)
        raise


@router.get("/v1/videos", response_model=VideoList, responses=errors(422))
async def list_videos(
    request: Request,
    after: Annotated[str | None, Query(description="The last id of the page before")] = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    order: Literal["asc", "desc"] = "desc",
) -> Response:
    """A page of one's own videos and sessions, by default the newest first."""
    server, owner = server_of(request), require(request)

    def read() -> dict[str, Any]:
        try:
            records, has_more = server.store.page(
                owner=owner, after=after, limit=limit, descending=order == "desc"
            )
        except ValueError as error:
            raise invalid(str(error), "after") from error
        shown = [video_object(record, server.store.queue_position(record.id)) for record in records]
        ids = [video["id"] for video in shown] or [None]
        return {
            "object": "list", "data": shown, "has_more": has_more, "first_id": ids[0], "last_id": ids[-1],
        }  # fmt: skip

    return JsonResponse(await asyncio.to_thread(read))


@router.get("/v1/videos/{video_id}", response_model=VideoObject, responses=errors(404))
async def get_video(request: Request, video_id: VideoId) -> Response:
    """How a video is getting on."""
    return await _shown(request, await find(request, video_id))


@router.delete("/v1/videos/{video_id}", response_model=Deleted, responses=errors(404, 409))
async def delete_video(request: Request, video_id: VideoId) -> Response:
    """Delete a video and its files. One that is being made is given up first."""
    record = await find(request, video_id)
    await server_of(request).scheduler.remove(record.id)
    return JsonResponse({"id": record.id, "object": "video.deleted", "deleted": True})


@router.post("/v1/videos/{video_id}/cancel", response_model=VideoObject, responses=errors(404, 409))
async def cancel_video(request: Request, video_id: VideoId) -> Response:
    """Give a video up: it has failed with the code `cancelled`. One that has ended stays as it is."""
    record = await find(request, video_id)
    if record.status not in ENDED:
        record = await server_of(request).scheduler.cancel(record.id)
    return await _shown(request, record)


@router.post(
    "/v1/videos/{video_id}/resume", response_model=VideoObject, responses=errors(404, 409, 429, 503, 507)
)
async def resume_video(request: Request, video_id: VideoId) -> Response:
    """Have a failed or cancelled video go on from its last chunk. Any other stays as it is."""
    record = await find(request, video_id)
    if record.status is Status.FAILED:
        record = await server_of(request).scheduler.resume(record.id)
    return await _shown(request, record)


async def _shown(request: Request, record: Record) -> Response:
    """A video's JSON, with the header by which OpenAI's client knows when to ask again."""
    position = await asyncio.to_thread(server_of(request).store.queue_position, record.id)
    headers = {} if record.status in ENDED else {"openai-poll-after-ms": str(POLL_AFTER_MS)}
    return JsonResponse(video_object(record, position), headers=headers)
