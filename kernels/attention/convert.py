"""Layouts as other libraries say them: FlexAttention, FlashAttention 4, and one-dimensional windows."""

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from vidgen.kernels.attention.layout import BlockLayout, BlockLists, PartialBlocks

# B batch, H heads, R rows (blocks of queries), C blocks of keys, M longest list of a row, N tiles,
# q and k tokens of a query and a key block

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
NO_LIMIT = -1


class FlashBlocks(NamedTuple):
    """Block sparsity as FlashAttention 4 (CuTe) takes it, all int32; "mask" blocks are seen in part."""

    mask_block_cnt: Tensor  # [B, H, R]
    mask_block_idx: Tensor  # [B, H, R, C]
    full_block_cnt: Tensor
    full_block_idx: Tensor


def to_block_mask(layout: BlockLayout, device: torch.device | str, *, backward: bool = True) -> BlockMask:
    """The layout as FlexAttention's BlockMask. Without `backward` it is cheaper, for forward passes only."""
    layout = layout.to(device)
    blocks = to_flash4(layout)
    return BlockMask.from_kv_blocks(
        blocks.mask_block_cnt,
        blocks.mask_block_idx,
        blocks.full_block_cnt,
        blocks.full_block_idx,
        BLOCK_SIZE=(layout.query_block, layout.key_block),
        mask_mod=mask_mod_of(layout),
        seq_lengths=(layout.num_queries, layout.num_keys),
        compute_q_blocks=backward,
    )


def from_block_mask_of_flex(block_mask: BlockMask) -> BlockLayout:
    """The layout of FlexAttention's BlockMask, whose mask_mod is asked about blocks that are seen in part."""
    counts, indices = block_mask.full_kv_num_blocks, block_mask.full_kv_indices
    if counts is None or indices is None:
        counts, indices = torch.zeros_like(block_mask.kv_num_blocks), block_mask.kv_indices
    blocks = FlashBlocks(block_mask.kv_num_blocks, block_mask.kv_indices, counts, indices)
    num_queries, num_keys = block_mask.seq_lengths
    query_block, key_block = block_mask.BLOCK_SIZE
    return from_flash4(
        blocks,
        block_mask.mask_mod,
        num_queries=num_queries,
        num_keys=num_keys,
        query_block=query_block,
        key_block=key_block,
    )


def to_flash4(layout: BlockLayout) -> FlashBlocks:
    """The layout's lists as FlashAttention 4 takes them; `mask_mod_of` says what partial blocks hold."""
    if layout.key_log_weights_BHC is not None:
        raise ValueError("log-weights of key blocks: block lists cannot say them; take backend triton or cpu")
    num_blocks = layout.num_key_blocks
    full = layout.full.mask(num_blocks)
    partial = torch.zeros_like(full) if layout.partial is None else layout.partial.lists.mask(num_blocks)
    if layout.key_lengths_BHC is not None:
        # kernels know where the keys end, but not where those of a block do
        natural = replace(layout, key_lengths_BHC=None, prepared={}).lengths_BHC
        is_cut = (layout.key_lengths_BHC < natural).unsqueeze(2)
        is_there = (layout.key_lengths_BHC > 0).unsqueeze(2)
        full, partial = full & ~is_cut, (partial | full & is_cut) & is_there
    full, partial = torch.broadcast_tensors(full, partial)  # kernels read both with the same strides
    in_part, whole = (BlockLists.of_mask(mask, num_blocks) for mask in (partial, full))
    return FlashBlocks(
        mask_block_cnt=in_part.counts_BHR.contiguous(),
        mask_block_idx=in_part.indices_BHRM.contiguous(),
        full_block_cnt=whole.counts_BHR.contiguous(),
        full_block_idx=whole.indices_BHRM.contiguous(),
    )


def from_flash4(
    blocks: FlashBlocks,
    mask_mod: MaskMod | None = None,
    *,
    num_queries: int,
    num_keys: int,
    query_block: int,
    key_block: int,
) -> BlockLayout:
    """The layout of such lists. `mask_mod(batch, head, query, key)` says what is seen of partial blocks."""
    full, partial = (
        _shortened(counts, indices)
        for counts, indices in (
            (blocks.full_block_cnt, blocks.full_block_idx),
            (blocks.mask_block_cnt, blocks.mask_block_idx),
        )
    )
    layout = BlockLayout(
        num_queries=num_queries, num_keys=num_keys, query_block=query_block, key_block=key_block, full=full
    )
    if not partial.indices_BHRM.shape[-1]:
        return layout
    if mask_mod is None:
        raise ValueError("lists of partial blocks: need a mask_mod that says what is seen of them")
    return replace(layout, partial=_looked_at(layout, partial, mask_mod), prepared={})


def numbered_tiles(layout: BlockLayout) -> tuple[Tensor, Tensor]:
    """(Which tile each block is [B, H, R, C] int64, tiles [2 + N, q, k]): nothing, all, then its own."""
    numbers = layout.full.mask(layout.num_key_blocks).long()
    tiles = torch.zeros(2, layout.query_block, layout.key_block, dtype=torch.bool, device=layout.device)
    tiles[1] = True
    if layout.partial is None:
        return numbers, tiles
    ids = layout.partial.tile_ids_BHRM.long() + 2
    numbers = numbers + layout.partial.lists.spread(ids, layout.num_key_blocks)
    return numbers, torch.cat((tiles, layout.partial.tiles_Nqk))


def mask_mod_of(layout: BlockLayout) -> MaskMod:
    """Whether a (batch, head, query, key) is seen, as FlexAttention asks; of full blocks too."""
    query_block, key_block = layout.query_block, layout.key_block
    number_BHRC, tiles = numbered_tiles(layout)
    number_BHRC = number_BHRC.to(torch.int32)
    # a compiled kernel is for one number of tiles: there are few powers of two
    spare = (1 << (len(tiles) - 1).bit_length()) - len(tiles)
    tiles = torch.cat((tiles, tiles[:1].expand(spare, -1, -1)))
    lengths_BHC = layout.lengths_BHC
    of_batch, of_head = (int(size > 1) for size in number_BHRC.shape[:2])
    length_of_batch, length_of_head = (int(size > 1) for size in lengths_BHC.shape[:2])

    def mask_mod(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        column, place = key // key_block, key % key_block
        tile = number_BHRC[batch * of_batch, head * of_head, query // query_block, column]
        is_there = place < lengths_BHC[batch * length_of_batch, head * length_of_head, column]
        return tiles[tile, query % query_block, place] & is_there

    return mask_mod


def window_1d(layout: BlockLayout) -> tuple[int, int] | None:
    """(left, right) when query i sees just the keys i + K - Q - left to i + K - Q + right, else None.

    The ends are aligned, as in flash-attn and xformers. -1: no limit; a dense layout is (-1, -1).
    """
    if "window_1d" not in layout.prepared:
        layout.prepared["window_1d"] = _window_1d(layout)
    return layout.prepared["window_1d"]


def need_window_1d(layout: BlockLayout | None, backend: str) -> tuple[int, int]:
    """The window of a layout, ValueError when it is none; (-1, -1) without a layout."""
    window = (NO_LIMIT, NO_LIMIT) if layout is None else window_1d(layout)
    if window is None:
        raise ValueError(
            f"backend={backend}: does one-dimensional windows, which this layout is not; block layouts are "
            "done by triton, flex and cpu"
        )
    return window


def _shortened(counts: Tensor, indices: Tensor) -> BlockLists:
    longest = int(counts.max())
    is_out = torch.arange(longest, device=counts.device) >= counts.unsqueeze(-1)
    ascending = indices[..., :longest].masked_fill(is_out, torch.iinfo(torch.int32).max).sort(-1).values
    return BlockLists(counts_BHR=counts, indices_BHRM=ascending.masked_fill(is_out, 0))


def _looked_at(layout: BlockLayout, lists: BlockLists, mask_mod: MaskMod) -> PartialBlocks:
    """Tiles of listed blocks, a row at a time."""
    device = lists.counts_BHR.device
    tile_ids = torch.zeros_like(lists.indices_BHRM)
    numbers: dict[bytes, int] = {}
    kept: list[Tensor] = []
    for batch, head, row in lists.counts_BHR.nonzero().tolist():
        columns = lists.indices_BHRM[batch, head, row, : int(lists.counts_BHR[batch, head, row])].long()
        query = torch.arange(layout.query_block, device=device) + row * layout.query_block
        key = columns.unsqueeze(1) * layout.key_block + torch.arange(layout.key_block, device=device)
        query, key = torch.broadcast_tensors(query.view(1, -1, 1), key.unsqueeze(1))
        seen = torch.vmap(mask_mod)(
            torch.full((key.numel(),), batch, device=device),
            torch.full((key.numel(),), head, device=device),
            query.clamp(max=layout.num_queries - 1).flatten(),
            key.clamp(max=layout.num_keys - 1).flatten(),
        )
        seen = seen.view(key.shape) & (key < layout.num_keys)
        for index, tile in enumerate(seen.cpu()):
            number = numbers.setdefault(tile.numpy().tobytes(), len(kept))
            if number == len(kept):
                kept.append(tile)
            tile_ids[batch, head, row, index] = number
    return PartialBlocks(lists=lists, tile_ids_BHRM=tile_ids, tiles_Nqk=torch.stack(kept).to(device))


def _window_1d(layout: BlockLayout) -> tuple[int, int] | None:
    if layout.key_lengths_BHC is not None or layout.key_log_weights_BHC is not None:
        return None
    first, last, count = _seen_ranges(layout)
    own = torch.arange(layout.num_queries, device=layout.device) + layout.num_keys - layout.num_queries
    end = layout.num_keys - 1
    is_any = count > 0
    # where the range ends before the keys do, the window is what ended it
    left, right = (own - first)[is_any & (first > 0)], (last - own)[is_any & (last < end)]
    to_left, to_right = _only(left), _only(right)
    if to_right == NO_LIMIT and not bool(is_any.all()):
        # more queries than keys: the first ones lie before all keys, and the window does not reach these
        to_right = _only((-own).expand_as(count)[~is_any].min().view(1) - 1)
    if to_left is None or to_right is None:
        return None
    far = layout.num_keys + layout.num_queries
    low = (own - (far if to_left == NO_LIMIT else to_left)).clamp(min=0)
    high = (own + (far if to_right == NO_LIMIT else to_right)).clamp(max=end)
    is_whole = torch.where(is_any, (first == low) & (last == high), True)
    is_whole &= count == (high - low + 1).clamp(min=0)
    return (to_left, to_right) if bool(is_whole.all()) else None


def _only(sides: Tensor) -> int | None:
    """The distance that all sides are, NO_LIMIT without any, None when they differ or are negative."""
    if not len(sides):
        return NO_LIMIT
    low, high = (int(end) for end in sides.aminmax())
    return low if low == high >= 0 else None


def _seen_ranges(layout: BlockLayout) -> tuple[Tensor, Tensor, Tensor]:
    """(First key, last key, number of keys) that each query sees, [B, H, Q] each."""
    key_block, num_rows = layout.key_block, layout.num_rows
    numbers, tiles = numbered_tiles(layout)
    first_Nq = tiles.to(torch.uint8).argmax(-1)
    last_Nq = key_block - 1 - tiles.flip(-1).to(torch.uint8).argmax(-1)
    count_Nq = tiles.sum(-1)
    starts = torch.arange(layout.num_key_blocks, device=layout.device).unsqueeze(1) * key_block
    ranges = []
    for row in range(num_rows):
        number = numbers[:, :, row]  # [B, H, C]
        count = count_Nq[number]
        unseen = count == 0
        first = (first_Nq[number] + starts).masked_fill(unseen, layout.num_keys).amin(2)
        last = (last_Nq[number] + starts).masked_fill(unseen, -1).amax(2)
        # the last block of keys, seen whole, goes on beyond them
        beyond = (last - (layout.num_keys - 1)).clamp(min=0)
        ranges.append(torch.stack((first, last - beyond, count.sum(2) - beyond)))
    first, last, count = torch.cat(ranges, -1)[..., : layout.num_queries]
    return first, last, count
