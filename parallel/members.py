"""A rank or the decoder as its gang sees it, and who is to blame when some of them are lost."""

from dataclasses import dataclass
from typing import Any

from vidgen.parallel.rank import Failure, Report, Whereabouts

DECODER = -1


@dataclass
class Member:
    """An actor as the gang sees it."""

    index: int
    actor: Any
    where: Whereabouts | None = None
    heard_s: float = 0.0  # when it last answered anything
    ping: Any = None  # asked while the gang is at rest, and not answered yet
    asked_s: float = 0.0  # when the poll that is not answered yet was sent
    pending: Any = None
    report: Report | None = None
    lost: str | None = None  # why it will not answer any more

    @property
    def name(self) -> str:
        return "the decoder" if self.index == DECODER else f"rank {self.index}"

    def described(self) -> str:
        """The name and, when known, where it ran."""
        return self.name if self.where is None else f"{self.name} (pid {self.where.pid} on {self.where.host})"


def is_cause(member: Member) -> bool:
    """Whether it is gone or broke by itself, rather than lost another one."""
    failure = member.report.failure if member.report is not None else None
    return bool(member.lost) or (failure is not None and failure.peer is None)


def why(member: Member) -> str:
    """What happened to it."""
    if member.lost:
        return member.lost
    assert member.report is not None and member.report.failure is not None
    failure: Failure = member.report.failure
    return failure.message


def first_line(error: BaseException) -> str:
    """The cause of a Ray error, without its trace."""
    cause = getattr(error, "cause", None) or error
    lines = [line for line in str(cause).strip().splitlines() if line.strip()]
    return f"{type(cause).__name__}: {lines[-1] if lines else ''}"
