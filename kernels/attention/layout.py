"""Which keys each query sees, said without a dense mask."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class SlidingWindow3D:
    """Queries on a (frames, rows, columns) grid see keys at most `radius` away along each axis.

    Keys lie on the same grid extended to `key_frames` frames; query frame 0 is key frame `frame_offset`.
    A radius of None does not limit its axis.
    """

    grid: tuple[int, int, int]
    radius: tuple[int | None, int | None, int | None]
    key_frames: int
    frame_offset: int = 0

    def __post_init__(self) -> None:
        if any(radius is not None and radius < 0 for radius in self.radius):
            raise ValueError(f"radius={self.radius}: need 0 or more along each axis, or None for no limit")
        if self.frame_offset < 0 or self.frame_offset + self.grid[0] > self.key_frames:
            raise ValueError(
                f"query frames {self.frame_offset}..{self.frame_offset + self.grid[0]} must lie inside "
                f"the {self.key_frames} key frames"
            )

    @property
    def tokens_per_frame(self) -> int:
        return self.grid[1] * self.grid[2]

    def key_frame_range(self, query_frame: int) -> tuple[int, int]:
        """[start, stop) of the key frames that a query frame sees."""
        centre, radius = query_frame + self.frame_offset, self.radius[0]
        if radius is None:
            return 0, self.key_frames
        return max(0, centre - radius), min(self.key_frames, centre + radius + 1)

    def spatial_mask(self, device: torch.device | None = None) -> Tensor | None:
        """[S, S] True where a token of one frame sees a token of another; None when it sees all."""
        _, rows, columns = self.grid
        if self.radius[1] is None and self.radius[2] is None:
            return None
        row = torch.arange(rows, device=device).repeat_interleave(columns)
        column = torch.arange(columns, device=device).repeat(rows)
        near_row = (row[:, None] - row).abs() <= (rows if self.radius[1] is None else self.radius[1])
        near_column = (column[:, None] - column).abs() <= (
            columns if self.radius[2] is None else self.radius[2]
        )
        return near_row & near_column
