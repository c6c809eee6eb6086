"""What an ablation leaves: results.csv, results.json, report.html with its plots, sheets of its videos."""

import base64
import csv
import json
from collections.abc import Sequence
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any

import jinja2
import torch
from torch import Tensor

from vidgen.ablate.pareto import best_within, front, quality_of
from vidgen.ablate.plots import bars, trade
from vidgen.ablate.settings import AblationConfig
from vidgen.ablate.study import DONE, Study
from vidgen.bench.machine import machine_facts
from vidgen.measure.keeping import Row
from vidgen.measure.summary import shrink
from vidgen.media.segments import write_atomically
from vidgen.media.sheet import contact_sheet

POINTS = 2.0  # of adherence that a cell may lose and still count as good
BARS = ("seconds", "first_frame_s", "memory_mib")
SHOWN_VIDEOS, SHOWN_FRAMES = 2, 8
SHEET_SIDE = 128  # pixels of a frame's shorter side in a sheet
COLUMNS = (
    "cell", "seconds", "speed_up", "first_frame_s", "tflops", "skipped", "density", "sent_mib", "memory_mib",
    "adherence_all", "adherence_points", "psnr", "ssim", "lpips", "flicker", "boundary_jump",
    "motion_smoothness", "look_drift", "temporal_score", "spatial_fidelity", "spatial_diversity",
)  # fmt: skip


def write_results(study: Study, rows: Sequence[Row]) -> dict[str, Any]:
    """results.json and results.csv of the cells so far; what the first one holds."""
    found = summary(study.config, rows)
    write_atomically(study.folder / "results.json", (json.dumps(found, indent=1) + "\n").encode())
    names = list(dict.fromkeys(["cell", "state", *COLUMNS, *(name for row in rows for name in row)]))
    table = StringIO()
    writer = csv.DictWriter(table, names, restval="", extrasaction="ignore")
    writer.writeheader()
    writer.writerows({**row, "settings": json.dumps(row["settings"])} for row in rows)
    write_atomically(study.folder / "results.csv", table.getvalue().encode())
    return found


def write_report(study: Study, rows: Sequence[Row]) -> Path:
    """results.*, a sheet per shown video, and report.html, which needs no other file. The report's path."""
    found = write_results(study, rows)
    done = [row for row in rows if row["state"] == DONE]
    sheets = [(study.prompts[video], _sheet(study, done, video)) for video in _shown(study)]
    for number, (_, picture) in enumerate(sheets):
        write_atomically(study.folder / f"sheet_{number}.png", picture)
    plots = [
        trade(done, quality)
        for quality in dict.fromkeys((quality_of(done), "psnr"))
        if _varies(done, quality)
    ]
    plots.append(bars(done, BARS))
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("vidgen.ablate", "."), autoescape=True, undefined=jinja2.StrictUndefined
    )
    page = environment.get_template("report.html.j2").render(
        found=found,
        columns=[name for name in COLUMNS if any(row.get(name) is not None for row in done)],
        left_out=[row for row in rows if row["state"] != DONE],
        plots=[_as_source(plot, "image/svg+xml") for plot in plots],
        sheets=[(prompt, _as_source(picture, "image/png")) for prompt, picture in sheets],
        points=POINTS,
    )
    target = study.folder / "report.html"
    write_atomically(target, page.encode())
    return target


def summary(config: AblationConfig, rows: Sequence[Row]) -> dict[str, Any]:
    """Everything in one mapping, ready for JSON."""
    done = [row for row in rows if row["state"] == DONE]
    best = best_within(done, POINTS)
    return {
        "name": config.name,
        "machine": machine_facts(),
        "videos": config.videos,
        "seed": config.seed,
        "job": config.job,
        "exact": config.exact,
        "front": [row["cell"] for row in front(done, quality_of(done))],
        f"quickest_within_{POINTS:g}_points": best and best["cell"],
        "cells": list(rows),
    }


def _shown(study: Study) -> range:
    return range(min(SHOWN_VIDEOS, study.config.videos))


def _varies(rows: Sequence[Row], quality: str) -> bool:
    """Whether there is anything to plot."""
    return len({row[quality] for row in rows if row[quality] is not None}) > 1


def _sheet(study: Study, rows: Sequence[Row], video: int) -> bytes:
    """PNG: a line per cell, the same frames of the same video in each."""
    done = {row["cell"] for row in rows}
    lines, labels, numbers = [], [], []
    for cell in (cell for cell in study.cells if cell.name in done):
        frames = study.see(cell, video)
        at = torch.linspace(0, frames.shape[1] - 1, SHOWN_FRAMES).round().long()
        lines.append(_pictures(shrink(frames[:, at], SHEET_SIDE)))
        labels += [cell.name] * len(at)
        numbers += at.tolist()
    shown = torch.cat(lines).numpy()
    sheet = contact_sheet(
        shown, num_columns=SHOWN_FRAMES, num_tiles=len(shown), labels=labels, numbers=numbers
    )
    file = BytesIO()
    sheet.save(file, "PNG", optimize=True)
    return file.getvalue()


def _pictures(video_3FYX: Tensor) -> Tensor:
    return video_3FYX.movedim(0, -1).add(1).mul(127.5).round().clamp(0, 255).byte()


def _as_source(data: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
