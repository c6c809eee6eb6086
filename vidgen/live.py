"""What someone may do to a render while it runs: watch its blocks, change the prompt, give it up."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vidgen.engine import Engine
from vidgen.media.blocks import WrittenBlock

if TYPE_CHECKING:
    from vidgen.parallel.standing import Gangs


@dataclass(frozen=True, kw_only=True, slots=True)
class Wish:
    """A prompt for all blocks that are not admitted yet, blended in over `transition_blocks`."""

    id: str
    prompt: str
    transition_blocks: int = 0


@dataclass(frozen=True, kw_only=True)
class Live:
    """What a render asks and tells between its ticks, all from the render's own thread."""

    engine: Engine | None = None  # one that is loaded already, for the job's model and settings
    gangs: "Gangs | None" = None  # ranks that wait for work, where Ray is connected already
    check: Callable[[], None] = lambda: None  # before every forward: an error ends the render there
    wishes: Callable[[], Iterable[Wish]] = lambda: ()  # the new ones, asked after every tick
    applied: Callable[[Wish, int, int], None] = lambda wish, first_block, first_frame: None
    refused: Callable[[Wish, str], None] = lambda wish, why: None
    committed: Callable[[WrittenBlock], None] = lambda block: None  # durable, and in JOB/segments


UNATTENDED = Live()
