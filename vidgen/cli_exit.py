"""How a command ends: exit codes, one-line messages, and lines that survive a reader who left."""

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, TextIO

OK = 0
BAD_INPUT = 2
PARTIAL_KEPT = 3
INTERRUPTED = 130


class Ended(Exception):
    """A command that ends early, with this code and one line for the user."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


def one_line(text: object) -> str:
    """The text without line breaks and control characters, for a message a script can read."""
    return " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())


def write_line(where: Literal["stdout", "stderr"], text: str) -> None:
    """Print a line at once. When the reader has gone (`| head`), this and all later lines go nowhere."""
    stream: TextIO = getattr(sys, where)
    try:
        print(text, file=stream, flush=True)
    except BrokenPipeError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


@contextmanager
def plain_warnings() -> Iterator[None]:
    """Within, a UserWarning is a line `warning: ...` on stderr, without the place in our code."""

    def show(message: Warning | str, *_: object, **__: object) -> None:
        write_line("stderr", f"warning: {one_line(message)}")

    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = show
        yield
