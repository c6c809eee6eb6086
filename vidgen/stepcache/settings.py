"""What can be set of step caches, and what is best where nothing is said.

Defaults were chosen on the built-in model at its 20 steps: those that save most of the forwards while it
draws what it is asked for within two points as often as without (tools/results/ablate_caches.json).
"""

import math
from dataclasses import dataclass, replace

METHODS = ("none", "tea", "taylor", "gated_taylor", "mag", "first_block", "delta", "region")

# by method: threshold, first steps that always run, last ones, most skips in a row, order of the forecast
DEFAULTS: dict[str, tuple[float | None, int, int, int, int]] = {
    "tea": (0.2, 5, 2, 3, 0),
    "taylor": (None, 5, 1, 2, 1),
    "gated_taylor": (0.1, 3, 1, 3, 1),
    "mag": (0.05, 3, 1, 3, 1),
    "first_block": (0.15, 3, 1, 3, 0),
    "delta": (None, 5, 1, 2, 0),
    "region": (None, 5, 1, 3, 0),
}
OPEN = ("threshold", "warm_up_steps", "last_steps", "max_skips", "order")
BY_LAYER = {"layers": 0.75, "boundary": 0.5}  # of delta: errors are no larger than with half of the layers
BY_TOKEN = {"ratio": 0.5, "highest": 0.0}  # of region
BY_CLOCK = ("taylor", "delta", "region")  # which steps are skipped is known beforehand
MAX_ORDER = 4

Curve = tuple[tuple[float, float], ...]  # (noise level, magnitude), levels descending


@dataclass(frozen=True, kw_only=True)
class CacheSettings:
    """Settings of all step caches; ValueError for one that cannot be. A threshold of 0 skips nothing."""

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012 - read where these settings come from a file

    method: str = "none"
    threshold: float | None = None  # a step is skipped while the drift is below; None: the method's default
    warm_up_steps: int | None = None  # a block's first steps, which always run; None: the method's default
    last_steps: int | None = None  # those at the end that always run
    max_skips: int | None = None  # in a row; taylor, delta, region skip so many and run one, by the clock
    order: int | None = None  # of the forecast: 0 says again what was said last, 1 goes on in a line
    coefficients: tuple[float, ...] | None = None  # tea: polynomial of the change, highest power first
    calibration: str | None = None  # mag, tea: a file of `vidgen measure calibration`; None: the model's own
    magnitudes: Curve | None = None  # mag: the curve of such a file, once resolved
    layers: float | None = None  # delta: share of the layers that a skipped step leaves out
    boundary: float | None = None  # delta: share of the steps that leave out rear layers; later ones front
    ratio: float | None = None  # region: share of a frame's tokens that run in a skipped step
    highest: float | None = None  # region: share of those left out that are so for their high spread

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method={self.method}: there are {', '.join(METHODS)}")
        threshold = self.threshold
        if threshold is not None and not (threshold >= 0 and math.isfinite(threshold)):
            raise ValueError(f"threshold={threshold}: need 0 (nothing is skipped) or more")
        if threshold is not None and self.method in BY_CLOCK:
            raise ValueError(
                f"threshold={threshold} with method={self.method}: it skips by the clock; set max_skips, or "
                "take gated_taylor"
            )
        for name, least in (("warm_up_steps", 1), ("last_steps", 0), ("max_skips", 0), ("order", 0)):
            count = getattr(self, name)
            if count is not None and count < least:
                raise ValueError(f"{name}={count}: need at least {least}")
        if (self.order or 0) > MAX_ORDER:
            raise ValueError(f"order={self.order}: need 0 to {MAX_ORDER}")
        self._check_shares()
        self._check_curves()

    def _check_shares(self) -> None:
        for method, names in {"delta": BY_LAYER, "region": BY_TOKEN}.items():
            for name in names:
                share = getattr(self, name)
                if share is None:
                    continue
                if self.method != method:
                    raise ValueError(
                        f"{name}={share} with method={self.method}: is of {method}; leave it out"
                    )
                if not 0 <= share <= 1:
                    raise ValueError(f"{name}={share}: need a share of 0 to 1")
        if not self.skips_forwards and self.order:
            raise ValueError(
                f"order={self.order} with method={self.method}: it forecasts nothing; leave order out"
            )

    def _check_curves(self) -> None:
        if self.coefficients is not None and not (
            self.coefficients and all(math.isfinite(number) for number in self.coefficients)
        ):
            raise ValueError(f"coefficients={self.coefficients}: need one finite number or more")
        curve = self.magnitudes
        if curve is None:
            return
        levels = [level for level, _ in curve]
        if len(curve) < 2 or levels != sorted(set(levels), reverse=True) or min(m for _, m in curve) <= 0:
            raise ValueError(
                "magnitudes: need two pairs or more of a noise level, descending, and a magnitude above 0"
            )

    @property
    def needs_calibration(self) -> bool:
        """Whether something must be known of the model that these settings do not say."""
        return self.method == "mag" and self.magnitudes is None

    @property
    def is_foreseen(self) -> bool:
        """Whether it is known which steps are skipped before anything is rendered."""
        return self.method in (*BY_CLOCK, "mag")

    @property
    def skips_layers(self) -> bool:
        """Whether some layers of a forward are skipped."""
        return self.method == "delta"

    @property
    def skips_tokens(self) -> bool:
        """Whether some tokens of a forward are skipped."""
        return self.method == "region"

    @property
    def skips_forwards(self) -> bool:
        """Whether all of a forward is skipped or nothing."""
        return self.method not in ("none", "delta", "region")

    def resolved(self) -> "CacheSettings":
        """The same with the method's defaults filled in."""
        if self.method == "none":
            return self
        filled = dict(zip(OPEN, DEFAULTS[self.method], strict=True))
        filled |= {"delta": BY_LAYER, "region": BY_TOKEN}.get(self.method, {})
        return replace(self, **{name: value for name, value in filled.items() if getattr(self, name) is None})
