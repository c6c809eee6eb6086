"""The plots of an ablation's report."""

from collections.abc import Sequence
from io import BytesIO
from typing import Any

import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot as plt

from vidgen.ablate.pareto import front
from vidgen.measure.keeping import Row

INK, FRONT, EXACT = "#4878a8", "#c44e52", "#222222"
NAMES = {
    "adherence_points": "adherence against exact, points",
    "psnr": "PSNR against exact, dB",
    "speed_up": "speed-up over exact, times",
    "seconds": "seconds per video",
    "first_frame_s": "seconds to the first frame",
    "memory_mib": "peak memory of the fullest rank, MiB",
}
LABEL_SHIFTS = (0, *(sign * 8 * times for times in range(1, 13) for sign in (1, -1)))  # points
SVG: dict[Any, Any] = {"svg.hashsalt": "vidgen", "font.size": 9}  # the same figures give the same file


def trade(rows: Sequence[Row], quality: str) -> bytes:
    """SVG: quality over speed-up, a point per cell, with the front of those that none beats."""
    shown = [row for row in rows if row[quality] is not None]
    with plt.rc_context(SVG):
        figure, axes = plt.subplots(figsize=(7.2, 4.6), layout="constrained")
        best = [row for row in front(rows, quality) if row[quality] is not None]
        axes.step(
            [row["speed_up"] for row in best], [row[quality] for row in best],
            where="pre", color=FRONT, linewidth=1, alpha=0.6, zorder=1,
        )  # fmt: skip
        names = {row["cell"] for row in best}
        for row in shown:
            colour = FRONT if row["cell"] in names else INK
            axes.scatter(row["speed_up"], row[quality], s=22, color=colour, zorder=2)
        axes.margins(x=0.25, y=0.12)
        axes.set(xlabel=NAMES["speed_up"], ylabel=NAMES[quality])
        axes.grid(alpha=0.25)
        _label(axes, [(row["cell"], row["speed_up"], row[quality]) for row in shown])
        return _svg(figure)


def bars(rows: Sequence[Row], names: Sequence[str]) -> bytes:
    """SVG: a panel for each of the figures of those names, a bar per cell."""
    with plt.rc_context(SVG):
        height = 1.2 + 0.24 * len(rows)
        figure, panels = plt.subplots(1, len(names), figsize=(3.4 * len(names) + 1.5, height), sharey=True,
                                      layout="constrained", squeeze=False)  # fmt: skip
        cells = [row["cell"] for row in rows]
        for name, axes in zip(names, panels[0], strict=True):
            values = [row[name] for row in rows]
            colours = [EXACT if row["cell"] == "exact" else INK for row in rows]
            drawn = axes.barh(cells, values, color=colours)
            axes.bar_label(drawn, fmt="%.3g", padding=2, fontsize=7)
            axes.set_xlabel(NAMES.get(name, name))
            axes.margins(x=0.15)
        panels[0][0].invert_yaxis()
        return _svg(figure)


def _label(axes: Any, points: Sequence[tuple[str, float, float]]) -> None:
    """Write each point's name beside it, at the nearest height at which it covers no other."""
    axes.figure.canvas.draw()  # else nobody knows yet where anything is
    taken = []
    for name, *place in sorted(points, key=lambda point: point[2]):
        for shift in LABEL_SHIFTS:
            text = axes.annotate(
                name, place, textcoords="offset points", xytext=(7, shift), fontsize=7, va="center",
                arrowprops={"arrowstyle": "-", "linewidth": 0.4, "color": "#888888"} if shift else None,
            )  # fmt: skip
            box = text.get_window_extent()
            if shift == LABEL_SHIFTS[-1] or not any(box.overlaps(other) for other in taken):
                taken.append(box)
                break
            text.remove()


def _svg(figure: Any) -> bytes:
    file = BytesIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    plt.close(figure)
    return file.getvalue()
