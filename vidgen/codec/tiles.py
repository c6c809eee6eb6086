"""Large frames as overlapping tiles, and back by linear blending."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

Span = tuple[int, int]  # first latent row (or column) and the one after the last
OVERLAP = 4  # neighbours share at least a fourth of a tile


def spans(size: int, tile: int | None) -> list[Span]:
    """Spans of equal length, evenly spaced, that cover `size` and overlap. One span when it covers all."""
    if tile is None or tile >= size:
        return [(0, size)]
    overlap = max(1, tile // OVERLAP)
    num = math.ceil((size - overlap) / (tile - overlap))
    starts = [round(i * (size - tile) / (num - 1)) for i in range(num)]
    return [(start, start + tile) for start in starts]


def ramps(all_spans: list[Span], scale: int) -> list[Tensor]:
    """A weight for every pixel of each span, linear where spans overlap; at each pixel they sum to 1.

    `scale` is the number of pixels in a latent row.
    """
    weights = []
    for index, (start, stop) in enumerate(all_spans):
        weight = torch.ones((stop - start) * scale, dtype=torch.float64)
        distance = torch.arange(len(weight), dtype=torch.float64) + 0.5
        if index > 0:
            weight *= (distance / ((all_spans[index - 1][1] - start) * scale)).clamp_max(1)
        if index + 1 < len(all_spans):
            weight *= (distance.flip(0) / ((stop - all_spans[index + 1][0]) * scale)).clamp_max(1)
        weights.append(weight)
    total = torch.zeros(all_spans[-1][1] * scale, dtype=torch.float64)
    for (start, stop), weight in zip(all_spans, weights, strict=True):
        total[start * scale : stop * scale] += weight
    return [
        (weight / total[start * scale : stop * scale]).float()
        for (start, stop), weight in zip(all_spans, weights, strict=True)
    ]


class Grid:
    """Tiles over frames of so many latent rows and columns; `tile` is their size in latents, None for one."""

    def __init__(self, rows: int, columns: int, tile: tuple[int, int] | None) -> None:
        self.rows = spans(rows, tile and tile[0])
        self.columns = spans(columns, tile and tile[1])

    def __len__(self) -> int:
        return len(self.rows) * len(self.columns)

    def cut(self, frames: Tensor, scale: int = 1) -> list[Tensor]:
        """Each tile's view [..., rows, columns] of frames in which a latent has `scale` rows and columns."""
        return [
            frames[..., top * scale : bottom * scale, left * scale : right * scale]
            for top, bottom in self.rows
            for left, right in self.columns
        ]

    def join(self, tiles: Iterable[Tensor], scale: int = 1) -> Tensor:
        """Whole frames of the tiles that `cut` gave, as they come. With one tile: that tile."""
        if len(self) == 1:
            (only,) = tiles
            return only
        height, width = self.rows[-1][1] * scale, self.columns[-1][1] * scale
        row_weights, column_weights = ramps(self.rows, scale), ramps(self.columns, scale)
        whole: Tensor | None = None
        for index, tile in enumerate(tiles):
            row, column = divmod(index, len(self.columns))
            if whole is None:
                whole = tile.new_zeros(*tile.shape[:-2], height, width)
            weight = row_weights[row].view(-1, 1) * column_weights[column]
            (top, bottom), (left, right) = self.rows[row], self.columns[column]
            whole[..., top * scale : bottom * scale, left * scale : right * scale] += tile * weight.to(tile)
        assert whole is not None
        return whole
