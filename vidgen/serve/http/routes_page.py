"""The web page: the files of vidgen/serve/http/page, held in memory and served under names of their content.

`/` is index.html. It names the other files as `page/VERSION/FILE`, where VERSION is a digest of all of them:
so they may be cached for good, and a new version of the package is never mixed with an old one.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from fastapi import APIRouter, Request, Response
from fastapi.responses import PlainTextResponse

FOLDER = Path(__file__).parent / "page"
CONTENT_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".txt": "text/plain; charset=utf-8",
}
STATIC_PREFIX = "/page/"
VERSION_MARK = "{version}"  # stands in index.html
FOREVER = "public, max-age=31536000, immutable"
ASK_AGAIN = "no-cache"
HEADERS = {
    # a ticket stands in media addresses: no address leaves with a request
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": (
        "default-src 'self'; media-src 'self' blob:; connect-src 'self'; object-src 'none'; "
        "base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
    ),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class PageFile:
    """What is sent for one name."""

    content: bytes
    content_type: str
    etag: str


def read_page(folder: Path) -> tuple[str, dict[str, PageFile]]:
    """The version and the files by name; only names in here are ever served."""
    contents = {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if _is_page(path)}
    whole = hashlib.sha256()
    for name, content in contents.items():
        whole.update(f"{name}\0{len(content)}\0".encode() + content)
    version = whole.hexdigest()[:16]
    index = contents["index.html"]
    contents["index.html"] = index.replace(VERSION_MARK.encode(), version.encode())
    return version, {name: _page_file(name, content) for name, content in contents.items()}


def _is_page(path: Path) -> bool:
    return path.is_file() and path.suffix in CONTENT_TYPES and not path.name.startswith(".")


def _page_file(name: str, content: bytes) -> PageFile:
    etag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
    return PageFile(content=content, content_type=CONTENT_TYPES[Path(name).suffix], etag=etag)


VERSION, FILES = read_page(FOLDER)
router = APIRouter(include_in_schema=False)


@router.api_route("/", methods=["GET", "HEAD"])
async def index(request: Request) -> Response:
    return _answer(request, FILES["index.html"], ASK_AGAIN)


@router.api_route(STATIC_PREFIX + "{version}/{name}", methods=["GET", "HEAD"])
async def file(request: Request, version: str, name: str) -> Response:
    """One of the page's files. A page from before an update still finds them, but may not keep them."""
    found = FILES.get(name)
    if found is None:
        return PlainTextResponse("no such file of the page\n", status_code=404, headers=HEADERS)
    return _answer(request, found, FOREVER if version == VERSION else ASK_AGAIN)


def _answer(request: Request, found: PageFile, caching: str) -> Response:
    headers = HEADERS | {"ETag": found.etag, "Cache-Control": caching}
    known = {tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")}
    if found.etag in known:
        return Response(status_code=304, headers=headers)
    return Response(found.content, media_type=found.content_type, headers=headers)
