"""The plots of redundancy: one picture with a panel for each of its figures."""

from io import BytesIO
from typing import Any

import matplotlib

matplotlib.use("agg")
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FormatStrFormatter, LogLocator, MaxNLocator, NullLocator
from numpy.typing import NDArray

from vidgen.bench.redundancy_report import NEAR

COLOURS = ("#222222", "#4878a8", "#c44e52", "#6a9f58", "#b8860b")
STYLES = (
    ".-",
    ".-",
    "-",
    ".--",
    ".-",
)  # the last layer's output mostly lies under the whole stack's residual
WIDTHS = (1.5, 1.5, 5, 1.5, 1.5)
FEATURES = {
    "output": "model's output (velocity)",
    "first_residual": "first layer's residual",
    "last_output": "last layer's output",
    "stack_residual": "residual of the whole stack",
    "modulated_input": "first layer's modulated input",
}
NEAR_PERCENT = 100 * NEAR
GUIDE: dict[str, Any] = {"color": "gray", "linewidth": 1, "linestyle": "--"}
STEP = "step"


def draw(found: dict[str, Any]) -> bytes:
    """PNG, 1400 pixels wide, of what `summarize` found; `settings` and `machine` are named in its title."""
    with plt.rc_context({"font.size": 11, "axes.titlesize": 12, "legend.fontsize": 9.5}):
        figure, panels = plt.subplots(
            4, 2, figsize=(14, 18), dpi=100, layout=ConstrainedLayoutEngine(h_pad=0.12, w_pad=0.1)
        )
        changes, cosines, ratios, errors, residuals, layers, branches, mass = panels.flat
        _changes(changes, found)
        _cosines(cosines, found)
        _ratio(ratios, found)
        _errors(errors, found)
        _residuals(residuals, found)
        _layer_cosines(layers, found)
        _branches(branches, found)
        _mass(mass, found)
        figure.suptitle(_title(found), fontsize=13)
        file = BytesIO()
        figure.savefig(file, format="png")
        plt.close(figure)
        return file.getvalue()


def _title(found: dict[str, Any]) -> str:
    settings = found.get("settings", {})
    facts = [f"{name} {settings[name]}" for name in ("model", "num_frames", "seed") if name in settings]
    if settings:
        facts.append(f"timetable {settings['queue']['timetable']}")
    facts.append(f"{len(found['noise_levels'])} steps, mean of {found['num_series']} blocks and branches")
    return f"How alike features are over steps and layers: {', '.join(facts)}"


def _changes(axes: Any, found: dict[str, Any]) -> None:
    _features(axes, {feature: 100 * _curve(found, f"{feature}_change") for feature in FEATURES})
    axes.axhline(NEAR_PERCENT, label=f"{NEAR_PERCENT:g} %", **GUIDE)
    axes.set(title="Change since the step before", ylabel="relative L1 change, %")
    _noise_levels(axes, found)
    _over_steps(axes, found, is_log=True)


def _cosines(axes: Any, found: dict[str, Any]) -> None:
    # float32 finds cosines above 1 by a rounding
    _features(axes, {name: (1 - _curve(found, f"{name}_cosine")).clip(0) for name in FEATURES})
    axes.set(title="Turn since the step before", ylabel="1 - cosine similarity (0: the same direction)")
    _noise_levels(axes, found)
    _over_steps(axes, found, is_log=True)


def _ratio(axes: Any, found: dict[str, Any]) -> None:
    name = "stack_residual_ratio"
    _band(axes, found, name, COLOURS[3], FEATURES["stack_residual"])
    axes.axhline(1, **GUIDE)
    axes.set(title="Magnitude of the residual (MagCache's gamma)", ylabel="ratio to the step before")
    _over_steps(axes, found)


def _errors(axes: Any, found: dict[str, Any]) -> None:
    names = ("order 0: the last one again", "order 1: on in a line", "order 2: on in a parabola")
    for order, (colour, name) in enumerate(zip(COLOURS, names, strict=False)):
        axes.plot(100 * _curve(found, f"forecast_error_{order}"), ".-", color=colour, label=name)
    axes.axhline(NEAR_PERCENT, label=f"{NEAR_PERCENT:g} %", **GUIDE)
    axes.set(title="Forecast of the output from the steps before", ylabel="relative L1 error, %")
    _over_steps(axes, found, is_log=True)


def _branches(axes: Any, found: dict[str, Any]) -> None:
    for colour, branch in zip(COLOURS[1:], found["branches"], strict=False):
        axes.plot(100 * _curve(found, "output_change", branch), ".-", color=colour, label=branch)
    low, high = (100 * _curve(found, "output_change", end) for end in ("least", "most"))
    axes.fill_between(range(len(low)), low, high, color="gray", alpha=0.2, label="least to most of any block")
    axes.axhline(NEAR_PERCENT, label=f"{NEAR_PERCENT:g} %", **GUIDE)
    axes.set(title="Change of the output by branch of guidance", ylabel="relative L1 change, %")
    _over_steps(axes, found, is_log=True)


def _residuals(axes: Any, found: dict[str, Any]) -> None:
    changes_LT = 100 * np.array(found["layers"]["residual_change"], dtype=float)
    axes.set(title="Change of each layer's residual since the step before (yellow: little)")
    _heatmap(axes, changes_LT, "relative L1 change, %", "viridis_r", is_log=True)


def _layer_cosines(axes: Any, found: dict[str, Any]) -> None:
    cosines_LT = np.array(found["layers"]["output_cosine"], dtype=float)
    axes.set(title="Likeness of each layer's output to its input (yellow: much alike)")
    _heatmap(axes, cosines_LT, "cosine similarity", "viridis", is_log=False)


def _mass(axes: Any, found: dict[str, Any]) -> None:
    mass = found["attention"]
    axes.set(title="Self-attention mass near the query's frame", xlabel="layer", ylabel="share of mass, %")
    if mass is None:
        axes.text(0.5, 0.5, "not measured: attention is not plain", ha="center", transform=axes.transAxes)
        return
    layers = np.arange(len(mass["same_frame"]))
    for shift, colour, name in ((-0.2, COLOURS[1], "same_frame"), (0.2, COLOURS[2], "within_one_frame")):
        label = name.replace("_", " ")
        shares, even = (100 * np.array(mass[key]) for key in (name, f"even_{name}"))
        axes.bar(layers + shift, shares, 0.38, color=colour, label=label)
        axes.axhline(even.mean(), color=colour, linestyle="--", linewidth=1.2, label=f"{label}, if even")
    axes.set_ylim(0, 125)
    axes.set_yticks(range(0, 101, 20))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(ncols=2)


def _features(axes: Any, curves: dict[str, NDArray[np.float64]]) -> None:
    looks = zip(COLOURS, STYLES, WIDTHS, strict=True)
    for (feature, curve), (colour, style, width) in zip(curves.items(), looks, strict=True):
        alpha = 0.4 if width > 2 else 1
        axes.plot(curve, style, color=colour, linewidth=width, alpha=alpha, label=FEATURES[feature])


def _noise_levels(axes: Any, found: dict[str, Any]) -> None:
    """Noise levels above some of the steps."""
    levels = found["noise_levels"]
    steps = sorted({round(step) for step in np.linspace(0, len(levels) - 1, 10)})
    above = axes.secondary_xaxis("top")
    above.set_xticks(steps, labels=[f"{levels[step]:.2f}" for step in steps])
    above.set_xlabel("noise level at the step (1: noise)")


def _plain_log(axis: Any) -> None:
    """Plain numbers on a logarithmic axis."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FormatStrFormatter("%g"))


def _heatmap(axes: Any, values_LT: NDArray[np.float64], label: str, colours: str, *, is_log: bool) -> None:
    """Layers up, steps to the right; gray where there is nothing."""
    axes.set(xlabel=STEP, ylabel="layer")
    axes.set_facecolor("lightgray")
    is_log = is_log and bool((values_LT[np.isfinite(values_LT)] > 0).all())
    drawn = axes.imshow(
        np.ma.masked_invalid(values_LT), aspect="auto", origin="lower", cmap=colours, interpolation="nearest",
        norm="log" if is_log else "linear",
    )  # fmt: skip
    bar = axes.figure.colorbar(drawn, ax=axes, label=label, location="bottom", aspect=40, pad=0.02)
    if is_log:
        _plain_log(bar.ax.xaxis)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))


def _band(axes: Any, found: dict[str, Any], name: str, colour: str, label: str) -> None:
    least, most = (_curve(found, name, end) for end in ("least", "most"))
    axes.fill_between(range(len(least)), least, most, color=colour, alpha=0.2, label="least to most")
    axes.plot(_curve(found, name), ".-", color=colour, label=label)


def _over_steps(axes: Any, found: dict[str, Any], *, is_log: bool = False) -> None:
    """The steps' axis, a grid and a legend; up, a logarithmic axis where every line is somewhere above 0."""
    levels = np.array(found["noise_levels"], dtype=float)
    axes.set_xlim(-0.5, len(levels) - 0.5)
    axes.set_xlabel(STEP)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.25)
    if is_log and all((np.asarray(line.get_ydata())[1:] > 0).any() for line in axes.lines):
        axes.set_yscale("log")
        _plain_log(axes.yaxis)
    axes.legend()


def _curve(found: dict[str, Any], name: str, of: str = "mean") -> NDArray[np.float64]:
    return np.array(found["curves"][name][of], dtype=float)
