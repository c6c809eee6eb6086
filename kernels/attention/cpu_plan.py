"""A block layout as the CPU kernel runs it: rows that see equally many blocks, a few at a time."""

from dataclasses import dataclass

import torch
from torch import Tensor

from vidgen.kernels.attention.layout import BlockLayout

# B batch, H heads, N = B * H, R rows (blocks of queries), C key blocks, T tiles, q k tokens of a block,
# I rows (of all batch entries and heads) that run together, M blocks that each of them sees

LOGITS_IN_CACHE = 1 << 18  # floats


@dataclass(frozen=True, slots=True)
class Chunk:
    """Rows with equally many blocks, few enough to run at once."""

    rows: Tensor | slice  # numbers [I] among all N * R rows; a slice, which copies nothing, where they follow
    blocks_IM: Tensor  # numbers among all N * C key blocks
    keep: Tensor | None  # fp32 [1 or I, q, some of M * k]: 1 where a key is seen, else 0, of the columns from
    kept_from: int  # this one on; those before are seen whole


@dataclass(frozen=True, slots=True)
class Plan:
    """All chunks, and which keys anybody sees."""

    chunks: list[Chunk]
    seen_NCk: Tensor  # bool [N * C, k]
    sees_all: bool


def plan_for(layout: BlockLayout, batch: int, num_heads: int) -> Plan:
    """The layout as a plan, made once."""
    key = ("cpu", batch, num_heads)
    if key not in layout.prepared:
        layout.prepared[key] = _make_plan(layout, batch, num_heads)
    return layout.prepared[key]


def _make_plan(layout: BlockLayout, batch: int, num_heads: int) -> Plan:
    num_rows, num_columns = layout.num_rows, layout.num_key_blocks
    codes, tiles = _codes(layout)
    codes_RC = codes.expand(batch, num_heads, num_rows, num_columns).reshape(-1, num_columns)
    heads_R = torch.arange(batch * num_heads).repeat_interleave(num_rows)
    counts = (codes_RC >= 0).sum(-1)
    is_masked = (codes_RC > 0).any(-1)
    size = layout.query_block * layout.key_block
    chunks: list[Chunk] = []
    masks: dict[bytes, tuple[Tensor, int]] = {}  # rows in the midst of a video have the same tiles
    for count in counts.unique().tolist():
        if count == 0:
            continue  # such rows keep their zeros and -inf
        for masked in (False, True):
            rows = ((counts == count) & (is_masked == masked)).nonzero()[:, 0]
            if not len(rows):
                continue
            columns = (codes_RC[rows] >= 0).nonzero()[:, 1].view(-1, count)
            found = codes_RC[rows].gather(1, columns)
            if masked:  # rows with the same tiles beside each other, to share a mask
                order = _lexicographic(found)
                rows, columns, found = rows[order], columns[order], found[order]
            blocks = columns + heads_R[rows].unsqueeze(1) * num_columns
            step = max(1, LOGITS_IN_CACHE // (size * count))
            for part in _runs(found, step) if masked else _cuts(len(rows), step):
                keep, start = None, 0
                if masked:
                    key = found[part].numpy().tobytes()
                    keep, start = masks[key] = masks.get(key) or _keep(found[part], tiles)
                chunks.append(Chunk(_as_slice(rows[part]), blocks[part], keep, start))
    seen_HCk = _seen(codes, tiles).expand(batch, num_heads, num_columns, layout.key_block)
    seen_NCk = seen_HCk.reshape(-1, layout.key_block)
    return Plan(chunks, seen_NCk, bool(seen_NCk.all()))


def _seen(codes: Tensor, tiles: Tensor) -> Tensor:
    """[B, H, C, k] True for the keys that some query sees."""
    batch, heads, _, num_columns = codes.shape
    found = codes.new_zeros((batch, heads, len(tiles) + 1, num_columns), dtype=torch.float32)
    found.scatter_(2, codes + 1, 1.0)  # which tiles stand in a column; the first of all is none
    return torch.einsum("bhtc,tk->bhck", found[:, :, 1:], tiles.any(1).float()) > 0


def _codes(layout: BlockLayout) -> tuple[Tensor, Tensor]:
    """(per block [B, H, R, C]: -1 not seen, 0 seen whole, else the number of a tile; tiles [T, q, k])."""
    num_columns, block = layout.num_key_blocks, layout.key_block
    codes = layout.full.mask(num_columns).to(torch.int64) - 1
    tiles = torch.ones(1, layout.query_block, block, dtype=torch.bool)
    if layout.partial is not None:
        ids = layout.partial.lists.spread(layout.partial.tile_ids_BHRM.long() + 1, num_columns)
        codes = torch.where(ids > 0, ids, codes)
        tiles = torch.cat((tiles, layout.partial.tiles_Nqk))
    short = layout.lengths_BHC < block
    if not short.any():
        return codes, tiles
    lengths = layout.lengths_BHC.unsqueeze(2).long()
    codes, lengths = torch.broadcast_tensors(codes, lengths)
    pairs = codes.clamp(min=0) * (block + 1) + lengths  # one number for (tile, length)
    is_short = (codes >= 0) & (lengths < block)
    kinds, numbers = pairs[is_short].unique(return_inverse=True)
    cut = tiles[kinds // (block + 1)] & (torch.arange(block) < (kinds % (block + 1)).view(-1, 1, 1))
    codes = codes.masked_scatter(is_short, numbers + len(tiles))
    return codes, torch.cat((tiles, cut))


def _lexicographic(rows: Tensor) -> Tensor:
    """The order of rows of numbers, equal ones beside each other."""
    _, groups = rows.unique(dim=0, return_inverse=True)
    return groups.argsort(stable=True)


def _cuts(length: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, length)) for start in range(0, length, step)]


def _as_slice(rows: Tensor) -> Tensor | slice:
    """Ascending row numbers as a slice, if none is left out."""
    first, last = int(rows[0]), int(rows[-1])
    return slice(first, last + 1) if last - first + 1 == len(rows) and (rows.diff() == 1).all() else rows


def _runs(codes_IM: Tensor, step: int) -> list[slice]:
    """Runs of equal rows, of `step` rows at the most; where rows all differ, `step` of them together."""
    changes = (codes_IM[1:] != codes_IM[:-1]).any(1).nonzero()[:, 0].add(1).tolist()
    if 2 * len(changes) > len(codes_IM):
        return _cuts(len(codes_IM), step)
    bounds = [0, *changes, len(codes_IM)]
    return [
        slice(start + cut.start, start + cut.stop)
        for start, stop in zip(bounds, bounds[1:], strict=False)
        for cut in _cuts(stop - start, step)
    ]


def _keep(codes_IM: Tensor, tiles: Tensor) -> tuple[Tensor, int]:
    """(1.0 where a key is seen, for the columns from the first tile on; that column)."""
    if (codes_IM == codes_IM[0]).all():
        codes_IM = codes_IM[:1]
    first = int((codes_IM > 0).any(0).nonzero()[0])
    seen = tiles[codes_IM[:, first:]]  # [1 or I, M', q, k]
    return seen.transpose(1, 2).flatten(2).float(), first * tiles.shape[2]
