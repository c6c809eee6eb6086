"""The server put together: `make_app` makes the ASGI application, `serve` runs it until told to stop."""

import asyncio
import logging
import signal
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from functools import partial

import uvicorn
from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from vidgen import __version__
from vidgen.cli_exit import write_line
from vidgen.serve.admission import load_facts
from vidgen.serve.config import ServerConfig, store_file
from vidgen.serve.http import routes_events, routes_media, routes_page, routes_system, routes_videos
from vidgen.serve.http.answers import JsonResponse, install_error_handlers
from vidgen.serve.http.gate import Gate
from vidgen.serve.http.metrics import Metrics
from vidgen.serve.http.security import Keys, Origins, Tickets
from vidgen.serve.http.state import Server
from vidgen.serve.live import realtime
from vidgen.serve.store import Store
from vidgen.serve.work.feeds import Feeds
from vidgen.serve.work.scheduler import Scheduler

MAX_MESSAGE_BYTES = 64 * 1024  # of a WebSocket's client, who sends prompts only
MAX_HEADER_BYTES = 64 * 1024
KEEP_ALIVE_S = 30
BACKLOG = 512


def make_app(config: ServerConfig) -> FastAPI:
    """The application of one server process, its parts at `app.state.server`.

    ValueError when another process serves the same data folder, or it cannot be written.
    """
    server = _make_server(config)
    app = FastAPI(
        title="vidgen",
        version=__version__,
        description="Videos as jobs that survive, watched while they are made, and live sessions.",
        lifespan=partial(_lifespan, server),
        default_response_class=JsonResponse,
        docs_url=None,
        redoc_url=None,
        openapi_url=None,  # a route of its own in routes_system, behind the key
        redirect_slashes=False,
    )
    app.state.server = server
    for part in (routes_videos, routes_media, routes_events, routes_system, realtime, routes_page):
        app.include_router(part.router)
    install_error_handlers(app)
    app.add_middleware(Gate, server=server, is_page=_is_page)
    if config.allowed_origins:  # outside the gate: a browser asks first, without a key
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(config.allowed_origins),
            allow_methods=["GET", "HEAD", "POST", "DELETE"],
            allow_headers=["Authorization", "Content-Type", "Last-Event-ID", "Range"],
            expose_headers=["Content-Range", "Retry-After", "openai-poll-after-ms"],
        )
    return app


@contextmanager
def _own_signals() -> Iterator[None]:
    """Within, uvicorn's last act, to raise again the signal that ended it, does nothing: we return 0."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _say(text: str) -> None:
    write_line("stdout", text)


def serve(config: ServerConfig, say: Callable[[str], None] = _say) -> int:
    """Serve until SIGINT or SIGTERM; the exit code. Says where, once it can be reached.

    ValueError when the address is taken or the data folder is in use. Told to stop, it takes no new work,
    ends streams, and leaves running jobs to be resumed by the next start; told twice, it ends at once.
    """
    listener = _listen(config.host, config.port)
    try:
        app = make_app(config)
        port = listener.getsockname()[1]
        shown = f"[{config.host}]" if ":" in config.host else config.host
        settings = uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            server_header=False,
            http="h11",
            ws="websockets-sansio",
            ws_max_size=MAX_MESSAGE_BYTES,
            ws_per_message_deflate=False,  # video does not get smaller, and the event loop would try
            h11_max_incomplete_event_size=MAX_HEADER_BYTES,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=max(1, round(config.timings.drain_s)),
        )
        runner = _Runner(settings, app.state.server, lambda: say(f"vidgen: serving on http://{shown}:{port}"))
        logging.basicConfig(level=config.log_level.upper(), format="%(asctime)s %(levelname)s %(message)s")
        logging.getLogger("python_multipart").setLevel(logging.ERROR)  # a warning for every bad form
        with _own_signals():
            runner.run(sockets=[listener])
        if app.state.server.failure is not None:
            raise app.state.server.failure
        return 0 if runner.started else 1
    finally:
        listener.close()


class _Runner(uvicorn.Server):
    """uvicorn that says when it can be reached, and tells open streams when it is to end."""

    def __init__(self, settings: uvicorn.Config, server: Server, started: Callable[[], None]) -> None:
        super().__init__(settings)
        self._server, self._tell_started = server, started

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started and not self.should_exit:
            self._tell_started()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._server.draining.set()
        await super().shutdown(sockets)


def _make_server(config: ServerConfig) -> Server:
    try:
        config.data.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise ValueError(
            f"data={config.data}: cannot be written: {error.strerror}; choose another"
        ) from error
    store = Store(store_file(config.data))
    feeds = Feeds(store)
    return Server(
        config=config,
        store=store,
        feeds=feeds,
        scheduler=Scheduler(config, store, feeds),
        keys=Keys(config.keys),
        tickets=Tickets(config.timings.ticket_s),
        origins=Origins(
            host=config.host,
            allowed_hosts=tuple(config.allowed_hosts),
            allowed_origins=tuple(config.allowed_origins),
        ),
        metrics=Metrics(),
    )


@asynccontextmanager
async def _lifespan(server: Server, app: FastAPI) -> AsyncIterator[None]:
    await server.scheduler.start()
    try:
        await asyncio.to_thread(load_facts, server.config)
    except ValueError as error:
        server.failure = error
        await server.scheduler.stop()
        server.store.close()
        raise
    follower = asyncio.create_task(server.metrics.follow_all(server.scheduler, server.feeds))
    try:
        yield
    finally:
        server.draining.set()
        follower.cancel()
        with suppress(asyncio.CancelledError):
            await follower
        await server.scheduler.stop()
        server.store.close()


def _is_page(path: str) -> bool:
    """Whether a path is the web page's, which anybody may load: it asks for a key itself."""
    return path == "/" or path.startswith("/page/")


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # told to be TCP: asyncio turns Nagle's algorithm off only then, which else costs 40 ms an answer
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(BACKLOG)
        return listener
    except OSError as error:
        listener.close()
        raise ValueError(
            f"host={host}, port={port}: cannot listen there: {error.strerror}; give another --port, or 0"
        ) from error
