"""Schemes: what a video can be, each a timetable with its sizes and the settings that ask for it.

Two schemes give two videos. Plans of one scheme give the same one, however many ranks they use.
"""

from dataclasses import dataclass
from typing import Any

from vidgen.denoise.lockstep import Clips
from vidgen.denoise.timetable import Timetable, autoregressive, dualparal, full, moving_buffer, pipefusion
from vidgen.types import ContextMode

BUFFERED = 4  # live blocks of the `buffer` that is compared
GLOBAL_FRAMES = 4  # of the `lockstep` that is compared, as jobs have them


@dataclass(frozen=True, kw_only=True, slots=True)
class Scheme:
    """A timetable, its name in a job, and clips where self-attention is by clips."""

    name: str
    timetable: Timetable
    clips: Clips | None = None

    @property
    def is_lossy(self) -> bool:
        """Whether it is an approximation of `full`."""
        return self.timetable.is_patched

    @property
    def label(self) -> str:
        """Plans with the same label give the same video."""
        table, words = self.timetable, [self.name]
        if self.clips is not None:
            sizes = self.clips.clip_frames, self.clips.halo_frames, self.clips.global_frames
            words += [f"{letter}{size}" for letter, size in zip("PCG", sizes, strict=True)]
        elif table.is_patched:
            words += [f"P{table.block_frames}", f"warm-up {table.warm_up_steps}"]
        elif self.name != "full":
            words += [f"P{table.block_frames}", f"C{table.context_frames}"]
            words += [str(table.mode)] if table.context_frames else []
            words += [f"anchor {table.anchor_frames}"] if table.anchor_frames else []
            words += [f"s{table.stride}"] if table.stride > 1 and self.name != "autoregressive" else []
        return " ".join(words)

    def settings(self) -> dict[str, Any]:
        """Of a job's `queue` section."""
        table, found = self.timetable, {"timetable": self.name}
        if self.name == "full":
            return found
        if self.clips is not None:
            return found | {
                "block_frames": self.clips.clip_frames,
                "context_frames": self.clips.halo_frames,
                "global_frames": self.clips.global_frames,
            }
        found |= {"block_frames": table.block_frames}
        if table.is_patched:
            return found | {"warm_up_steps": table.warm_up_steps}
        found |= {"context_frames": table.context_frames, "context_mode": str(table.mode)}
        found |= {"anchor_frames": table.anchor_frames} if table.anchor_frames else {}
        return found if self.name == "autoregressive" else found | {"stride": table.stride}


def schemes(
    num_frames: int, num_steps: int, *, block_frames: int, context_frames: int, mode: ContextMode,
    has_mixed_levels: bool = True, switch_step: int | None = None, lossy: bool = False,
) -> list[Scheme]:  # fmt: skip
    """Schemes worth comparing for a video: the model's recommended sizes, and a few others.

    `has_mixed_levels`: whether the model knows frames of different noise in one window, which `buffer` needs.
    `lossy`: also those that approximate `full`.
    """
    sizes: dict[str, Any] = {"switch_step": switch_step}
    whole = full(num_frames, num_steps, **sizes)
    found = [Scheme(name="full", timetable=whole)]
    if block_frames >= num_frames:
        return found
    sizes |= {"block_frames": block_frames}
    if lossy:
        found.append(Scheme(name="pipefusion", timetable=pipefusion(num_frames, num_steps, **sizes)))
    clips = Clips(
        num_frames=num_frames,
        clip_frames=block_frames,
        halo_frames=context_frames,
        global_frames=GLOBAL_FRAMES,
    )
    found.append(Scheme(name="lockstep", timetable=whole, clips=clips))
    other = ContextMode.CACHE if mode == ContextMode.RECOMPUTE else ContextMode.RECOMPUTE
    sizes |= {"context_frames": context_frames}
    tables = []
    for kind in (mode, other) if context_frames else (mode,):
        tables.append(("dualparal", dualparal(num_frames, num_steps, mode=kind, **sizes)))
        if num_steps > 1:
            tables.append(("autoregressive", autoregressive(num_frames, num_steps, mode=kind, **sizes)))
    if 2 * block_frames < num_frames:
        wide = sizes | {"block_frames": 2 * block_frames}
        tables.append(("dualparal", dualparal(num_frames, num_steps, mode=mode, **wide)))
    if num_steps > 1:
        tables.append(("dualparal", dualparal(num_frames, num_steps, mode=mode, stride=2, **sizes)))
    if has_mixed_levels and switch_step is None:
        stride = max(1, num_steps // BUFFERED)
        tables.append(("buffer", moving_buffer(num_frames, num_steps, stride=stride, **sizes)))
    return found + [Scheme(name=name, timetable=table) for name, table in tables]
