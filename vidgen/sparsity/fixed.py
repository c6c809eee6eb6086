"""Layouts that depend on the place alone: sliding tiles, radial, local windows. Nothing is searched for."""

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from vidgen.kernels.attention.layout import BlockLayout, from_block_mask
from vidgen.kernels.attention.tiles import sliding_tile, tile_order
from vidgen.kernels.attention.windows import local, radial
from vidgen.sparsity.choice import Choice
from vidgen.sparsity.policy import Place, State
from vidgen.sparsity.scheduled import Chosen
from vidgen.sparsity.settings import SparsitySettings, Triple

# H heads, P places in tile order (tiles times tokens of a tile), R rows of tiles, C tiles of keys


@dataclass(frozen=True, kw_only=True, slots=True)
class Fixed:
    """See the module."""

    settings: SparsitySettings

    @property
    def searches(self) -> bool:
        return False

    @property
    def needs_lse(self) -> bool:
        return False

    def choose(self, query_BQHD: Tensor, key_BKHD: Tensor, place: Place, state: State) -> Chosen:
        """The choice for a place, made once."""
        where = replace(place, layer=0, num_layers=1, step=0, num_steps=1)
        return Chosen(choice=_choice(self.settings, where, query_BQHD.device))


@lru_cache(maxsize=64)
def _choice(settings: SparsitySettings, place: Place, device: torch.device) -> Choice:
    if settings.policy == "sliding_tile":
        return _tiles(settings, place, device)
    tokens: dict[str, Any] = {
        "grid": place.grid,
        "key_frames": place.key_frames,
        "frame_offset": place.frames_before,
        "text_tokens": place.text_tokens,
        "query_block": settings.blocks[0],
        "key_block": settings.blocks[1],
    }
    if settings.policy == "radial":
        layout = radial(**tokens)
    else:
        assert settings.policy == "local"
        layout = local(radius=settings.radius, frame_radius=settings.frame_radius, **tokens)
    if settings.restore and layout.may_see_more:  # what is restored is what this very layout leaves out
        layout = replace(layout, may_see_more=False, prepared={})
    return Choice(layout=layout.on(device))


def _tiles(settings: SparsitySettings, place: Place, device: torch.device) -> Choice:
    """Sliding tiles among the keys of all frames, see `_tile_layout`."""
    tile = _tile(settings.tile, place.grid)
    parts = [frames for frames in (place.frames_before, place.grid[0], place.frames_after) if frames]
    key_order, _ = _order(parts, place, tile)
    query_order, query_places = _order([place.grid[0]], place, tile)
    return Choice(
        layout=_tile_layout(settings.windows, tile, parts, place).on(device),
        query_order_BHP=query_order.view(1, 1, -1).to(device),
        key_order_BHP=key_order.view(1, 1, -1).to(device),
        query_places_BHQ=query_places.view(1, 1, -1).to(device),
    )


def _tile(wanted: Triple, grid: Triple) -> Triple:
    """No larger than the grid, and as many along the frames, of equal lengths if that can be."""
    num_layers = -(-grid[0] // wanted[0])
    return -(-grid[0] // num_layers), min(wanted[1], grid[1]), min(wanted[2], grid[2])


def _tile_layout(windows: tuple[Triple, ...], tile: Triple, parts: list[int], place: Place) -> BlockLayout:
    """Of whole tiles.

    Frames before, the queries' own and those after are cut into tiles each by themselves, so that the
    queries' tiles are tiles of the keys; a window slides, and keeps off the ends, along all of them. Text
    follows in tiles of its own, which see all and are seen by all.
    """
    _, rows, columns = place.grid
    layers = sum(-(-frames // tile[0]) for frames in parts)
    whole = sliding_tile(grid=(layers * tile[0], rows, columns), tile=tile, window=windows)
    layers_before, layers_own = (-(-frames // tile[0]) for frames in (place.frames_before, place.grid[0]))
    per_layer = whole.num_rows // layers
    mask = whole.block_mask()[:, :, layers_before * per_layer : (layers_before + layers_own) * per_layer]
    slot = whole.key_block
    num_text_tiles = -(-place.text_tokens // slot)
    mask = torch.nn.functional.pad(mask, (0, num_text_tiles, 0, num_text_tiles), value=True)
    each = [sliding_tile(grid=(frames, rows, columns), tile=tile, window=(1, 1, 1)) for frames in parts]
    text_lengths = (place.text_tokens - slot * torch.arange(num_text_tiles)).clamp(max=slot)
    lengths = torch.cat((*(layout.lengths_BHC[0, 0] for layout in each), text_lengths.to(torch.int32)))
    return from_block_mask(
        mask,
        num_queries=mask.shape[2] * slot,
        num_keys=mask.shape[3] * slot,
        query_block=slot,
        key_block=slot,
        key_lengths_BHC=None if bool((lengths == slot).all()) else lengths.view(1, 1, -1),
    )


def _order(parts: list[int], place: Place, tile: Triple) -> tuple[Tensor, Tensor]:
    """(Which token is at each place [P], at which place each token is), of runs of frames, then text."""
    slot = tile[0] * tile[1] * tile[2]
    orders, places, num_tokens, num_places = [], [], 0, 0
    for frames in parts:
        to_tiles, from_tiles = tile_order((frames, *place.grid[1:]), tile)
        orders.append(to_tiles + num_tokens)
        places.append(from_tiles + num_places)
        num_tokens, num_places = num_tokens + len(from_tiles), num_places + len(to_tiles)
    text = torch.arange(-(-place.text_tokens // slot) * slot)
    orders.append(text.clamp(max=max(place.text_tokens - 1, 0)) + num_tokens)
    places.append(torch.arange(place.text_tokens) + num_places)
    return torch.cat(orders), torch.cat(places)
