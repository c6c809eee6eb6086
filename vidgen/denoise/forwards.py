"""What a timetable is made of: runs of the model, what they read and what they lend. No tensors."""

from dataclasses import dataclass
from enum import StrEnum


class Lender(StrEnum):
    """For whom a forward keeps keys and values."""

    EARLIER_BLOCK = "earlier block"  # the block before this one, in the same tick
    LATER_BLOCK = "later block"  # the block after this one, in the next tick
    PATCHES = "patches"  # later patches of the video in the same tick, earlier ones in the next tick
    ALL = "all"  # every later block, from the next tick on: the anchor


@dataclass(frozen=True, slots=True)
class Read:
    """Frames [start, stop) of a block: its latents after `step` steps, or the K,V of its forward `step`."""

    block: int
    step: int
    start: int
    stop: int

    @property
    def num_frames(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class Lend:
    """Frames [start, stop) of a forward's own frames whose keys and values somebody will read.

    They are of one block of the window, and counted from the first own frame of the window.
    """

    to: Lender
    start: int
    stop: int
    part: int = 0  # which of the forward's parts


@dataclass(frozen=True, slots=True)
class Forward:
    """One run of the model: a block's step, what it reads and what it lends."""

    block: int
    step: int
    before_latents: Read | None = None
    before_kv: Read | None = None
    after_kv: Read | None = None
    anchor_kv: Read | None = None
    lends: tuple[Lend, ...] = ()
    newer: tuple[
        tuple[int, int], ...
    ] = ()  # (block, step) of the blocks that run in the same window, in order
    patches_kv: tuple[Read, ...] = ()  # of all other patches of the video, in order

    @property
    def parts(self) -> tuple[tuple[int, int], ...]:
        """(block, step) of all blocks in the window, oldest first."""
        return ((self.block, self.step), *self.newer)
