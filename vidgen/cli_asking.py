"""How commands ask a server: its answers shown, its errors as exit codes and one line."""

import json
import shlex
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vidgen.cli_exit import BAD_INPUT, INTERRUPTED, PARTIAL_KEPT, Ended, one_line, write_line

if TYPE_CHECKING:
    from vidgen.serve.client import Client

LINE_EVERY_S, REDRAW_EVERY_S = 5.0, 0.2


class View:
    """Facts as JSON on stdout, or lines for people; with JSON those go to stderr."""

    def __init__(self, as_json: bool) -> None:
        self.as_json = as_json
        self._next_s = 0.0
        self._is_open = False  # a line that the next state replaces

    def __enter__(self) -> "View":
        return self

    def __exit__(self, *_: object) -> None:
        self.end_line()

    def event(self, name: str, /, **facts: Any) -> None:
        if self.as_json:
            write_line("stdout", json.dumps({"event": name, **facts}))

    def say(self, text: str) -> None:
        self.end_line()
        write_line("stderr" if self.as_json else "stdout", text)

    @property
    def is_due(self) -> bool:
        """Whether `state` would show something now."""
        return time.monotonic() >= self._next_s

    def state(self, text: str) -> None:
        """How it stands: in place on a terminal, else a line now and then."""
        if not self.is_due:
            return
        is_terminal = sys.stderr.isatty()
        self._next_s = time.monotonic() + (REDRAW_EVERY_S if is_terminal else LINE_EVERY_S)
        if is_terminal:
            print(f"\r\x1b[2K{text}", end="", file=sys.stderr, flush=True)
            self._is_open = True
        else:
            self.say(text)

    def end_line(self) -> None:
        if self._is_open:
            print(file=sys.stderr, flush=True)
        self._is_open = False


@contextmanager
def asking(server: str, api_key_file: Path | None) -> Iterator["Client"]:
    """A client, whose errors end the command with 2, 3 or 130."""
    api_key = None if api_key_file is None else read_key(api_key_file)
    try:
        from vidgen.serve.client import Client, ServerError, VideoFailed

        try:
            with Client(server, api_key=api_key) as client:
                yield client
        except VideoFailed as error:
            raise Ended(PARTIAL_KEPT, f"{error} ({error.code})") from error
        except ServerError as error:
            hint = "; give the key's file with --api-key-file" if error.status == 401 else ""
            raise Ended(BAD_INPUT, f"{error}{hint}") from error
        except OSError as error:
            raise Ended(BAD_INPUT, str(error)) from error
    except KeyboardInterrupt as error:
        raise Ended(INTERRUPTED, "interrupted") from error


@contextmanager
def after(video_id: str, view: View) -> Iterator[None]:
    """Within, the server works on a video and goes on with it whatever happens here."""
    from vidgen.serve.client import ServerError, VideoFailed

    how = f"it goes on at the server; see it with: vidgen watch {shlex.quote(video_id)}"
    with view:
        try:
            yield
        except VideoFailed as error:
            view.event("failed", **error.video.facts)
            raise
        except KeyboardInterrupt as error:
            view.event("interrupted", id=video_id)
            raise Ended(INTERRUPTED, f"interrupted; {how}") from error
        except ServerError as error:
            if error.code != "lost":
                raise
            raise Ended(PARTIAL_KEPT, f"{error}; {how}") from error


def read_key(path: Path) -> str:
    """The key in a file. ValueError in one line that does not show it."""
    try:
        key = path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "holds no ASCII text"
        raise ValueError(f"--api-key-file {path}: {why}") from error
    if not key or len(key.split()) > 1:
        raise ValueError(f"--api-key-file {path}: need the key that `vidgen serve --new-key` printed, alone")
    return key


def read_list(path: Path) -> list[Any]:
    """A YAML list. ValueError in one line."""
    from vidgen.config import read_yaml

    values = read_yaml(path)
    if not isinstance(values, list) or not values:
        found = "nothing" if not values else type(values).__name__
        raise ValueError(f"{path}: need a list of {{prompt, num_frames}}, found {found}")
    return values


def pair(text: str) -> tuple[str, Any]:
    """Name and value of NAME=VALUE, the value read as YAML. ValueError in one line."""
    import yaml

    name, sign, value = text.partition("=")
    try:
        found = yaml.safe_load(value)
        json.dumps(found)
    except (yaml.YAMLError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"--set {text}: {one_line(error)}") from error
    if not sign or not name.isidentifier():
        raise ValueError(f"--set {text}: need KEY=VALUE, for example flow_shift=3")
    return name, found


def check_target(path: Path, overwrite: bool) -> None:
    """ValueError when a file cannot be written there, before anything is asked of a server."""
    if not path.name or path.is_dir():
        raise ValueError(f"--output {path}: is a folder; give a file")
    if not path.parent.is_dir():
        raise ValueError(f"--output {path}: there is no folder {path.parent}")
    if path.exists() and not overwrite:
        raise ValueError(f"--output {path}: exists; choose another name or add --overwrite")


def state(facts: Mapping[str, Any]) -> str:
    """How a video stands, in a line."""
    parts = [facts["id"], f"{facts['status']} {facts['progress']} %"]
    if facts.get("queue_position") is not None:
        parts.append(f"{facts['queue_position']} before it")
    if facts.get("num_frames"):
        parts.append(f"frames {facts.get('frames_done', 0)}/{facts['num_frames']}")
    if facts.get("eta_s") is not None and facts["status"] == "in_progress":
        parts.append(f"{facts['eta_s']:.0f} s left")
    return "  ".join(parts)
