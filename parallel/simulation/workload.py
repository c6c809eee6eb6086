"""What the simulator is told: how long things take on ranks, and what goes wrong. Numbers only."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Part:
    """What of the model is run, where a step cache leaves out some of it."""

    left_out: range = range(0)  # layers
    tokens: float = 1.0  # share of a frame's; if not all, then of the blocks' own frames only


WHOLE = Part()


@dataclass(frozen=True, slots=True)
class Item:
    """The size of one run of the model, in latent frames."""

    own: int  # of the blocks in the window
    before: int = 0  # recomputed context in front of them
    context: int = 0  # whose K,V are read: frames of the blocks around, and the anchor
    part: Part = WHOLE

    @property
    def window(self) -> int:
        """Frames that are seen, and in most runs pass through the layers."""
        return self.own + self.before

    @property
    def running(self) -> float:
        """Frames' worth of tokens that pass through the layers."""
        return self.window if self.part.tokens == 1 else self.own * self.part.tokens


@dataclass(frozen=True, slots=True)
class Link:
    """The way between two ranks: messages follow one another at `bytes_per_s` and are `latency_s` late."""

    latency_s: float = 0.0
    bytes_per_s: float = float("inf")

    def __post_init__(self) -> None:
        if self.latency_s < 0 or not self.bytes_per_s > 0:
            raise ValueError(f"{self}: need a latency_s of at least 0 and a bytes_per_s above 0")


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """What a render is on a row of stages. Lanes that share its work act as one row.

    `stage_s` gives every stage's seconds for an item, all it does with it: layers, embedding or projecting,
    collectives among lanes, and what handing the message on keeps the stage busy. `solver_s` is what the
    first stage does with a forward's result. Messages of a link are all of one size, as the engine's are.
    """

    stage_s: Callable[[Item], Sequence[float]]
    runs_at: Callable[[int], int] = lambda step: 1  # runs of the model per forward of a step; 0: is skipped
    part_at: Callable[[int], Part] = lambda step: WHOLE  # of the model, that they run
    solver_s: float = 0.0
    hop: Link = Link()  # from stage to stage
    hop_bytes: int = 0
    back: Link = Link()  # from the last stage to the first
    back_bytes: int = 0
    max_in_flight: int | None = None  # items on their way; see parallel/first.py default_in_flight
    decode_s: float = 0.0  # of a full block; shorter ones take their share
    decodes_apart: bool = True  # on a rank of its own, else the first stage does it
    queue_blocks: int | None = None  # finished blocks that may wait for the decoder
    num_lanes: int = 1
    jitter: float = 0.0  # standard deviation of an item's time on a rank, as a share of it: 0 to 1

    def __post_init__(self) -> None:
        if not 0 <= self.jitter <= 1:
            raise ValueError(f"jitter={self.jitter}: allowed is 0 to 1")
        for name in ("max_in_flight", "queue_blocks", "num_lanes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}: need at least 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class Faults:
    """How often a rank, a link or the whole gang falls short; shares are of ranks and time."""

    slow_share: float = 0.0  # how likely a rank is slow in a spell
    slow_factor: float = 2.0
    slow_link_share: float = 0.0  # how likely a link is
    slow_link_factor: float = 10.0
    spell_ticks: int = 8  # how long a rank or link stays slow or well
    failures_per_rank_hour: float = 0.0
    restart_s: float = 30.0  # from a failure until the ranks work again
    state_every: int = 8  # ticks between two saved states

    def __post_init__(self) -> None:
        for name in ("slow_share", "slow_link_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)}: allowed is 0 to 1")
        for name in ("slow_factor", "slow_link_factor", "spell_ticks", "state_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: need at least 1")
        for name in ("failures_per_rank_hour", "restart_s"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)}: need at least 0")


NONE = Faults()


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """What a simulated render took. Seconds count from its first item."""

    makespan_s: float  # until the last block is decoded
    first_frame_s: float  # until the first one is
    block_done_s: tuple[float, ...]  # until each one is
    busy_s: tuple[float, ...]  # a stage's time at items, lost ones too
    utilisation: float  # share of the stages' time that the video's items take when nothing is slow or lost
    bubble_share: float  # share of the stages' time without an item
    bytes_per_link: tuple[int, ...]  # out of each stage, in each lane
    items: int  # runs of the model, lost ones too
    restarts: int
    lost_s: float  # between the last saved state and going on from it, over all failures
