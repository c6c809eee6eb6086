"""What step caches must know of a model: how its output's magnitude and its input's change run.

Measured once per checkpoint (vidgen/measure/calibration.py) and kept in a JSON file:
{"magnitudes": [[level, magnitude], ...], "coefficients": [...]}.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from vidgen.stepcache.settings import CacheSettings

BUILTIN = Path(__file__).parent.parent / "assets" / "builtin_calibration.json"
USERS = ("mag", "tea")


def with_calibration(settings: CacheSettings, *, is_builtin: bool) -> CacheSettings:
    """The settings with what the calibration file says, where they say nothing of it themselves.

    The built-in model has a file of its own. ValueError in one line for a file that is none.
    """
    path = Path(settings.calibration) if settings.calibration else (BUILTIN if is_builtin else None)
    if settings.method not in USERS or path is None:
        return settings
    found = read_calibration(path)
    if settings.method == "tea":
        return settings if settings.coefficients else replace(settings, coefficients=found["coefficients"])
    return settings if settings.magnitudes else replace(settings, magnitudes=found["magnitudes"])


def read_calibration(path: Path) -> dict[str, Any]:
    """Magnitudes and coefficients as settings know them. ValueError in one line for a file that is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {
            "magnitudes": tuple((float(level), float(size)) for level, size in found["magnitudes"]),
            "coefficients": tuple(float(number) for number in found["coefficients"]),
        }
    except OSError as error:
        raise ValueError(f"calibration={path}: cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"calibration={path}: no calibration; make one with `vidgen measure calibration`"
        ) from error
