"""Laws of the web page, in Debian's Chromium against a running server.

VIDGEN_SCREENSHOTS=FOLDER keeps the pictures that are taken on the way.
"""

import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import av
import httpx
import pytest

from vidgen.serve.http import routes_page

CHROMIUM = shutil.which("chromium") or "/usr/bin/chromium"
PROMPT = "a red circle moving left over a gray background"
CHANGE = "a blue square moving right over a gray background"
DEADLINE_S = 60.0
DESKTOP = {"width": 1440, "height": 900}
PHONE = {"width": 360, "height": 740}
KEY = "a key for the page's tests"


class Visit:
    """A page that is open, and what it did that it should not."""

    def __init__(self, page: Any, url: str, shots: Path) -> None:
        self.page, self.url, self.shots = page, url, shots
        self.complaints: list[str] = []
        self.elsewhere: list[str] = []
        page.set_default_timeout(DEADLINE_S * 1000)
        page.on("console", self._hear)
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("request", lambda request: self._look(request.url))
        page.on("websocket", lambda socket: self._look(socket.url))

    def _hear(self, message: Any) -> None:
        if message.type in ("error", "warning"):
            self.complaints.append(f"{message.text} ({message.location.get('url')})")

    def _look(self, url: str) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("blob", "data") and parts.netloc != urlsplit(self.url).netloc:
            self.elsewhere.append(url)

    def until(self, expression: str, what: str) -> None:
        """Wait for a JavaScript expression. The page's policy forbids playwright's wait_for_function."""
        deadline = time.monotonic() + DEADLINE_S
        while not self.page.evaluate(f"() => Boolean({expression})"):
            if time.monotonic() > deadline:
                self.shoot("failed")
                raise AssertionError(
                    f"{what}: not within {DEADLINE_S:g} s; {self.quality()}; {self.complaints}"
                )
            self.page.wait_for_timeout(50)

    def quality(self) -> dict[str, Any]:
        return self.page.evaluate("() => window.vidgen.quality()")

    def until_played(self, num_frames: int) -> None:
        self.until(f"window.vidgen.quality().totalVideoFrames >= {num_frames}", f"{num_frames} frames shown")

    def until_state(self, state: str) -> None:
        self.until(f"window.vidgen.quality().state === '{state}'", f"player {state}")

    def shoot(self, name: str, **options: Any) -> None:
        self.page.screenshot(path=self.shots / f"{name}.png", **options)

    def write(self, prompt: str, mode: str = "Live") -> None:
        self.page.locator(".modes").get_by_text(mode, exact=True).click()
        self.page.get_by_label("Prompt", exact=True).fill(prompt)

    def check(self) -> None:
        """No errors in the console, and nothing asked of another server."""
        assert self.complaints == []
        assert self.elsewhere == []


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="the page's tests need playwright")
    if not Path(CHROMIUM).is_file():
        pytest.skip("the page's tests need Debian's chromium: apt-get install chromium")
    with playwright.sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def shots(tmp_path: Path) -> Path:
    folder = Path(os.environ.get("VIDGEN_SCREENSHOTS", tmp_path))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


Visitor = Callable[..., Any]


@pytest.fixture
def visit(browser: Any, server: Any, shots: Path) -> Visitor:
    """Opens the page of the shared server in a browser of its own, as a context manager."""

    @contextmanager
    def open_page(url: str = server.url, path: str = "/", **context: Any) -> Iterator[Visit]:
        inside = browser.new_context(**{"viewport": DESKTOP, **context})
        try:
            page = Visit(inside.new_page(), url, shots)
            page.page.goto(url + path)
            yield page
        finally:
            inside.close()

    return open_page


def download(visited: Visit, click: Callable[[], None], target: Path) -> int:
    """Frames of the MP4 that a click saves."""
    with visited.page.expect_download(timeout=DEADLINE_S * 1000) as coming:
        click()
    coming.value.save_as(target)
    with av.open(target) as container:
        return sum(1 for _ in container.decode(video=0))


def test_live_session_plays_whole_changes_its_prompt_and_is_downloaded(visit, shots, tmp_path):
    quality = watch_live(visit, tmp_path)
    assert quality["skippedChunks"] == 0
    # where frames are made faster than they play, the page moves ahead to a change and leaves some out
    assert quality["jumps"] or quality["totalVideoFrames"] == 16 * quality["chunks"], quality
    # a frame shown late counts as dropped, and other tests share the processor
    assert quality["droppedVideoFrames"] <= 0.1 * quality["totalVideoFrames"], quality


def watch_live(visit: Any, folder: Path) -> dict[str, Any]:
    """How a live session was played whose prompt was changed and which was stopped and downloaded."""
    with visit() as seen:
        page = seen.page
        seen.shoot("desktop-empty")
        seen.write(PROMPT)
        page.get_by_role("button", name="Start live").click()
        seen.until_played(16)
        page.get_by_label("Change to").fill(CHANGE)
        page.get_by_label("Transition length").select_option("1")
        page.get_by_role("button", name="Change", exact=True).click()
        line = page.locator("#changes li", has_text=CHANGE)
        page.locator(f"#changes li[data-state=applied]:has-text('{CHANGE}')").wait_for()
        applied_s = float(line.get_attribute("data-seconds"))
        assert applied_s > 0 and (applied_s * 16) % 16 == 0, "a change begins with a chunk"
        seen.until(f"document.getElementById('video').currentTime > {applied_s}", "the change plays")
        page.locator("#now-prompt", has_text=CHANGE).wait_for()
        assert page.locator("#marks i:not([hidden])").count() == 1
        seen.shoot("desktop-live")
        page.get_by_role("button", name="Stop", exact=True).click()
        seen.until_state("ended")
        quality = seen.quality()
        print("live", quality)
        assert quality["mode"] == "socket" and quality["corruptedVideoFrames"] == 0
        seen.shoot("desktop-ended")
        button = page.locator("#stage").get_by_role("button", name="Download", exact=True)
        frames = download(seen, button.click, folder / "live.mp4")
        assert frames == 16 * quality["chunks"]
        seen.check()
        return quality


def test_render_shows_progress_plays_and_comes_to_the_gallery(visit, tmp_path):
    prompt = "a green circle growing over a black background"
    with visit() as seen:
        page = seen.page
        seen.write(prompt, "Render")
        page.get_by_label("Seconds of prompt").fill("4")
        page.get_by_text("Size, steps, seed").click()
        page.get_by_label("Steps", exact=True).fill("12")
        page.get_by_label("Seed").fill("7")
        page.get_by_role("button", name="Render", exact=True).click()
        page.locator("#progress-text", has_text=re.compile(r"\d+ % · chunk")).wait_for()
        page.locator(".job", has_text=prompt).wait_for()
        seen.shoot("desktop-render")
        card = page.locator(".card", has_text=prompt)
        card.wait_for()
        assert "seed 7" in card.inner_text()
        seen.until("document.querySelector('.card img')?.naturalWidth", "the thumbnail")
        seen.until_state("ended")
        quality = seen.quality()
        assert quality["droppedVideoFrames"] <= 0.1 * quality["totalVideoFrames"], quality
        page.get_by_role("button", name=f"Watch: {prompt}").click()
        seen.until("window.vidgen.quality().mode === 'file'", "the finished file plays")
        seen.until_played(32)
        seen.shoot("desktop-gallery", full_page=True)
        save = card.get_by_role("button", name=f"Download: {prompt}")
        assert download(seen, save.click, tmp_path / "render.mp4") == 64
        seen.check()


def test_prompts_are_added_ordered_and_removed_by_keyboard_and_by_mouse(visit):
    with visit() as seen:
        page = seen.page
        order = "() => [...document.querySelectorAll('.segment textarea')].map(field => field.value)"
        page.keyboard.type("one")
        for name in ("two", "three"):
            page.get_by_role("button", name="Add a prompt").press("Enter")
            page.keyboard.type(name)
        page.keyboard.press("Alt+ArrowUp")
        assert page.evaluate(order) == ["one", "three", "two"]
        assert page.evaluate("() => document.activeElement.value") == "three", "the focus moves along"
        page.get_by_role("button", name="Move down: prompt 1").click()
        assert page.evaluate(order) == ["three", "one", "two"]
        handle = page.locator(".handle").nth(2).bounding_box()
        top = page.locator(".segment").nth(0).bounding_box()
        page.mouse.move(handle["x"] + 5, handle["y"] + 20)
        page.mouse.down()
        page.mouse.move(handle["x"] + 5, top["y"] + 5, steps=8)
        page.mouse.up()
        assert page.evaluate(order) == ["two", "three", "one"]
        seen.shoot("desktop-timeline")
        page.get_by_role("button", name="Remove: prompt 2").click()
        assert page.evaluate(order) == ["two", "one"]
        seen.check()


def test_session_is_submitted_and_stopped_with_the_keyboard_alone(visit):
    with visit() as seen:
        page = seen.page
        page.keyboard.type(PROMPT)
        page.keyboard.press("Control+Enter")
        seen.until_played(8)
        reached = []
        for _ in range(40):
            page.keyboard.press("Tab")
            reached.append(page.evaluate("() => document.activeElement.id"))
            if reached[-1] == "stop":
                break
        assert reached[-1] == "stop", f"Tab leads to {reached}"
        assert reached.index("seek") < reached.index("change-prompt") < reached.index("stop")
        page.keyboard.press("Enter")
        seen.until_state("ended")
        seen.check()


def test_reload_offers_to_rejoin_the_session(visit):
    with visit() as seen:
        page = seen.page
        seen.write(PROMPT)
        page.get_by_role("button", name="Start live").click()
        seen.until_played(8)
        page.reload()
        page.locator("#rejoin", has_text=PROMPT).wait_for()
        seen.shoot("desktop-rejoin")
        page.get_by_role("button", name="Rejoin").click()
        seen.until_played(16)
        assert page.get_by_label("Change to").is_visible()
        page.get_by_role("button", name="Stop", exact=True).click()
        seen.until_state("ended")
        seen.check()


def test_hls_shows_what_the_socket_would(visit, server):
    with server.client() as client:
        video = client.post(
            "/v1/videos", json={"prompt": PROMPT, "seconds": "6", "num_inference_steps": 12}
        ).json()
    with visit(path="/?player=hls") as seen:
        seen.page.get_by_role("button", name=f"Watch: {PROMPT}").first.click()
        seen.until_played(48)
        quality = seen.quality()
        print("hls", quality)
        assert quality["mode"] == "hls"
        assert quality["corruptedVideoFrames"] == 0
        seen.check()
    server.wait(video["id"])


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_phone_needs_no_sideways_scrolling(visit, scheme):
    with visit(viewport=PHONE, color_scheme=scheme, device_scale_factor=2, has_touch=True) as seen:
        page = seen.page
        seen.write(PROMPT)
        page.get_by_role("button", name="Add a prompt").click()
        page.locator(".segment textarea").nth(1).fill(
            "a red circle ofsixtyfourlettersthatdoesnotbreakanywhereatallinalineofthis"
        )
        page.get_by_text("Size, steps, seed").click()
        seen.shoot(f"phone-{scheme}-form", full_page=True)
        page.get_by_role("button", name="Start live").click()
        seen.until_played(4)
        page.locator("#replicas summary").click()
        seen.shoot(f"phone-{scheme}-live", full_page=True)
        assert page.evaluate("() => document.documentElement.scrollWidth") <= PHONE["width"]
        page.get_by_role("button", name="Stop", exact=True).click()
        seen.until_state("ended")
        seen.check()


def test_dark_and_light_follow_the_system_and_stay_readable(visit):
    seen_colours = {}
    for scheme in ("light", "dark"):
        with visit(color_scheme=scheme) as seen:
            seen_colours[scheme] = [
                seen.page.evaluate(
                    "(name) => getComputedStyle(document.querySelector('.compose'))[name]", name
                )
                for name in ("color", "backgroundColor")
            ]
            seen.shoot(f"desktop-{scheme}", full_page=True)
    for text, ground in seen_colours.values():
        assert contrast(text, ground) >= 7
    assert luminance(seen_colours["dark"][1]) < 0.05 < luminance(seen_colours["light"][1])


def luminance(colour: str) -> float:
    """Relative luminance of "rgb(r, g, b)", by WCAG 2."""
    channels = [int(text) / 255 for text in re.findall(r"\d+", colour)[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one: str, other: str) -> float:
    darker, lighter = sorted(map(luminance, (one, other)))
    return (lighter + 0.05) / (darker + 0.05)


def test_refusal_is_said_in_the_server_s_words(visit):
    with visit() as seen:
        page = seen.page
        seen.write(PROMPT, "Render")
        page.get_by_text("Size, steps, seed").click()
        page.get_by_label("Steps", exact=True).fill("100000")
        page.get_by_role("button", name="Render", exact=True).click()
        alert = page.get_by_role("alert")
        alert.get_by_text("num_inference_steps").wait_for()
        seen.shoot("desktop-refusal")
        page.get_by_label("Steps", exact=True).fill("many")
        page.get_by_role("button", name="Render", exact=True).click()
        alert.get_by_text("many is no such number").wait_for()
        assert page.evaluate("() => document.activeElement.id") == "steps"
        assert all("422" in text or "400" in text for text in seen.complaints), seen.complaints
        assert seen.elsewhere == []


def test_page_asks_for_the_key_and_plays_and_downloads_with_it(visit, start_server, tmp_path):
    import hashlib

    keys = [{"name": "anna", "sha256": hashlib.sha256(KEY.encode()).hexdigest()}]
    with start_server(tmp_path / "keys" / "data", keys=keys, key=KEY) as guarded:
        with visit(url=guarded.url) as seen:
            page = seen.page
            page.get_by_role("dialog").get_by_label("Key").fill(KEY)
            seen.shoot("desktop-key")
            page.get_by_role("dialog").get_by_role("button", name="Use it").click()
            seen.write(PROMPT)
            page.get_by_role("button", name="Start live").click()
            seen.until_played(8)
            page.get_by_role("button", name="Stop", exact=True).click()
            seen.until_state("ended")
            seen.until("document.querySelector('.card img')?.naturalWidth", "the thumbnail")
            button = page.locator("#stage").get_by_role("button", name="Download", exact=True)
            assert download(seen, button.click, tmp_path / "with-key.mp4") == 16 * seen.quality()["chunks"]
            page.get_by_role("button", name=f"Watch: {PROMPT}").first.click()
            seen.until("window.vidgen.quality().mode === 'file'", "the finished file plays")
            seen.until_played(8)
            assert not any(
                KEY in url for url in page.evaluate("() => performance.getEntries().map(e => e.name)")
            )
            assert all("401" in text for text in seen.complaints), seen.complaints


# ---- the files


def test_files_are_cached_for_good_under_their_version_and_asked_for_again_without(server):
    with server.client() as client:
        index = client.get("/")
        assert index.headers["content-type"] == "text/html; charset=utf-8"
        assert index.headers["cache-control"] == "no-cache"
        names = re.findall(r'(?:href|src)="(page/[^"]+)"', index.text)
        assert len(names) >= 4
        for name in names:
            answer = client.get(f"/{name}")
            assert answer.status_code == 200 and "immutable" in answer.headers["cache-control"], name
            again = client.get(f"/{name}", headers={"If-None-Match": answer.headers["etag"]})
            assert again.status_code == 304 and again.content == b""
        old = client.get("/page/0123456789abcdef/main.js")
        assert old.status_code == 200 and old.headers["cache-control"] == "no-cache"


def test_every_file_has_its_type_and_none_names_another_server():
    types = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
    for name, file in routes_page.FILES.items():
        assert file.content_type.startswith(types.get(Path(name).suffix, "text/plain"))
        if not name.startswith("hls."):
            text = re.sub(rb'xmlns="[^"]*"', b"", file.content)
            assert b"http://" not in text and b"https://" not in text, name
    assert b"style=" not in routes_page.FILES["index.html"].content
    assert not re.search(rb"<script(?![^>]*src=)|\son\w+=", routes_page.FILES["index.html"].content)
    assert b"Apache License" in routes_page.FILES["hls.LICENSE.txt"].content


@pytest.mark.parametrize(
    "name",
    [
        "../routes_page.py",
        "..%2froutes_page.py",
        "%2e%2e/%2e%2e/config.py",
        "main.js%00",
        "",
        "MAIN.JS",
        "x" * 9000,
    ],
)
def test_nothing_but_the_page_s_files_is_served(server, name):
    with httpx.Client(timeout=30, trust_env=False) as client:
        answer = client.get(f"{server.url}/page/{routes_page.VERSION}/{name}")
        assert answer.status_code in (400, 401, 404, 414), answer.text
        assert b"import" not in answer.content
