"""The server itself: models, tickets, health, readiness, metrics, and what can be asked of it."""

import asyncio
import json
import time
from typing import Any

from fastapi import APIRouter, Request
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import Field
from starlette.responses import HTMLResponse, Response

from vidgen.sections import Strict
from vidgen.serve.admission import describe
from vidgen.serve.errors import unavailable, unknown_model
from vidgen.serve.http.answers import JsonResponse, errors
from vidgen.serve.http.apipage import openapi, page
from vidgen.serve.http.bodies import read_json
from vidgen.serve.http.security import require
from vidgen.serve.http.state import find, server_of
from vidgen.serve.live.audience import audience_of
from vidgen.serve.schema import ModelList, ModelObject, VideoRequest, parse_request

STARTED_AT = int(time.time())
router = APIRouter(tags=["server"])


class TicketRequest(Strict):
    """What a ticket is for."""

    video_id: str | None = Field(default=None, max_length=100)
    """The video to read; without one the ticket opens one WebSocket."""


class TicketObject(Strict):
    """Goes into a URL as ?ticket=, where no header can be sent."""

    ticket: str
    expires_at: int
    """Unix seconds."""


class Health(Strict):
    """The server answers."""

    status: str = "ok"


class ReplicaObject(Strict):
    """A worker."""

    index: int
    state: str
    beat_age_s: float | None
    video_id: str | None
    device: str | None
    ranks: int
    rank_ages_s: list[float]
    """Since each rank was heard, and last its decoder; nothing of one that works in one process."""


class Ready(Strict):
    """All workers are loaded and have answered lately."""

    status: str = "ready"
    replicas: list[ReplicaObject]


TICKET_BODY = {
    "requestBody": {
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/TicketRequest"}}}
    }
}

BODY_MODELS = (VideoRequest, TicketRequest)  # read by hand


@router.get("/v1/models", response_model=ModelList, responses=errors())
async def models(request: Request) -> Response:
    """The models that a video may name, and what they do where nothing is said."""
    config = server_of(request).config
    found = [await asyncio.to_thread(describe, name, config) for name in config.models]
    return JsonResponse({"object": "list", "data": [{**model, "created": STARTED_AT} for model in found]})


@router.get("/v1/models/{name}", response_model=ModelObject, responses=errors(404))
async def model(request: Request, name: str) -> Response:
    """One of them."""
    config = server_of(request).config
    if name not in config.models:
        raise unknown_model(name, config.models)
    found = await asyncio.to_thread(describe, name, config)
    return JsonResponse({**found, "created": STARTED_AT})


@router.post(
    "/v1/tickets",
    response_model=TicketObject,
    responses=errors(404, 415, 422, 429),
    openapi_extra=TICKET_BODY,
)
async def make_ticket(request: Request) -> Response:
    """A ticket: for one WebSocket, or with `video_id` for reading that video."""
    has_body = request.headers.get("content-length", "0") != "0" or "transfer-encoding" in request.headers
    wanted = parse_request(await read_json(request) if has_body else {}, TicketRequest)
    if wanted.video_id is not None:
        await find(request, wanted.video_id)
    text, ticket = server_of(request).tickets.issue(require(request), wanted.video_id)
    return JsonResponse({"ticket": text, "expires_at": ticket.expires_at})


@router.head("/health", include_in_schema=False)
@router.get("/health", response_model=Health, responses=errors())
async def health() -> Response:
    """Whether the server answers at all; /ready says whether it can work."""
    return JsonResponse({"status": "ok"})


@router.get("/ready", response_model=Ready, responses=errors(503))
async def ready(request: Request) -> Response:
    """503 unless every worker is loaded, on all its ranks, and has answered lately."""
    server = server_of(request)
    replicas = [
        {
            "index": facts.index, "state": str(facts.state), "beat_age_s": facts.beat_age_s,
            "video_id": facts.video_id, "device": facts.device, "ranks": facts.ranks,
            "rank_ages_s": [round(age_s, 3) for age_s in facts.rank_ages_s],
        }
        for facts in server.scheduler.replicas()
    ]  # fmt: skip
    if server.draining.is_set():
        raise unavailable("the server is about to stop")
    if not server.scheduler.is_ready:
        longest_s = server.config.timings.heartbeat_timeout_s
        states = ", ".join(
            f"replica {facts['index']} is {facts['state']}"
            + (
                f", {_num_heard(facts, longest_s)} of its {facts['ranks']} ranks"
                if facts["ranks"] > 1
                else ""
            )
            for facts in replicas
        )
        raise unavailable(f"not everybody is there: {states}", retry_after_s=1)
    return JsonResponse({"status": "ready", "replicas": replicas})


def _num_heard(facts: dict[str, Any], longest_s: float) -> int:
    """Ranks that have answered lately."""
    return sum(age_s < longest_s for age_s in facts["rank_ages_s"][: facts["ranks"]])


@router.get(
    "/metrics",
    response_class=Response,
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}, **errors()},
)
async def metrics(request: Request) -> Response:
    """Queue, replicas, first frames, gaps between chunks, stalls and request times, for Prometheus."""
    server = server_of(request)
    text = await asyncio.to_thread(server.metrics.text, server, audience_of(request.app).num_viewers)
    return Response(text, headers={"content-type": CONTENT_TYPE_LATEST})


@router.get("/openapi.json", include_in_schema=False)
async def openapi_json(request: Request) -> Response:
    """The API, for programs."""
    return JsonResponse(await asyncio.to_thread(openapi, request.app, BODY_MODELS))


@router.get("/docs", include_in_schema=False)
async def docs(request: Request) -> Response:
    """The API, for people: no script, nothing from elsewhere."""
    found: dict[str, Any] = await asyncio.to_thread(openapi, request.app, BODY_MODELS)
    return HTMLResponse(page(found, json.dumps(found, indent=1)))
