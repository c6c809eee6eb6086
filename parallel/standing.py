"""Gangs that outlive a render: their processes and the weights that these have read wait for the next one."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from vidgen.parallel.gang import Gang, GangConfig, GangFailed

ANSWER_S = 5.0
LET_GO_S = 10.0
PING_S = 0.5


class Gangs:
    """Where renders get their gangs. With `keeps` one that is not at work is kept: the last one."""

    def __init__(self, *, keeps: bool = False) -> None:
        self._keeps = keeps
        self._kept: Gang | None = None
        self._at_work: Gang | None = None

    @contextmanager
    def gang(self, config: GangConfig) -> Iterator[Gang]:
        """A gang of that kind, kept or new. GangFailed when there is no room for one.

        A render that is given up leaves it kept, if all of its ranks let go in time. A failed one is ended:
        nothing is known of what it would do.
        """
        gang = self._at_work = self._take(config) or Gang(config).__enter__()
        try:
            yield gang
        except GangFailed:
            gang.close()
            raise
        except BaseException:
            if not (self._keeps and gang.give_up(LET_GO_S)):
                gang.close()
                raise
            self._kept = gang
            raise
        finally:
            self._at_work = None
        if self._keeps:
            self._kept = gang
        else:
            gang.close()

    def _take(self, config: GangConfig) -> Gang | None:
        """The kept one if it is of that kind and answers; another one is ended, as it may hold the room."""
        gang, self._kept = self._kept, None
        if gang is None:
            return None
        if _kind(gang.config) == _kind(config) and gang.is_well(ANSWER_S):
            gang.config = config
            return gang
        gang.close()
        return None

    @property
    def is_kept(self) -> bool:
        """Whether there is one at rest."""
        return self._kept is not None

    def ages_s(self) -> tuple[float, ...]:
        """How long ago each rank was heard, and last the decoder; nothing when there are none."""
        gang = self._at_work or self._kept
        return gang.ages_s() if gang is not None else ()

    def ping(self) -> None:
        """Hear the ranks that are at rest. GangFailed when one is lost; then the others are ended."""
        if self._kept is None:
            return
        try:
            self._kept.ping(PING_S)
        except GangFailed:
            self.close()
            raise

    def close(self) -> None:
        """End the kept gang."""
        gang, self._kept = self._kept, None
        if gang is not None:
            gang.close()


def _kind(config: GangConfig) -> Any:
    """What its processes are started for."""
    return config.needs, config.placement
