"""Who may ask for what: API keys, short-lived tickets for browsers, and where a request may come from.

`Gate` (gate.py) asks here before a request reaches a route.
"""

import hashlib
import hmac
import math
import re
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from starlette.requests import HTTPConnection

from vidgen.serve.config import LOCAL, KeyConfig
from vidgen.serve.errors import error, forbidden, invalid, unauthorized

LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})
SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
VIDEO_TICKET_S = 3600.0  # to read one video: a player asks for ranges and segments as long as it plays
MAX_TICKETS_PER_OWNER = 4096
# what an HTML element or an EventSource asks for, neither of which can send a key
TICKET_PATH = re.compile(r"/v1/videos/([^/]+)/(?:content|stream|events|hls/[^/]+)")
HOST = re.compile(r"(?P<name>\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(?::(?P<port>[0-9]{1,5}))?")


class Keys:
    """The API keys of a server; none means that everybody who reaches it is the owner `local`."""

    def __init__(self, keys: Sequence[KeyConfig]) -> None:
        self._digests = [(key.name, bytes.fromhex(key.sha256)) for key in keys]

    @property
    def is_open(self) -> bool:
        return not self._digests

    def owner(self, key: str) -> str | None:
        """The name of a key, or None. Every digest is compared, each in constant time."""
        given = hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
        found = None
        for name, digest in self._digests:
            if hmac.compare_digest(given, digest):
                found = name
        return found


@dataclass(kw_only=True, slots=True)
class Ticket:
    """Stands for a key in a URL: once for a WebSocket, or for reading one video for a while."""

    owner: str
    video_id: str | None
    expires_at: int  # unix seconds; a part of a second counts whole, so that no ticket ends early
    is_used: bool = False  # by a WebSocket


@dataclass
class Tickets:
    """The tickets that have not expired, in memory: a restarted server knows none of them."""

    socket_s: float = 60.0  # how long one for a WebSocket is good
    _tickets: dict[bytes, Ticket] = field(default_factory=dict)  # by the digest, as keys are kept

    def issue(self, owner: str, video_id: str | None = None) -> tuple[str, Ticket]:
        """(what the client shows, the ticket). ApiError 429 for an owner who holds too many."""
        now = time.time()
        self._tickets = {digest: t for digest, t in self._tickets.items() if t.expires_at > now}
        if sum(ticket.owner == owner for ticket in self._tickets.values()) >= MAX_TICKETS_PER_OWNER:
            raise error(
                429, "too_many_tickets", "too many tickets are open; wait until some expire",
                headers={"Retry-After": "10"},
            )  # fmt: skip
        text = secrets.token_urlsafe(32)
        lifetime_s = self.socket_s if video_id is None else VIDEO_TICKET_S
        ticket = Ticket(owner=owner, video_id=video_id, expires_at=math.ceil(now + lifetime_s))
        self._tickets[_digest(text)] = ticket
        return text, ticket

    def to_read(self, text: str, video_id: str) -> str | None:
        """The owner, for a ticket of this very video that has not expired."""
        ticket = self._tickets.get(_digest(text))
        if ticket is None or ticket.expires_at <= time.time() or ticket.video_id != video_id:
            return None
        return ticket.owner

    def to_connect(self, text: str) -> Ticket | None:
        """The ticket for one WebSocket: a second one does not get it. None when it is not valid."""
        ticket = self._tickets.get(_digest(text))
        if ticket is None or ticket.expires_at <= time.time() or ticket.is_used:
            return None
        ticket.is_used = True
        return ticket


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()


@dataclass(frozen=True, kw_only=True)
class Origins:
    """Which names of this server and which other sites' pages are accepted."""

    host: str  # that the server is bound to
    allowed_hosts: tuple[str, ...] = ()
    allowed_origins: tuple[str, ...] = ()

    def check_host(self, given: str) -> None:
        """ApiError unless this server may be called that: a page elsewhere could name it anything (DNS
        rebinding) and be of the same origin as far as the browser knows."""
        match = HOST.fullmatch(given)
        if match is None:
            raise invalid("the Host header is no host name", code="bad_host")
        name = match["name"].strip("[]").lower()
        known = {self.host.lower(), *(host.lower() for host in self.allowed_hosts)}
        if is_loopback(self.host):
            known |= LOOPBACK_NAMES
        elif not self.allowed_hosts:
            return  # whoever asks there needs a key, which no browser adds by itself
        if name not in known:
            raise forbidden(
                f"this server is not called {name}; add that to allowed_hosts, or use {self.host}",
                "host_not_allowed",
            )

    def check_origin(self, origin: str | None, host: str) -> None:
        """ApiError when a page of another site asks; programs send no Origin."""
        if origin is None or origin in self.allowed_origins:
            return
        if urlsplit_host(origin) != host.lower():
            raise forbidden(
                "a page of another site may not do this; add its origin to allowed_origins",
                "origin_not_allowed",
            )


def is_loopback(host: str) -> bool:
    """Whether an address is reached from this machine only."""
    return host.lower() in LOOPBACK_NAMES or host.startswith("127.")


def urlsplit_host(origin: str) -> str | None:
    """HOST[:PORT] of an origin, in lower case; None for one that is not of http or https."""
    try:
        parts = urlsplit(origin)
    except ValueError:
        return None
    return parts.netloc.lower() if parts.scheme in ("http", "https") else None


def bearer(header: str | None) -> str | None:
    """The key of an Authorization header; None without one."""
    scheme, _, key = (header or "").partition(" ")
    return key.strip() or None if scheme.lower() == "bearer" else None


def identify(connection: HTTPConnection, keys: Keys, tickets: Tickets) -> tuple[str, str | None]:
    """(owner, the one video that a ticket is good for or None) of a request. ApiError 401 without a key."""
    if keys.is_open:
        return LOCAL, None
    key = bearer(connection.headers.get("authorization"))
    owner = keys.owner(key) if key is not None else None
    if owner is not None:
        return owner, None
    text = connection.query_params.get("ticket") if key is None else None
    if text is not None and connection.scope["type"] == "websocket":
        ticket = tickets.to_connect(text)
        if ticket is not None:
            return ticket.owner, ticket.video_id
    elif text is not None and connection.scope["method"] in ("GET", "HEAD"):
        match = TICKET_PATH.fullmatch(connection.url.path)
        owner = tickets.to_read(text, match[1]) if match else None
        if match and owner is not None:
            return owner, match[1]
    raise unauthorized()


def require(connection: HTTPConnection) -> str:
    """The owner on whose behalf a request or a WebSocket comes. ApiError 401 without a valid key or ticket.

    The gate has identified it already (a WebSocket's ticket is used up by that); where there is no gate it is
    done here.
    """
    scope = connection.scope
    if "vidgen.owner" not in scope:
        server = connection.app.state.server
        scope["vidgen.owner"], scope["vidgen.only_video"] = identify(connection, server.keys, server.tickets)
    return scope["vidgen.owner"]


def only_video(connection: HTTPConnection) -> str | None:
    """The one video that a request's ticket is good for; None when it came with a key."""
    require(connection)
    return connection.scope["vidgen.only_video"]
