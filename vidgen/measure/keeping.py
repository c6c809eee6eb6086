"""Results of a long measurement, one a prompt, kept in a file as they come: a cut loses one at most."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def kept_rows(path: Path | None, what: Row, count: int, measure: Callable[[int], Row]) -> Iterator[Row]:
    """Results 0 to count - 1: those that the file has, and the rest from `measure`, then in the file too.

    A JSON object a line: `what` was measured, then a result each. A last line that was cut off is measured
    anew. ValueError when the file holds results of something else. Without a path all are measured.
    """
    done = _read(path, what) if path is not None else []
    yield from done[:count]
    for index in range(len(done), count):
        row = measure(index)
        if path is not None:
            _append(path, row)
        yield row


def _read(path: Path, what: Row) -> list[Row]:
    """The results in the file, which is begun when there is none and cut back to its whole lines."""
    try:
        text = path.read_text(encoding="utf-8") if path.exists() else ""
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read ({error}); give another file") from error
    whole = text[: text.rfind("\n") + 1]
    try:
        lines = [json.loads(line) for line in whole.splitlines()]
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: holds no results ({error}); give another file") from error
    if not lines and text:
        raise ValueError(f"{path}: holds no results; give another file")
    if not lines:
        _append(path, what)
        return []
    if lines[0] != json.loads(json.dumps(what)):
        raise ValueError(f"{path}: holds results of {lines[0]}, not of {what}; give another file")
    if whole != text:
        with path.open("r+", encoding="utf-8") as file:
            file.truncate(len(whole.encode()))
    return lines[1:]


def _append(path: Path, row: Row) -> None:
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise ValueError(f"{path}: cannot be written ({error}); give another file") from error
