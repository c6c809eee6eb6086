"""Which keys each query sees, by blocks: the one mask type of the engine, never a dense mask.

Queries and keys are cut into blocks of fixed length, the last one ragged. A row is a block of queries; it
lists the key blocks that it sees whole (`full`) and those of which a tile of bits says the rest (`partial`).
The index lists are those of FlexAttention and FlashAttention 4, so that converting to them copies nothing.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

# B batch, H heads (each 1 where all are alike), R rows (blocks of queries), C blocks of keys,
# M longest list of a row, N tiles, Q queries, K keys


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class BlockLists:
    """Per row an ascending list of key blocks, in front of zeros that mean nothing."""

    counts_BHR: Tensor  # int32
    indices_BHRM: Tensor  # int32

    @classmethod
    def of_mask(cls, mask_BHRC: Tensor, longest: int | None = None) -> "BlockLists":
        """Lists of where a block mask is True. `longest`, if known, spares waiting for the device."""
        counts = mask_BHRC.sum(-1, dtype=torch.int32)
        if longest is None:
            longest = int(counts.max()) if counts.numel() else 0
        order = torch.argsort(mask_BHRC.logical_not().to(torch.uint8), dim=-1, stable=True)
        indices = order[..., :longest].to(torch.int32)
        is_listed = torch.arange(longest, device=counts.device) < counts.unsqueeze(-1)
        return cls(counts_BHR=counts, indices_BHRM=indices.masked_fill_(~is_listed, 0))

    def mask(self, num_blocks: int) -> Tensor:
        """[B, H, R, C] True where a block is listed."""
        return self.spread(torch.ones_like(self.indices_BHRM, dtype=torch.bool), num_blocks)

    def spread(self, values_BHRM: Tensor, num_blocks: int) -> Tensor:
        """[B, H, R, C] with each listed block's value at its place, zero elsewhere."""
        longest = self.indices_BHRM.shape[-1]
        is_listed = torch.arange(longest, device=self.counts_BHR.device) < self.counts_BHR.unsqueeze(-1)
        places = self.indices_BHRM.long().masked_fill(~is_listed, num_blocks)  # one more column, cut off
        spread = values_BHRM.new_zeros(*self.counts_BHR.shape, num_blocks + 1)
        return spread.scatter_(-1, places, values_BHRM)[..., :num_blocks]

    def to(self, device: torch.device | str) -> "BlockLists":
        """The same on a device."""
        return BlockLists(counts_BHR=self.counts_BHR.to(device), indices_BHRM=self.indices_BHRM.to(device))


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PartialBlocks:
    """Blocks that a row sees in part. Equal tiles are kept once."""

    lists: BlockLists
    tile_ids_BHRM: Tensor  # int32, beside lists.indices_BHRM
    tiles_Nqk: Tensor  # bool [N, query_block, key_block]: True where the query sees the key

    def to(self, device: torch.device | str) -> "PartialBlocks":
        """The same on a device."""
        return PartialBlocks(
            lists=self.lists.to(device),
            tile_ids_BHRM=self.tile_ids_BHRM.to(device),
            tiles_Nqk=self.tiles_Nqk.to(device),
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class BlockLayout:
    """See the module. Compared by identity: what backends prepare for a layout they keep in `prepared`."""

    num_queries: int
    num_keys: int
    query_block: int
    key_block: int
    full: BlockLists
    partial: PartialBlocks | None = None
    key_lengths_BHC: Tensor | None = None  # int32: so many keys of each block are there (ragged tiles)
    key_log_weights_BHC: Tensor | None = None  # fp32, added to a block's logits (LLSA: its level * ln B)
    may_see_more: bool = False  # a choice of what matters most: seeing every key is right as well
    prepared: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name in ("num_queries", "num_keys", "query_block", "key_block"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: need at least 1")
        if self.full.counts_BHR.shape[-1] != self.num_rows:
            raise ValueError(
                f"lists for {self.full.counts_BHR.shape[-1]} rows: {self.num_queries} queries in blocks of "
                f"{self.query_block} make {self.num_rows}"
            )

    @property
    def num_rows(self) -> int:
        return -(-self.num_queries // self.query_block)

    @property
    def num_key_blocks(self) -> int:
        return -(-self.num_keys // self.key_block)

    @property
    def device(self) -> torch.device:
        return self.full.counts_BHR.device

    @cached_property
    def lengths_BHC(self) -> Tensor:
        """Keys that are there in each block, int32 [B, H, C]."""
        if self.key_lengths_BHC is not None:
            return self.key_lengths_BHC
        starts = torch.arange(0, self.num_keys, self.key_block, device=self.device)
        return (self.num_keys - starts).clamp(max=self.key_block).to(torch.int32).view(1, 1, -1)

    def block_mask(self) -> Tensor:
        """[B, H, R, C] True for every block that a row sees, whole or in part."""
        mask = self.full.mask(self.num_key_blocks)
        return mask if self.partial is None else mask | self.partial.lists.mask(self.num_key_blocks)

    @cached_property
    def work(self) -> float:
        """Share of the blocks that are computed: what time is bounded by."""
        return self.block_mask().float().mean().item()

    @cached_property
    def density_BH(self) -> Tensor:
        """Share of all (query, key) pairs that are seen, per batch entry and head."""
        rows = torch.arange(0, self.num_queries, self.query_block, device=self.device)
        row_lengths = (self.num_queries - rows).clamp(max=self.query_block).float()
        keys_R = (self.full.mask(self.num_key_blocks) * self.lengths_BHC.unsqueeze(2)).sum(-1).float()
        pairs = (keys_R * row_lengths).sum(-1)
        if self.partial is not None:
            pairs = pairs + self._partial_pairs()
        return pairs / (self.num_queries * self.lengths_BHC.sum(-1))

    def _partial_pairs(self) -> Tensor:
        assert self.partial is not None
        tiles, lists = self.partial.tiles_Nqk, self.partial.lists
        if self.key_lengths_BHC is None and not (self.num_queries % self.query_block):
            # keys past the last are in no tile: constructors clear them
            seen_N = tiles.sum((1, 2)).float()
            listed = (
                torch.arange(lists.indices_BHRM.shape[-1], device=self.device) < lists.counts_BHR[..., None]
            )
            return (seen_N[self.partial.tile_ids_BHRM.long()] * listed).sum((-1, -2))
        mask = replace(self, full=_no_blocks(self.full), prepared={}).dense_mask()
        return mask.sum((-1, -2)).float()

    def dense_mask(self) -> Tensor:
        """[B, H, Q, K] True where a query sees a key: for tests and pictures, never for attention itself."""
        blocks = self.full.mask(self.num_key_blocks)
        tokens = blocks.repeat_interleave(self.query_block, 2).repeat_interleave(self.key_block, 3)
        if self.partial is not None:
            ids = self.partial.lists.spread(self.partial.tile_ids_BHRM.long() + 1, self.num_key_blocks)
            nothing = self.partial.tiles_Nqk.new_zeros(1, self.query_block, self.key_block)
            tiles = torch.cat((nothing, self.partial.tiles_Nqk))[ids]  # [B, H, R, C, q, k]
            tokens = tokens | tiles.permute(0, 1, 2, 4, 3, 5).flatten(4, 5).flatten(2, 3)
        place = torch.arange(self.num_key_blocks * self.key_block, device=self.device) % self.key_block
        is_there = place < self.lengths_BHC.repeat_interleave(self.key_block, -1)
        return (tokens & is_there.unsqueeze(2))[:, :, : self.num_queries, : self.num_keys]

    def to(self, device: torch.device | str) -> "BlockLayout":
        """The same on a device."""

        def moved(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device)

        return replace(
            self,
            full=self.full.to(device),
            partial=None if self.partial is None else self.partial.to(device),
            key_lengths_BHC=moved(self.key_lengths_BHC),
            key_log_weights_BHC=moved(self.key_log_weights_BHC),
            prepared={},
        )

    def on(self, device: torch.device) -> "BlockLayout":
        """The same on a device, copied there once."""
        if device == self.device:
            return self
        key = ("on", device)
        if key not in self.prepared:
            self.prepared[key] = self.to(device)
        return self.prepared[key]

    def check(self, batch: int, num_heads: int, num_queries: int, num_keys: int) -> None:
        """ValueError unless queries and keys of these sizes are what the layout is for."""
        if (num_queries, num_keys) != (self.num_queries, self.num_keys):
            raise ValueError(
                f"{num_queries} queries and {num_keys} keys: this layout needs "
                f"{(self.num_queries, self.num_keys)}"
            )
        optional = (self.key_lengths_BHC, self.key_log_weights_BHC)
        shapes = [self.full.counts_BHR.shape, *(tensor.shape for tensor in optional if tensor is not None)]
        if self.partial is not None:
            shapes.append(self.partial.lists.counts_BHR.shape)
        for shape in shapes:
            if shape[0] not in (1, batch) or shape[1] not in (1, num_heads):
                raise ValueError(
                    f"batch {batch} with {num_heads} heads: this layout is for batch {shape[0]} with "
                    f"{shape[1]} heads"
                )


def _no_blocks(lists: BlockLists) -> BlockLists:
    return BlockLists(counts_BHR=torch.zeros_like(lists.counts_BHR), indices_BHRM=lists.indices_BHRM[..., :0])


def from_block_mask(
    mask_BHRC: Tensor, *, num_queries: int, num_keys: int, query_block: int, key_block: int, **more: Any
) -> BlockLayout:
    """The layout of whole blocks where a block mask is True. `more` are further fields of BlockLayout."""
    layout = BlockLayout(
        num_queries=num_queries,
        num_keys=num_keys,
        query_block=query_block,
        key_block=key_block,
        full=BlockLists.of_mask(mask_BHRC),
        **more,
    )
    if mask_BHRC.shape[-1] != layout.num_key_blocks:
        raise ValueError(
            f"a mask of {mask_BHRC.shape[-1]} key blocks: {num_keys} keys in blocks of {key_block} make "
            f"{layout.num_key_blocks}"
        )
    return layout


def from_rule(
    sees: Callable[[Tensor, Tensor], Tensor],
    *,
    num_queries: int,
    num_keys: int,
    query_block: int,
    key_block: int,
    candidates_RC: Tensor | None = None,
) -> BlockLayout:
    """The layout of a rule for tokens: `sees(queries [q, 1], keys [1, k])` of token numbers is a mask [q, k].

    A row is looked at at a time, and only its candidates, where these are given. One layout for all heads.
    """
    num_rows, num_columns = -(-num_queries // query_block), -(-num_keys // key_block)
    full = torch.zeros(num_rows, num_columns, dtype=torch.bool)
    tile_id = torch.zeros(num_rows, num_columns, dtype=torch.int64)  # 0: no tile
    tiles: dict[bytes, int] = {}
    kept: list[Tensor] = []
    for row in range(num_rows):
        query = (
            torch.arange(row * query_block, (row + 1) * query_block).clamp(max=num_queries - 1).view(-1, 1)
        )
        columns = torch.arange(num_columns) if candidates_RC is None else candidates_RC[row].nonzero()[:, 0]
        if not len(columns):
            continue
        key = (columns.view(-1, 1) * key_block + torch.arange(key_block)).flatten().view(1, -1)
        is_there = key < num_keys
        seen = sees(query, key.clamp(max=num_keys - 1)) & is_there
        seen = seen.unflatten(1, (len(columns), key_block)).transpose(0, 1)  # [c, q, k]
        there = is_there.view(len(columns), 1, key_block)
        full[row, columns] = (seen | ~there).flatten(1).all(1)
        for place in (seen.flatten(1).any(1) & ~full[row, columns]).nonzero()[:, 0].tolist():
            tile = seen[place].contiguous()
            number = tiles.setdefault(tile.numpy().tobytes(), len(tiles) + 1)
            if number > len(kept):
                kept.append(tile)
            tile_id[row, columns[place]] = number
    partial = None
    if kept:
        lists = BlockLists.of_mask((tile_id > 0).view(1, 1, num_rows, num_columns))
        ids = tile_id.view(1, 1, num_rows, num_columns).gather(-1, lists.indices_BHRM.long()) - 1
        partial = PartialBlocks(
            lists=lists, tile_ids_BHRM=ids.clamp(min=0).to(torch.int32), tiles_Nqk=torch.stack(kept)
        )
    return BlockLayout(
        num_queries=num_queries,
        num_keys=num_keys,
        query_block=query_block,
        key_block=key_block,
        full=BlockLists.of_mask(full.view(1, 1, num_rows, num_columns)),
        partial=partial,
    )
