"""Parts of a layout: a run of its rows and of its key blocks, or some of its heads."""

from dataclasses import replace

import torch
from torch import Tensor

from vidgen.kernels.attention.layout import BlockLayout, BlockLists, PartialBlocks

# B batch, H heads, R rows (blocks of queries), C blocks of keys, M longest list of a row


def cut(layout: BlockLayout, rows: range, key_blocks: range) -> BlockLayout:
    """What the queries of these rows see of the keys in these blocks, both consecutive.

    The layout of those queries and keys alone; attention to all keys is `merge` of that to every part of
    them. Made once for a layout, and kept with it. ValueError when either has none.
    """
    for name, wanted, there in (
        ("rows", rows, layout.num_rows),
        ("key_blocks", key_blocks, layout.num_key_blocks),
    ):
        if not 0 <= wanted.start < wanted.stop <= there or wanted.step != 1:
            raise ValueError(f"{name}={wanted}: need at least one of the {there} there are, consecutive")
    key = ("cut", rows, key_blocks)
    if key not in layout.prepared:
        layout.prepared[key] = _cut(layout, rows, key_blocks)
    return layout.prepared[key]


def heads(layout: BlockLayout, of: range) -> BlockLayout:
    """What these heads see; the layout itself where all heads are alike. Kept with the layout."""
    key = ("heads", of)
    if key not in layout.prepared:
        layout.prepared[key] = _heads(layout, of)
    return layout.prepared[key]


def tokens_of(blocks: range, block: int, num_tokens: int) -> range:
    """The tokens in consecutive blocks, of which the last of all may be ragged."""
    return range(min(blocks.start * block, num_tokens), min(blocks.stop * block, num_tokens))


def _cut(layout: BlockLayout, rows: range, key_blocks: range) -> BlockLayout:
    def columns(tensor_BHC: Tensor | None) -> Tensor | None:
        return None if tensor_BHC is None else tensor_BHC[..., key_blocks.start : key_blocks.stop]

    full, _ = _shortened(layout.full, None, rows, key_blocks)
    partial = None
    if layout.partial is not None:
        lists, tile_ids = _shortened(layout.partial.lists, layout.partial.tile_ids_BHRM, rows, key_blocks)
        if lists.indices_BHRM.shape[-1]:
            assert tile_ids is not None
            partial = PartialBlocks(lists=lists, tile_ids_BHRM=tile_ids, tiles_Nqk=layout.partial.tiles_Nqk)
    return replace(
        layout,
        num_queries=len(tokens_of(rows, layout.query_block, layout.num_queries)),
        num_keys=len(tokens_of(key_blocks, layout.key_block, layout.num_keys)),
        full=full,
        partial=partial,
        key_lengths_BHC=columns(layout.key_lengths_BHC),
        key_log_weights_BHC=columns(layout.key_log_weights_BHC),
        prepared={},
    )


def _shortened(
    lists: BlockLists, beside_BHRM: Tensor | None, rows: range, key_blocks: range
) -> tuple[BlockLists, Tensor | None]:
    """Lists of these rows with the blocks in the range, counted from its start; what lies beside them too."""
    here = slice(rows.start, rows.stop)
    counts, indices = lists.counts_BHR[..., here], lists.indices_BHRM[..., here, :]
    is_listed = torch.arange(indices.shape[-1], device=counts.device) < counts.unsqueeze(-1)
    # lists ascend: what is in the range is a run behind what lies before it
    num_before = (is_listed & (indices < key_blocks.start)).sum(-1, dtype=torch.int32)
    counts = (is_listed & (indices < key_blocks.stop)).sum(-1, dtype=torch.int32) - num_before
    places = torch.arange(int(counts.max()), device=counts.device).expand(*counts.shape, -1)
    is_out = places >= counts.unsqueeze(-1)
    places = (places + num_before.unsqueeze(-1)).masked_fill(is_out, 0).long()
    kept = (indices.gather(-1, places) - key_blocks.start).masked_fill(is_out, 0)
    beside = None if beside_BHRM is None else beside_BHRM[..., here, :].gather(-1, places)
    return BlockLists(counts_BHR=counts, indices_BHRM=kept), beside


def _heads(layout: BlockLayout, of: range) -> BlockLayout:
    def some(tensor: Tensor) -> Tensor:
        return tensor if tensor.shape[1] == 1 else tensor[:, of.start : of.stop]

    def of_lists(lists: BlockLists) -> BlockLists:
        return BlockLists(counts_BHR=some(lists.counts_BHR), indices_BHRM=some(lists.indices_BHRM))

    lengths, weights, partial = layout.key_lengths_BHC, layout.key_log_weights_BHC, layout.partial
    tensors = [layout.full.counts_BHR, lengths, weights, partial and partial.lists.counts_BHR]
    if all(tensor is None or tensor.shape[1] == 1 for tensor in tensors):
        return layout
    if partial is not None:
        partial = replace(partial, lists=of_lists(partial.lists), tile_ids_BHRM=some(partial.tile_ids_BHRM))
    return replace(
        layout,
        full=of_lists(layout.full),
        partial=partial,
        key_lengths_BHC=None if lengths is None else some(lengths),
        key_log_weights_BHC=None if weights is None else some(weights),
        prepared={},
    )
