"""Layouts from scores: the blocks of most attention mass; and layouts from two others."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from vidgen.kernels.attention.convert import numbered_tiles
from vidgen.kernels.attention.layout import BlockLayout, BlockLists, PartialBlocks

# B batch, H heads, R rows (blocks of queries), C blocks of keys, M longest list of a row, N tiles


def top_k(
    mass_BHRC: Tensor,
    k: int | Tensor,
    *,
    num_queries: int,
    num_keys: int,
    query_block: int,
    key_block: int,
    always_RC: Tensor | None = None,
) -> BlockLayout:
    """The layout of the k blocks of most mass in every row, of lower index where masses are equal.

    `k` is a number, or a tensor [H] or [B, H] of them. Blocks of `always_RC` are in, and count among the k; a
    row with more than k of them has these alone. As many in every row, since choosing over all rows gave
    artefacts (AdaSpa, arXiv 2502.21079).
    """
    num_blocks = mass_BHRC.shape[-1]
    counts = torch.as_tensor(k, device=mass_BHRC.device)
    if counts.ndim > 2 or counts.is_floating_point() or bool(((counts < 1) | (counts > num_blocks)).any()):
        raise ValueError(
            f"k={k}: need 1 to {num_blocks} blocks, one number or a tensor of them [H] or [B, H]"
        )
    counts_BHR = counts.unsqueeze(-1).expand(mass_BHRC.shape[:3])
    if always_RC is not None:
        counts_BHR = torch.maximum(counts_BHR, always_RC.to(mass_BHRC.device).sum(-1))
    return _first(
        _order(mass_BHRC, always_RC),
        counts_BHR,
        num_queries=num_queries,
        num_keys=num_keys,
        query_block=query_block,
        key_block=key_block,
    )


def top_p(
    mass_BHRC: Tensor,
    p: float,
    *,
    num_queries: int,
    num_keys: int,
    query_block: int,
    key_block: int,
    at_least: int = 1,
    always_RC: Tensor | None = None,
) -> BlockLayout:
    """The layout of the fewest blocks in each row whose share of the row's mass reaches `p`.

    The block that crosses it is in; `at_least` so many are. Blocks of `always_RC` are in, and count.
    """
    num_blocks = mass_BHRC.shape[-1]
    if not 0 < p <= 1:
        raise ValueError(f"p={p}: need a share above 0, at most 1")
    if not 1 <= at_least <= num_blocks:
        raise ValueError(f"at_least={at_least}: need 1 to {num_blocks} blocks")
    order = _order(mass_BHRC, always_RC)
    sums = mass_BHRC.gather(-1, order).double().cumsum(-1)
    is_short = sums < p * sums[..., -1:]  # without the block after these, the share is not reached
    counts_BHR = (1 + is_short[..., :-1].sum(-1)).clamp(min=at_least)
    if always_RC is not None:
        counts_BHR = torch.maximum(counts_BHR, always_RC.to(mass_BHRC.device).sum(-1))
    return _first(
        order,
        counts_BHR,
        num_queries=num_queries,
        num_keys=num_keys,
        query_block=query_block,
        key_block=key_block,
    )


def recall(mass_BHRC: Tensor, layout: BlockLayout) -> Tensor:
    """Share of the mass that a layout keeps, [B, H]. Of blocks seen in part, their share of pairs."""
    kept = layout.full.mask(layout.num_key_blocks).to(mass_BHRC.dtype)
    if layout.partial is not None:
        shares_N = layout.partial.tiles_Nqk.flatten(1).to(mass_BHRC.dtype).mean(1)
        ids = layout.partial.tile_ids_BHRM.long()
        kept = kept + layout.partial.lists.spread(shares_N[ids], layout.num_key_blocks)
    return (mass_BHRC * kept).sum((-1, -2)) / mass_BHRC.sum((-1, -2))


def union(a: BlockLayout, b: BlockLayout) -> BlockLayout:
    """The layout in which a query sees what it sees in either."""
    return _combined(a, b, torch.logical_or)


def intersection(a: BlockLayout, b: BlockLayout) -> BlockLayout:
    """The layout in which a query sees what it sees in both."""
    return _combined(a, b, torch.logical_and)


def _order(mass_BHRC: Tensor, always_RC: Tensor | None) -> Tensor:
    """Blocks of each row, those first that matter most."""
    if always_RC is not None:
        mass_BHRC = mass_BHRC.masked_fill(always_RC.to(mass_BHRC.device), torch.inf)
    return mass_BHRC.argsort(dim=-1, descending=True, stable=True)


def _first(order_BHRC: Tensor, counts_BHR: Tensor, **sizes: int) -> BlockLayout:
    """The layout of so many blocks of each row, in front of an order."""
    longest = int(counts_BHR.max())
    is_out = torch.arange(longest, device=order_BHRC.device) >= counts_BHR.unsqueeze(-1)
    places = order_BHRC[..., :longest].masked_fill(is_out, order_BHRC.shape[-1]).sort(-1).values
    full = BlockLists(
        counts_BHR=counts_BHR.to(torch.int32).contiguous(),
        indices_BHRM=places.masked_fill(is_out, 0).to(torch.int32),
    )
    layout = BlockLayout(**sizes, full=full, may_see_more=True)  # pyright: ignore[reportArgumentType]
    if order_BHRC.shape[-1] != layout.num_key_blocks:
        raise ValueError(
            f"mass of {order_BHRC.shape[-1]} key blocks: {layout.num_keys} keys in blocks of "
            f"{layout.key_block} make {layout.num_key_blocks}"
        )
    return layout


def _combined(a: BlockLayout, b: BlockLayout, combine: Callable[[Tensor, Tensor], Tensor]) -> BlockLayout:
    _check_alike(a, b)
    (ids_a, tiles_a), (ids_b, tiles_b) = numbered_tiles(a), numbered_tiles(b)
    # tiles are cut off at the last query and key, so those of the last row and column count as others
    is_last_row = torch.zeros(a.num_rows, 1, dtype=torch.int64, device=a.device)
    is_last_row[-1] = 1
    is_last_column = torch.zeros(a.num_key_blocks, dtype=torch.int64, device=a.device)
    is_last_column[-1] = 1
    codes = ((ids_a * len(tiles_b) + ids_b) * 2 + is_last_row) * 2 + is_last_column
    kinds, kind_BHRC = codes.unique(return_inverse=True)
    pairs = kinds // 4
    tiles = combine(tiles_a[pairs // len(tiles_b)], tiles_b[pairs % len(tiles_b)])
    query, key = (torch.arange(block, device=a.device) for block in (a.query_block, a.key_block))
    rows_left = a.num_queries - (a.num_rows - 1) * a.query_block
    keys_left = a.num_keys - (a.num_key_blocks - 1) * a.key_block
    is_query = (query < rows_left) | (kinds // 2 % 2 == 0).unsqueeze(1)
    is_key = (key < keys_left) | (kinds % 2 == 0).unsqueeze(1)
    is_pair = is_query.unsqueeze(2) & is_key.unsqueeze(1)
    tiles &= is_pair
    is_full = (tiles == is_pair).flatten(1).all(1)
    is_partial = tiles.flatten(1).any(1) & ~is_full
    return replace(
        a,
        full=BlockLists.of_mask(is_full[kind_BHRC]),
        partial=_partial(tiles, is_partial, kind_BHRC) if bool(is_partial.any()) else None,
        may_see_more=a.may_see_more and b.may_see_more,
        prepared={},
    )


def _check_alike(a: BlockLayout, b: BlockLayout) -> None:
    sizes_a, sizes_b = (
        (layout.num_queries, layout.num_keys, layout.query_block, layout.key_block) for layout in (a, b)
    )
    if sizes_a != sizes_b:
        raise ValueError(f"queries, keys and their blocks {sizes_a} and {sizes_b}: need equal ones")
    for name in ("key_lengths_BHC", "key_log_weights_BHC"):
        of_a, of_b = getattr(a, name), getattr(b, name)
        if (of_a is None) != (of_b is None) or (of_a is not None and not torch.equal(of_a, of_b)):
            raise ValueError(f"{name} of both layouts differ: need equal ones")


def _partial(tiles: Tensor, is_partial: Tensor, kind_BHRC: Tensor) -> PartialBlocks:
    """The blocks of the kinds that are seen in part, with equal tiles once."""
    kept, number = tiles[is_partial].unique(dim=0, return_inverse=True)
    tile_of_kind = torch.zeros(len(tiles), dtype=torch.int64, device=tiles.device)
    tile_of_kind[is_partial] = number
    lists = BlockLists.of_mask(is_partial[kind_BHRC])
    ids = tile_of_kind[kind_BHRC].gather(-1, lists.indices_BHRM.long())
    return PartialBlocks(lists=lists, tile_ids_BHRM=ids.to(torch.int32), tiles_Nqk=kept)
