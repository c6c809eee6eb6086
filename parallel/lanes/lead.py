"""One lane decides when a tick begins and when the work ends; the others do as it says.

All lanes run the same forwards in the same order. What depends on the world outside, such as being asked
to stop, or another prompt, is decided by the first lane before a tick and told to the first stages of the
others.
"""

from collections.abc import Sequence
from typing import NamedTuple

from vidgen.parallel.transport import Header, Incoming, Kind, Outgoing


class Word(NamedTuple):
    """What is told before a tick."""

    kind: Kind  # WORK: go on with it; STOP: do not; IDLE: wait
    tick: int
    num_changes: int = 0  # of prompts that have been taken up by now


class Leader:
    """The end of the lane that decides; with nobody to tell it is the only one."""

    def __init__(self, followers: Sequence[Outgoing] = ()) -> None:
        self._followers = followers

    def tell(self, word: Word) -> None:
        """Tell all others. TransportError when one takes no more."""
        for follower in self._followers:
            follower.send(Header(word.kind, tick=word.tick, block=word.num_changes))


class Follower:
    """The end of a lane that is told."""

    def __init__(self, leader: Incoming) -> None:
        self._leader = leader

    def hear(self) -> Word:
        """The next word. TransportError when none comes in time."""
        header, _ = self._leader.receive()
        return Word(header.kind, header.tick, header.block)


Lead = Leader | Follower
