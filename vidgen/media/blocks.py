"""The blocks a sink has put on the disk, in order and without a gap."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True, slots=True)
class WrittenBlock:
    """One block as it is on the disk: what the journal keeps, and hands back when the job is resumed."""

    block: int
    first_frame: int
    num_frames: int
    path: Path  # the segment, or the first picture of the block
    sha256: str  # of the segment, or of the block's pictures one after the other


class Blocks:
    """The blocks a sink holds: next one in order, without a gap, the ones taken over unchanged on disk."""

    def __init__(self, done: Sequence[WrittenBlock]) -> None:
        self.written: list[WrittenBlock] = []
        for record in done:
            self.expect(record.block, record.first_frame)
            self.written.append(record)

    @property
    def num_frames(self) -> int:
        return sum(record.num_frames for record in self.written)

    def expect(self, block: int, first_frame: int) -> None:
        if (block, first_frame) != (len(self.written), self.num_frames):
            raise ValueError(
                f"block={block}, first_frame={first_frame}: blocks come in order, "
                f"next is block {len(self.written)} at frame {self.num_frames}"
            )

    def add(self, block: int, first_frame: int, num_frames: int, path: Path, sha256: str) -> WrittenBlock:
        record = WrittenBlock(
            block=block, first_frame=first_frame, num_frames=num_frames, path=path, sha256=sha256
        )
        self.written.append(record)
        return record


def check_unchanged(path: Path, data: bytes, sha256: str) -> None:
    """ValueError unless `data`, found at `path`, is what the journal remembers."""
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise ValueError(
            f"{path}: sha256 is {found[:12]}, the journal says {sha256[:12]}; resume from the block before it"
        )
