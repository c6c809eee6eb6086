"""Queries and keys that are tokens of a (frames, rows, columns) grid, and how far a query sees."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# R rows (blocks of queries), C blocks of keys

Grid = tuple[int, int, int]


@dataclass(frozen=True, kw_only=True, slots=True)
class Tokens:
    """What queries and keys are, and the blocks that they are cut into."""

    grid: Grid
    key_frames: int
    frame_offset: int
    text: int
    query_block: int
    key_block: int

    @classmethod
    def of(
        cls,
        grid: Grid,
        key_frames: int | None,
        frame_offset: int,
        text_tokens: int,
        query_block: int | None,
        key_block: int | None,
    ) -> "Tokens":
        """Of a constructor's arguments: as many key frames as it takes, blocks of one frame, unless said."""
        frames, rows, columns = grid
        if min(grid) < 1:
            raise ValueError(f"grid={grid}: need at least one frame, row and column")
        if text_tokens < 0:
            raise ValueError(f"text_tokens={text_tokens}: need 0 or more")
        key_frames = frame_offset + frames if key_frames is None else key_frames
        if frame_offset < 0 or frame_offset + frames > key_frames:
            raise ValueError(
                f"query frames {frame_offset}..{frame_offset + frames} must lie inside "
                f"the {key_frames} key frames"
            )
        query_block = rows * columns if query_block is None else query_block
        key_block = rows * columns if key_block is None else key_block
        check_blocks(query_block, key_block)
        return cls(
            grid=(frames, rows, columns),
            key_frames=key_frames,
            frame_offset=frame_offset,
            text=text_tokens,
            query_block=query_block,
            key_block=key_block,
        )

    @property
    def per_frame(self) -> int:
        return self.grid[1] * self.grid[2]

    @property
    def video_queries(self) -> int:
        return self.grid[0] * self.per_frame

    @property
    def video_keys(self) -> int:
        return self.key_frames * self.per_frame

    @property
    def sizes(self) -> dict[str, Any]:
        """The fields of a BlockLayout of these tokens."""
        return {
            "num_queries": self.video_queries + self.text,
            "num_keys": self.video_keys + self.text,
            "query_block": self.query_block,
            "key_block": self.key_block,
        }

    def places(self, tokens: Tensor, frame_offset: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """(Frame, row, column) of token numbers."""
        inside = tokens % self.per_frame
        return tokens // self.per_frame + frame_offset, inside // self.grid[2], inside % self.grid[2]

    def text_blocks_RC(self) -> Tensor:
        """True where a block has a text token, as query or as key."""
        row_ends = torch.arange(0, self.video_queries + self.text, self.query_block) + self.query_block
        column_ends = torch.arange(0, self.video_keys + self.text, self.key_block) + self.key_block
        if not self.text:
            return torch.zeros(len(row_ends), len(column_ends), dtype=torch.bool)
        return (row_ends > self.video_queries).unsqueeze(1) | (column_ends > self.video_keys)


@dataclass(frozen=True, kw_only=True, slots=True)
class Reach:
    """How far a query sees. None: no limit."""

    frames: int | None = None
    rows: int | None = None
    columns: int | None = None
    squared: int | None = None  # of the Euclidean distance of (row, column)

    def in_frame(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Whether distances along rows and columns are within reach."""
        near = rows >= 0 if self.rows is None else rows <= self.rows
        if self.columns is not None:
            near = near & (columns <= self.columns)
        if self.squared is not None:
            near = near & (rows * rows + columns * columns <= self.squared)
        return near

    def all(self, frames: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """Whether distances along all axes are within reach."""
        near = self.in_frame(rows, columns)
        return near if self.frames is None else near & (frames <= self.frames)


def check_blocks(query_block: int, key_block: int) -> None:
    """ValueError unless there can be such blocks."""
    if min(query_block, key_block) < 1:
        raise ValueError(f"query_block={query_block}, key_block={key_block}: need at least 1")
