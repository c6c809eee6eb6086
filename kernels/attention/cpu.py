"""Attention over a block layout on a CPU: gathered key blocks, two batched products, a softmax in cache.

Rows that see equally many blocks run together, as many at a time as keep the logits in a core's cache.
Gathering costs a tenth of the products (2 MiB of L2, blocks of 128, head dimension 64); torch's own flash kernel
splits short query blocks into tiles of 32, which costs it a fifth of its speed. Sums are in fp32 for all dtypes.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from vidgen.kernels.attention.layout import BlockLayout

# B batch, Q queries, K keys, H heads, D head dimension, N = B * H, C key blocks,
# I rows (of all batch entries and heads) that run together, M blocks that each of them sees,
# q k tokens of a block of queries, of keys

LOGITS_IN_CACHE = 1 << 18  # floats


@dataclass(frozen=True, slots=True)
class Chunk:
    """Rows with equally many blocks, few enough to run at once."""

    rows_I: Tensor  # numbers among all N * R rows
    blocks_IM: Tensor  # numbers among all N * C key blocks
    mask: Tensor | None  # [1 or I, q, some of M * k] True where a key is not seen, at the end of
    masked_from: int  # this column


def run(
    query_BQHD: Tensor,
    key_BKHD: Tensor,
    value_BKHD: Tensor,
    layout: BlockLayout | None,
    scale: float,
    lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """Attention [B, Q, H, D] and, if asked for, LSE [B, H, Q]."""
    if layout is None:
        layout = _everything(query_BQHD.shape[1], key_BKHD.shape[1])
    batch, num_queries, num_heads, head_dim = query_BQHD.shape
    plan = _plan(layout, batch, num_heads)
    queries = _blocks(query_BQHD, layout.query_block).mul_(scale)
    keys, values = _blocks(key_BKHD, layout.key_block), _blocks(value_BKHD, layout.key_block)
    weights = layout.key_log_weights_BHC
    weights_NC = None if weights is None else weights.float().expand(batch, num_heads, -1).flatten()
    out = torch.zeros_like(queries)
    lse_Rq = torch.full(queries.shape[:2], -math.inf)
    needs_gradient = torch.is_grad_enabled() and any(
        tensor.requires_grad for tensor in (query_BQHD, key_BKHD, value_BKHD)
    )
    space = None if needs_gradient else _Space()
    for chunk in plan:
        _attend(chunk, queries, keys, values, weights_NC, out, lse_Rq, space)
    out = out.view(batch, num_heads, -1, head_dim)[:, :, :num_queries]
    lse_BHQ = lse_Rq.view(batch, num_heads, -1)[:, :, :num_queries] if lse else None
    return out.transpose(1, 2).to(query_BQHD.dtype), lse_BHQ


def _attend(
    chunk: Chunk,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    weights_NC: Tensor | None,
    out: Tensor,
    lse_Rq: Tensor,
    space: "_Space | None",
) -> None:
    """Fill the chunk's rows of `out` and `lse_Rq`, in memory of `space` unless gradients need all of it."""
    num_rows, num_blocks = chunk.blocks_IM.shape
    query_block, head_dim = queries.shape[1:]
    key_block = keys.shape[1]
    flat, num_keys = chunk.blocks_IM.flatten(), num_blocks * key_block

    def gathered(blocks: Tensor, name: str) -> Tensor:
        into = space and space.floats(name, (num_rows * num_blocks, key_block, head_dim))
        return torch.index_select(blocks, 0, flat, out=into).view(num_rows, num_keys, head_dim)

    logits = space and space.floats("logits", (num_rows, query_block, num_keys))
    logits = torch.bmm(queries[chunk.rows_I], gathered(keys, "keys").transpose(1, 2), out=logits)
    if weights_NC is not None:
        logits.add_(weights_NC[flat].repeat_interleave(key_block).view(num_rows, 1, num_keys))
    if chunk.mask is not None:
        logits[..., chunk.masked_from :].masked_fill_(chunk.mask, -math.inf)
    peak = logits.detach().amax(-1, keepdim=True)
    if chunk.mask is not None or weights_NC is not None:
        peak.masked_fill_(peak == -math.inf, 0)  # a query that sees no key
    total = logits.sub_(peak).exp_().sum(-1, keepdim=True)
    attended = torch.bmm(logits, gathered(values, "values"))
    lse_Rq[chunk.rows_I] = total.log().add_(peak).squeeze(-1)
    out[chunk.rows_I] = attended / total.clamp(min=torch.finfo(torch.float32).tiny)


class _Space:
    """Memory that is used over and over: fresh pages for every chunk would cost as much as the products."""

    def __init__(self) -> None:
        self._held: dict[str, Tensor] = {}

    def floats(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """An uninitialised fp32 tensor, valid until the name is asked for again."""
        size = math.prod(shape)
        if name not in self._held or self._held[name].numel() < size:
            self._held[name] = torch.empty(size)
        return self._held[name][:size].view(shape)


def _blocks(tokens_BSHD: Tensor, block: int) -> Tensor:
    """[N * blocks, block, D] in fp32 and memory of its own, the last block of each head filled with zeros."""
    batch, length, heads, head_dim = tokens_BSHD.shape
    padded = tokens_BSHD.new_empty((batch, heads, -(-length // block) * block, head_dim), dtype=torch.float32)
    padded[:, :, :length] = tokens_BSHD.transpose(1, 2)
    padded[:, :, length:] = 0
    return padded.view(-1, block, head_dim)


def _everything(num_queries: int, num_keys: int) -> BlockLayout:
    from vidgen.kernels.attention.windows import dense

    return dense(num_queries, num_keys)


def _plan(layout: BlockLayout, batch: int, num_heads: int) -> list[Chunk]:
    """The layout as chunks, made once for a layout."""
    key = ("cpu", batch, num_heads)
    if key not in layout.prepared:
        layout.prepared[key] = _make_plan(layout, batch, num_heads)
    return layout.prepared[key]


def _make_plan(layout: BlockLayout, batch: int, num_heads: int) -> list[Chunk]:
    num_rows, num_columns = layout.num_rows, layout.num_key_blocks
    codes, tiles = _codes(layout)
    codes_RC = codes.expand(batch, num_heads, num_rows, num_columns).reshape(-1, num_columns)
    heads_R = torch.arange(batch * num_heads).repeat_interleave(num_rows)
    counts = (codes_RC >= 0).sum(-1)
    is_masked = (codes_RC > 0).any(-1)
    size = layout.query_block * layout.key_block
    plan = []
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
                mask, start = _mask(found[part], tiles) if masked else (None, 0)
                plan.append(Chunk(rows[part], blocks[part], mask, start))
    return plan


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


def _mask(codes_IM: Tensor, tiles: Tensor) -> tuple[Tensor, int]:
    """(True where a key is not seen, for the columns from the first masked block on; that column)."""
    if (codes_IM == codes_IM[0]).all():
        codes_IM = codes_IM[:1]
    first = int((codes_IM > 0).any(0).nonzero()[0])
    mask = ~tiles[codes_IM[:, first:]]  # [1 or I, M', q, k]
    return mask.transpose(1, 2).flatten(2), first * tiles.shape[2]
