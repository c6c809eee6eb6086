"""What a render does with the work of whoever runs its ticks, one process or many ranks."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from vidgen.denoise.loop import LoopState
from vidgen.denoise.timetable import Timetable

Decode = Callable[[Tensor], Any]  # clean latents of the next block [1, C, F, Y, X] -> frames


def blocks_before(timetable: Timetable, tick: int) -> int:
    """Blocks that are clean when this tick begins."""
    return sum(timetable.last_tick(block) < tick for block in range(timetable.num_blocks))


@dataclass(frozen=True, kw_only=True)
class Decoded:
    """A block's clean latents and its frames."""

    block: int
    latents: Tensor
    frames: Any


@dataclass(frozen=True)
class Step:
    """What is new: from which blocks on other prompts hold (None: it is too late), which is to be known
    before all else; decoded blocks in order; then perhaps a state, which is to be saved after them."""

    ticks_done: int
    decoded: list[Decoded] = field(default_factory=list)
    state: LoopState | None = None
    taken_up: tuple[int | None, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Hooks:
    """What a render tells those who run its ticks."""

    load_state: Callable[[], LoopState]  # the last one saved
    latents_before: Callable[[int], Tensor | None]  # a block: what a decoder needs to begin with it
    committed_blocks: Callable[[], int]
    should_stop: Callable[[], bool]
    note: Callable[[str], None]  # a line for people: a rank was lost, a new attempt begins
    placed: Callable[[list[dict[str, Any]]], None]  # where an attempt's processes run
    check: Callable[[], None] = lambda: None  # called before every forward: an error from it ends the render
