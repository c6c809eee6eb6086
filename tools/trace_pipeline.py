"""Rank x time of a multi-rank render, drawn: `python tools/trace_pipeline.py JOB -o trace.png`.

Reads JOB/trace.jsonl (see parallel/evidence.py), also while the render runs. Clocks are each rank's own.
"""

import argparse
import io
import json
import math
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLUMNS = ["attempt", "rank", "tick", "block", "step", "run", "start_s", "stop_s"]
SPAN = np.dtype([(name, float if name.endswith("_s") else int) for name in COLUMNS])
MAX_RANKS, MAX_TICK_LINES = 4096, 60
DPI, WIDTH_IN, SIDE_IN, TOP_IN, BOTTOM_IN = 125, 16.0, 0.8, 1.35, 0.65
WIDTH_PX = round((WIDTH_IN - 2 * SIDE_IN) * DPI)  # of the time axis
HALF_BAR = 0.41  # in rows
# a block has the colour of its number's last digit
COLORS = "#4e79a7 #f28e2b #59a14f #e15759 #76b7b2 #b07aa1 #edc948 #9c6b4e #ff9da7 #3b4a6b".split()
BUSY, IDLE, INK, FAINT, ALARM = "#3d6a98", "#eceff3", "#20262e", "#6b7480", "#c8102e"
# a row that a killed process did not finish, and right behind it the first row of the next process
CUT_AND_WHOLE = re.compile(r"\[[-+\d., e]*\]?(\[[^\[]*\])")


def read_trace(job: Path) -> np.ndarray:
    """All spans in order of their start, in seconds since the first; an unfinished last line is left out."""
    path = job / "trace.jsonl"
    if not job.is_dir():
        raise ValueError(f"{job}: no such folder; give the job folder of a render")
    if not path.is_file():
        raise ValueError(f"{job}: no trace.jsonl in it; render on ranks, with parallel.trace on")
    lines = path.read_text(encoding="utf-8", errors="replace").rstrip().split("\n")
    if _json(lines[0]) != COLUMNS:
        found = f"begins with {lines[0][:60]!r}, not with {json.dumps(COLUMNS)}" if lines[0] else "is empty"
        raise ValueError(f"{path}: {found}; wait for the render to begin, or give another job")
    rows = []
    for number, line in enumerate(lines[1:], start=2):
        if number == len(lines) and not line.endswith("]"):
            break
        joined = CUT_AND_WHOLE.fullmatch(line)
        row = _json(joined[1] if joined else line)
        if not _is_span(row):
            raise ValueError(f"{path}, line {number}: {line[:60]!r} is no span; remove that line, try again")
        rows.append(tuple(row))
    if not rows:
        raise ValueError(f"{path}: no spans in it; wait until the render has run the model")
    spans = np.array(sorted(rows, key=lambda row: row[-2]), SPAN)
    spans["stop_s"] -= spans["start_s"][0]
    spans["start_s"] -= spans["start_s"][0]
    return spans


def _json(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _is_span(row: Any) -> bool:
    types = [type(value) for value in row] if isinstance(row, list) else []  # exact: true is no number
    if len(types) != len(COLUMNS) or types[:6] != [int] * 6 or not set(types[6:]) <= {int, float}:
        return False
    return min(row) >= 0 and max(row[:6]) < 2**31 and row[1] < MAX_RANKS and row[6] <= row[7] < 1e12


@dataclass(frozen=True)
class View:
    """What lies between two moments, in seconds since the first span."""

    from_s: float
    to_s: float
    lanes: list[np.ndarray]  # each rank's spans, cut at both moments and where they overlap
    busy_shares: list[float]  # each rank's share of the time in which it ran the model
    ticks: np.ndarray  # rank 0's first span of each tick
    restarts_s: dict[str, tuple[float, float]]  # last stop before, first start after


def look(spans: np.ndarray, from_s: float | None = None, to_s: float | None = None) -> View:
    """The view of a part of the trace, by default of all; ValueError when it lies outside."""
    end_s = max(float(spans["stop_s"].max()), 1e-6)
    low_s, high_s = 0.0 if from_s is None else from_s, end_s if to_s is None else to_s
    if not max(low_s, 0.0) < min(high_s, end_s):
        given = f"--from-s {low_s:g} --to-s {high_s:g}"
        raise ValueError(f"{given}: the first must be before the second, and within 0 to {end_s:g} s")
    low_s, high_s = max(low_s, 0.0), min(high_s, end_s)
    seen = spans[(spans["start_s"] <= high_s) & (spans["stop_s"] >= low_s)]
    lanes = [seen[seen["rank"] == rank] for rank in range(spans["rank"].max() + 1)]
    for lane in lanes:
        until_s = np.maximum.accumulate(np.append(low_s, lane["stop_s"]))[:-1]
        lane["start_s"] = np.maximum(lane["start_s"], until_s).clip(low_s, high_s)
        lane["stop_s"] = np.maximum(lane["start_s"], lane["stop_s"]).clip(low_s, high_s)
    shares = [float(np.sum(lane["stop_s"] - lane["start_s"])) / (high_s - low_s) for lane in lanes]
    first = spans[spans["rank"] == 0]
    ticks = first[np.sort(np.unique(first[["attempt", "tick"]], return_index=True)[1])]
    ticks = ticks[(ticks["start_s"] >= low_s) & (ticks["start_s"] <= high_s)]
    restarts_s = {}
    attempts, begins = np.unique(spans["attempt"], return_index=True)
    for attempt, at in zip(attempts[1:], begins[1:], strict=True):
        start_s = spans["start_s"][at]
        stop_s = min(start_s, spans["stop_s"][spans["attempt"] < attempt].max(initial=0))
        if low_s <= start_s and stop_s <= high_s:
            restarts_s[f"restart {attempt}"] = (stop_s, start_s)
    return View(low_s, high_s, lanes, shares, ticks, restarts_s)


def summary(view: View) -> Iterator[str]:
    """A line per rank."""
    for rank, (lane, share) in enumerate(zip(view.lanes, view.busy_shares, strict=True)):
        gaps_s = lane["start_s"][1:] - lane["stop_s"][:-1]
        text = f"rank {rank}: {_count(lane.size, 'span')}, busy {share:.1%}"
        if gaps_s.size:
            at = int(gaps_s.argmax())
            why = " (restart)" if lane["attempt"][at] != lane["attempt"][at + 1] else ""
            text += f", longest gap {gaps_s[at] * 1e3:.1f} ms at {lane['stop_s'][at]:.3f} s{why}"
        yield text


def _count(num: int, noun: str) -> str:
    return f"{num:,} {noun}" + "s" * (num != 1)


def chrome_trace(spans: np.ndarray) -> str:
    """All spans as Chrome trace JSON, an event per line, in microseconds since the first start."""
    events: list[dict[str, Any]] = []
    for attempt, rank in np.unique(spans[["attempt", "rank"]]).tolist():
        for kind, label in (("process_name", f"attempt {attempt}"), ("thread_name", f"rank {rank}")):
            events.append({"name": kind, "ph": "M", "pid": attempt, "tid": rank, "args": {"name": label}})
    for attempt, rank, tick, block, step, run, start_s, stop_s in spans.tolist():
        start_us, stop_us = round(start_s * 1e6), round(stop_s * 1e6)
        event = {"name": f"block {block} step {step}", "ph": "X", "pid": attempt, "tid": rank}
        events.append(event | {"ts": start_us, "dur": stop_us - start_us, "args": {"tick": tick, "run": run}})
    return '{"displayTimeUnit": "ms", "traceEvents": [\n' + ",\n".join(map(json.dumps, events)) + "\n]}\n"


def draw(view: View, name: str) -> bytes:
    """A PNG, 2000 pixels wide. If most bars are below a pixel, a single colour's shade says how busy."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    row_in = min(0.5, max(0.06, 16 / len(view.lanes)))
    height_in = round((TOP_IN + BOTTOM_IN + row_in * len(view.lanes)) * DPI) / DPI
    figure = Figure(figsize=(WIDTH_IN, height_in), dpi=DPI)
    left, bottom, top = SIDE_IN / WIDTH_IN, BOTTOM_IN / height_in, TOP_IN / height_in
    axes = figure.add_axes((left, bottom, 1 - 2 * left, 1 - bottom - top))
    axes.set(xlim=(view.from_s, view.to_s), ylim=(len(view.lanes) - 0.5, -0.5))
    widths_s = np.concatenate([lane["stop_s"] - lane["start_s"] for lane in view.lanes])
    is_dense = bool(np.sum(widths_s * WIDTH_PX < view.to_s - view.from_s) > widths_s.size / 2)
    for rank in range(len(view.lanes)):
        _draw_lane(axes, view, rank, is_dense=is_dense, is_numbered=row_in > 0.15)
    _draw_marks(axes, view)
    _draw_labels(axes, view, every=math.ceil(0.15 / row_in))
    _draw_title(axes, view, name, is_dense=is_dense)
    out = io.BytesIO()
    FigureCanvasAgg(figure).print_png(out)
    return out.getvalue()


def _rgb(color: str) -> np.ndarray:
    return np.array([int(color[at : at + 2], 16) / 255 for at in (1, 3, 5)])


def _ink_on(rgb: np.ndarray) -> str:
    return "white" if rgb @ (0.3, 0.59, 0.11) < 0.6 else INK


def _draw_lane(axes: "Axes", view: View, rank: int, *, is_dense: bool, is_numbered: bool) -> None:
    """One rank's bars, as an image of one column per pixel, which is exact for any number of spans."""
    lane, top, bottom = view.lanes[rank], rank - HALF_BAR, rank + HALF_BAR
    colors = np.array([_rgb(BUSY if is_dense else color) for color in COLORS])[lane["block"] % len(COLORS)]
    if not is_dense:
        colors += (1 - colors) * 0.3 * lane["run"].clip(0, 2)[:, None]  # later branches are paler
    # the amount of a colour up to a moment is linear between starts and stops
    widths_s = lane["stop_s"] - lane["start_s"]
    amounts = np.cumsum(widths_s[:, None] * (colors - _rgb(IDLE)), axis=0)
    moments_s = np.stack([lane["start_s"], lane["stop_s"]], axis=1).ravel()
    edges_s = np.linspace(view.from_s, view.to_s, WIDTH_PX + 1)
    pixels = np.tile(_rgb(IDLE), (WIDTH_PX, 1))
    for channel, amount in enumerate(amounts.T if lane.size else ()):
        up_to = np.append(0, np.repeat(amount, 2)[:-1])
        pixels[:, channel] += np.diff(np.interp(edges_s, moments_s, up_to)) / np.diff(edges_s)
    extent = (view.from_s, view.to_s, bottom, top)
    axes.imshow(pixels.clip(0, 1)[None], extent=extent, aspect="auto", interpolation="nearest")
    widths_px = widths_s * WIDTH_PX / (view.to_s - view.from_s)
    axes.vlines(lane["start_s"][widths_px > 4], top, bottom, color="white", linewidth=0.7)
    has_room = widths_px > 4 + 8 * np.char.str_len(lane["step"].astype(str))
    for i in np.flatnonzero(has_room & is_numbered):
        style = {"ha": "center", "va": "center_baseline", "fontsize": 7.5, "color": _ink_on(colors[i])}
        axes.text(lane["start_s"][i] + widths_s[i] / 2, rank, str(lane["step"][i]), **style)


def _draw_marks(axes: "Axes", view: View) -> None:
    """Dashed lines where ticks start on rank 0; restarts, from the last stop to the first start."""
    above: Any = {"xycoords": axes.get_xaxis_transform(), "textcoords": "offset points", "va": "bottom"}
    if 0 < view.ticks.size < MAX_TICK_LINES:
        starts_s = view.ticks["start_s"]
        axes.vlines(starts_s, *axes.get_ylim(), color=INK, linewidth=0.7, linestyle=(0, (4, 3)))
        for tick, start_s in _apart(view, zip(view.ticks["tick"], starts_s, strict=True)):
            axes.annotate(tick, (start_s, 1), (0, 4), fontsize=8, color=FAINT, ha="center", **above)
        axes.annotate("tick", (view.from_s, 1), (-16, 4), fontsize=8, color=FAINT, ha="right", **above)
    for stop_s, start_s in view.restarts_s.values():
        axes.axvspan(stop_s, start_s, color=ALARM, alpha=0.15, linewidth=0)
        axes.axvline(start_s, color=ALARM, linewidth=1.6)
    ends_s = ((label, min(start_s, view.to_s)) for label, (_, start_s) in view.restarts_s.items())
    for label, start_s in _apart(view, ends_s):
        axes.annotate(label, (start_s, 1), (0, 17), fontsize=9, color=ALARM, ha="center", **above)


def _apart(view: View, places_s: Iterable[tuple[Any, float]]) -> Iterator[tuple[str, float]]:
    """The labelled places that lie far enough from the label before."""
    last_s = -math.inf
    for label, place_s in places_s:
        if (place_s - last_s) * WIDTH_PX >= (8 + 9 * len(str(label))) * (view.to_s - view.from_s):
            last_s = place_s
            yield str(label), place_s


def _draw_labels(axes: "Axes", view: View, every: int) -> None:
    """Rank names on the left, busy shares on the right, the time axis."""
    rows = range(0, len(view.lanes), every)
    axes.set_yticks(rows, [f"rank {row}" for row in rows])
    axes.tick_params(labelsize=10, labelcolor=INK, color=FAINT, left=False)
    axes.spines[["left", "right", "top"]].set_visible(False)
    axes.spines["bottom"].set_color(FAINT)
    axes.set_xlabel("seconds since the first span", fontsize=10, color=INK)
    style: Any = {"textcoords": "offset points", "color": INK, "fontsize": 10, "va": "center_baseline"}
    style |= {"xycoords": axes.get_yaxis_transform()}
    for row in rows:
        axes.annotate(f"{view.busy_shares[row]:.0%}", (1, row), (14, 0), **style)
    style |= {"xycoords": "axes fraction", "color": FAINT, "fontsize": 8, "va": "bottom"}
    axes.annotate("busy", (1, 1), (14, 4), **style)


def _draw_title(axes: "Axes", view: View, name: str, *, is_dense: bool) -> None:
    """Two lines of text above all, and the key to the colours."""
    style: Any = {"xycoords": "axes fraction", "textcoords": "offset points", "fontsize": 10, "color": INK}
    counts = f"{_count(len(view.lanes), 'rank')}, {_count(sum(lane.size for lane in view.lanes), 'span')}"
    text = f"{counts}, mean busy share {np.mean(view.busy_shares):.1%}"
    axes.annotate(text, (0, 1), (0, 64), **style | {"fontsize": 15, "weight": "bold"})
    restarts = f", {_count(len(view.restarts_s), 'restart')}" * bool(view.restarts_s)
    meaning = "the darker, the busier" if is_dense else "number: step; paler: later guidance branches"
    name = name[:80].encode("latin-1", "replace").decode("latin-1")  # what the font has
    text = f"{name}: {view.from_s:.3f} to {view.to_s:.3f} s{restarts}; {meaning}"
    axes.annotate(text, (0, 1), (0, 46), **style | {"color": FAINT, "parse_math": False})
    blocks = np.unique(np.concatenate([lane["block"] for lane in view.lanes]))
    digits = [] if is_dense else np.unique(blocks % len(COLORS))[::-1].tolist()
    for i, digit in enumerate(digits):
        patch = {"boxstyle": "round,pad=0.35", "facecolor": COLORS[digit], "edgecolor": "none"}
        centred = style | {"color": _ink_on(_rgb(COLORS[digit])), "bbox": patch, "ha": "center"}
        axes.annotate(str(digit), (1, 1), (-8 - 19 * i, 66), **centred)
    if digits:
        word = "block" if blocks[-1] < len(COLORS) else "last digit of the block"
        axes.annotate(word, (1, 1), (-8 - 19 * len(digits), 66), ha="right", **style)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; see --help")


def main(words: list[str] | None = None) -> int:
    """The exit code: 0, or 2 after a line on stderr. Files are written once all of them are made."""
    parser = _Parser(prog="trace_pipeline", description=__doc__)
    parser.add_argument("job", type=Path, help="the folder of a render on ranks")
    parser.add_argument("-o", dest="png", metavar="FILE.png", type=Path, required=True, help="the picture")
    parser.add_argument("--chrome", metavar="FILE.json", type=Path, help="for chrome://tracing and Perfetto")
    parser.add_argument("--from-s", metavar="A", type=float, help="show from here, in the picture's time")
    parser.add_argument("--to-s", metavar="B", type=float, help="show up to here")
    try:
        given = parser.parse_args(words)
        for path, suffix in ((given.png, ".png"), (given.chrome, ".json")):
            if path and (path.suffix != suffix or path.is_dir() or not path.absolute().parent.is_dir()):
                raise ValueError(f"{path}: cannot write this; name a {suffix} file in a folder that exists")
        spans = read_trace(given.job)
        view = look(spans, given.from_s, given.to_s)
        files = {given.png: draw(view, given.job.resolve().name)}
        if given.chrome:
            files[given.chrome] = chrome_trace(spans).encode()
        for path, content in files.items():
            path.write_bytes(content)
    except (OSError, ValueError, ModuleNotFoundError) as error:
        print(f"trace_pipeline: error: {error}", file=sys.stderr)
        return 2
    print("\n".join(summary(view)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
