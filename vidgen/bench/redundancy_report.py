"""What figures of redundancy say, in a table and a few sentences, and the files that hold them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vidgen.media.segments import write_atomically

NEAR = 0.1  # relative change: a step that changes less is one that a cache may leave out
LOOSE = 0.5  # correlation: a signal below says little of the output
ALIKE = 0.9  # ratio of two figures that are not worth a choice
NUM_ROWS = 10
FIGURES, PICTURE = "redundancy.json", "redundancy.png"
SIGNALS = {  # what caches know of a step before it is run
    "modulated_input_change": "the change of the first layer's input (TeaCache)",
    "first_residual_change": "the change of the first layer's residual (first-block caches)",
    "stack_residual_ratio": "the ratio of the stack's magnitudes (MagCache)",
}


def check_folder(folder: Path, overwrite: bool) -> None:
    """ValueError when the folder cannot take the files, or holds something and `overwrite` is not set."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output {folder}: is a file; give a folder")
    if folder.exists() and any(folder.iterdir()) and not overwrite:
        raise ValueError(f"--output {folder}: is not empty; choose another name or add --overwrite")


def write_files(found: dict[str, Any], folder: Path) -> list[Path]:
    """The paths of the figures and their plots, both whole on the disk; nothing else there is touched.

    ValueError when they cannot be written.
    """
    from vidgen.bench.redundancy_plot import draw

    files = {
        folder / FIGURES: (json.dumps(found, indent=1, allow_nan=False) + "\n").encode(),
        folder / PICTURE: draw(found),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path, data in files.items():
            write_atomically(path, data)
    except OSError as error:
        raise ValueError(f"--output {folder}: cannot be written: {error.strerror}; choose another") from error
    return list(files)


def rows(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Some of the steps, evenly spread: changes since the step before and errors of forecasts in percent."""
    num_steps = len(found["noise_levels"])
    steps = sorted({round(step) for step in np.linspace(0, num_steps - 1, NUM_ROWS)})
    percent = {
        "output %": "output_change",
        "first layer %": "first_residual_change",
        "stack %": "stack_residual_change",
        **{f"order {order} off %": f"forecast_error_{order}" for order in (0, 1, 2)},
    }
    return [
        {
            "step": step,
            "noise level": f"{found['noise_levels'][step]:.3f}",
            "output cosine": _shown(found["curves"]["output_cosine"]["mean"][step], "{:.4f}"),
            "stack ratio": _shown(found["curves"]["stack_residual_ratio"]["mean"][step], "{:.3f}"),
        }
        | {
            head: _shown(found["curves"][name]["mean"][step], "{:.1%}").rstrip("%")
            for head, name in percent.items()
        }
        for step in steps
    ]


def sentences(found: dict[str, Any]) -> list[str]:
    """What the numbers suggest, in plain words; those are left out that too few steps bear out."""
    said = [_on_steps(found), _on_forecasts(found), _on_layers(found), _on_attention(found)]
    return [sentence for sentence in said if sentence]


def longest_run(is_so: Sequence[bool] | NDArray[np.bool_]) -> range:
    """The longest run of places where it is so, the last of equally long ones; empty where it never is."""
    best, start = range(0), 0
    for place, so in enumerate(is_so):
        start = start if so else place + 1
        best = range(start, place + 1) if so and place + 1 - start >= len(best) else best
    return best


def _on_steps(found: dict[str, Any]) -> str | None:
    changes, last = _curve(found, "output_change"), len(found["noise_levels"]) - 1
    if np.isnan(changes).all():
        return None
    run = longest_run(changes < NEAR)
    if not run:
        least = int(np.nanargmin(changes))
        said = (
            f"At no step does the model's output change by less than {NEAR:.0%} "
            f"(least at step {least}: {changes[least]:.1%}): a step cache will show"
        )
    else:
        where = f"From step {run[0]} on" if run[-1] == last else f"From step {run[0]} to step {run[-1]}"
        said = (
            f"{where} the model's output changes by less than {NEAR:.0%} a step (mean "
            f"{changes[run].mean():.1%}, before that {_mean(changes[: run[0]])}): a step cache may skip "
            f"there, with warm_up_steps={run[0]}"
        )
    signal = _best_signal(found)
    return f"{said}{f'; {signal}' if signal else ''}."


def _best_signal(found: dict[str, Any]) -> str | None:
    """Which signal's changes over steps go with the output's, by Pearson's correlation."""
    output = _curve(found, "output_change")
    signals = {name: _curve(found, name) for name in SIGNALS}
    signals["stack_residual_ratio"] = np.abs(1 - signals["stack_residual_ratio"])
    known = np.isfinite([output, *signals.values()]).all(0)
    if known.sum() < 4 or np.ptp(output[known]) == 0:
        return None
    follows = {
        name: float(np.corrcoef(signal[known], output[known])[0, 1])
        for name, signal in signals.items()
        if np.ptp(signal[known])
    }
    if not follows:
        return None
    best = max(follows, key=lambda name: follows[name])
    others = ", ".join(f"{SIGNALS[name]} {r:.2f}" for name, r in follows.items() if name != best)
    if follows[best] < LOOSE:
        all_of_them = ", ".join(f"{SIGNALS[name]} {r:.2f}" for name, r in follows.items())
        return f"none of the signals goes well with it (correlations over steps: {all_of_them})"
    return (
        f"of the signals {SIGNALS[best]} goes best with it "
        f"(correlation over steps {follows[best]:.2f}; {others})"
    )


def _on_forecasts(found: dict[str, Any]) -> str | None:
    errors = [_curve(found, f"forecast_error_{order}") for order in (0, 1, 2)]
    said = [_on_order(order, errors) for order in (1, 2)]
    known = [sentence for sentence in said if sentence]
    return "; ".join(known) + "." if known else None


def _on_order(order: int, errors: list[NDArray[np.float64]]) -> str | None:
    lower, higher = errors[order - 1 : order + 1]
    known = np.flatnonzero(np.isfinite(lower) & np.isfinite(higher))
    if not len(known):
        return None
    is_better = higher[known] < lower[known]
    start = len(known)
    while start and is_better[start - 1]:
        start -= 1
    name = "Order" if order == 1 else "order"
    if start == len(known):
        count = f"{is_better.sum()}" if is_better.any() else "none"
        since, where = known, f"at {count} of {len(known)} steps"
    else:
        since, where = known[start:], f"from step {known[start]} on"
    means = f"{higher[since].mean():.1%} against {lower[since].mean():.1%}"
    return f"{name} {order} forecasts better than {order - 1} {where} (mean error of these steps {means})"


def _on_layers(found: dict[str, Any]) -> str | None:
    changes_LT = np.array(found["layers"]["residual_change"], dtype=float)
    changes_LT = changes_LT[:, np.isfinite(changes_LT).all(0)]
    num_layers, num_steps = changes_LT.shape
    if num_layers < 2 or num_steps < 2:
        return None
    means = changes_LT.mean(1)
    still, lively = int(means.argmin()), int(means.argmax())
    early, late = (_on_halves(half) for half in np.split(changes_LT, [num_steps // 2], axis=1))
    return (
        f"The residual of layer {still} changes least ({means[still]:.1%} a step), that of layer {lively} "
        f"most ({means[lively]:.1%}), and in {(changes_LT < NEAR).mean():.0%} of all cases a layer's changes "
        f"by less than {NEAR:.0%}; to keep layers from step to step, take {early} in the first half of the "
        f"steps and {late} in the second."
    )


def _on_halves(changes_LT: NDArray[np.float64]) -> str:
    """Which half of the layers changes less."""
    front, back = (float(half.mean()) for half in np.split(changes_LT, [len(changes_LT) // 2]))
    if min(front, back) > ALIKE * max(front, back):
        return f"either half of them ({front:.1%} the front one, {back:.1%} the back one)"
    name = "front" if front < back else "back"
    return f"the {name} half of them ({min(front, back):.1%} against {max(front, back):.1%})"


def _on_attention(found: dict[str, Any]) -> str | None:
    mass = found["attention"]
    if mass is None:
        return None
    same, near = np.array(mass["same_frame"]), np.array(mass["within_one_frame"])
    even = float(np.mean(mass["even_within_one_frame"]))
    return (
        f"Self-attention has {same.mean():.0%} of its mass in the same frame and {near.mean():.0%} in it and "
        f"those beside it, where even attention would have {even:.0%}: a window of one frame on each side "
        f"would lose {1 - near.max():.0%} (layer {near.argmax()}) to {1 - near.min():.0%} "
        f"(layer {near.argmin()}) of a layer's mass."
    )


def _curve(found: dict[str, Any], name: str) -> NDArray[np.float64]:
    return np.array(found["curves"][name]["mean"], dtype=float)


def _mean(values: NDArray[np.float64]) -> str:
    known = values[np.isfinite(values)]
    return f"{known.mean():.1%}" if len(known) else "unknown"


def _shown(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)
