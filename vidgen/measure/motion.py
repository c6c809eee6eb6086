"""Which motion of the procedural world a measured path is.

A motion is right when one of its paths, as the world draws them at some start and a steady speed, stays near
the measured one: so jumps, stops, turns and detours count, not just where the object ends up.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from vidgen.world import SPEED_RANGE, VELOCITIES

# F frames, V frames in which the object is visible; positions are (x, y) in frame sides

NONE = "none"
FRAMES_NEEDED = 0.9  # share of the frames that must agree: 15 of 16
PATH_TOLERANCE = 0.04  # from the nearest path of that motion: 1.3 pixels of 32
SPEED_ALLOWED = (SPEED_RANGE[0] / 2, SPEED_RANGE[1] * 2)
BOUNCE_HANDICAP = 0.01  # a bounce can bend after the jitter of a straight path: it must be this much nearer


@dataclass(frozen=True, kw_only=True, slots=True)
class MotionFit:
    """The motion whose paths come nearest to a measured one, "none" when all are too far."""

    motion: str
    errors: dict[str, float]  # per motion, distance to its nearest path within which the needed frames lie
    displacement: tuple[float, float]  # mean per frame


def fit_motion(path_F2: Tensor) -> MotionFit:
    """The motion of a path [F, 2] on the torus, in frame sides; nan where nothing was seen."""
    time_V = (~path_F2[:, 0].isnan()).nonzero().flatten()
    errors = dict.fromkeys((*VELOCITIES, "bouncing"), math.inf)
    needed = math.ceil(FRAMES_NEEDED * len(path_F2))
    if len(time_V) < needed:
        return MotionFit(motion=NONE, errors=errors, displacement=(math.nan, math.nan))
    seen_V2 = path_F2[time_V]
    steps = (seen_V2.diff(dim=0) + 0.5) % 1 - 0.5
    way_V2 = torch.cat([torch.zeros(1, 2), steps.cumsum(0)])  # unrolled from the torus
    first, last = torch.triu_indices(len(time_V), len(time_V), 1)
    slopes = (way_V2[last] - way_V2[first]) / (time_V[last] - time_V[first]).unsqueeze(1)
    slope = slopes.median(0).values  # Theil-Sen: a few odd frames do not turn it

    def error(offsets: Tensor) -> Tensor:
        """Distance within which the needed frames lie; offsets [..., V, 2]."""
        return offsets.norm(dim=-1).sort(-1).values[..., needed - 1]

    for name, (vx, vy) in VELOCITIES.items():
        speed = float(slope[0] * vx + slope[1] * vy)
        if name == "still" or SPEED_ALLOWED[0] <= speed <= SPEED_ALLOWED[1]:
            rest = way_V2 - time_V.unsqueeze(1) * torch.tensor([speed * vx, speed * vy])
            errors[name] = float(error(rest - rest.median(0).values))
    errors["bouncing"] = float(error(_bounce_offsets(time_V, way_V2[:, 0], seen_V2[:, 1])).min())
    handicapped = errors | {"bouncing": errors["bouncing"] + BOUNCE_HANDICAP}
    best = min(handicapped, key=lambda name: handicapped[name])
    mean = way_V2[-1] / (time_V[-1] - time_V[0])
    return MotionFit(
        motion=best if errors[best] <= PATH_TOLERANCE else NONE,
        errors=errors,
        displacement=(float(mean[0]), float(mean[1])),
    )


def _bounce_offsets(time_V: Tensor, x_V: Tensor, y_V: Tensor) -> Tensor:
    """[speeds, phases, V, 2] from every bounce of the world, between heights 0.25 and 0.75, to a path."""
    middle = time_V.float().mean()
    speed = torch.linspace(*SPEED_ALLOWED, 4 * len(time_V)).view(-1, 1, 1)
    phase = torch.arange(128).view(1, -1, 1) / 128
    height = (((phase + (time_V - middle) * speed) % 1) * 2 - 1).abs()
    dy = y_V - (0.25 + 0.5 * height)
    return torch.stack([(x_V - x_V.median()).expand_as(dy), dy], -1)
