"""Layouts from geometry: tokens of a (frames, rows, columns) grid in row-major order, text after them.

Keys lie on the same grid over `key_frames` frames; query frame 0 is key frame `frame_offset`. Text tokens, as
many among the queries as among the keys, see everything and are seen by all. Equal arguments give the same
layout, so that what backends prepare for it is made once. Layouts are on the CPU.
"""

import math
from functools import lru_cache

import torch
from torch import Tensor

from vidgen.kernels.attention.grid import Grid, Reach, Tokens, check_blocks
from vidgen.kernels.attention.layout import BlockLayout, BlockLists, PartialBlocks, from_block_mask, from_rule

# R rows (blocks of queries), C blocks of keys, S tokens of a frame, q and k tokens of a query and a key block


def dense(num_queries: int, num_keys: int, query_block: int = 128, key_block: int = 128) -> BlockLayout:
    """The layout in which every query sees every key."""
    return _dense(num_queries, num_keys, query_block, key_block)


def sliding_window_3d(
    *,
    grid: Grid,
    radius: tuple[int | None, int | None, int | None],
    key_frames: int | None = None,
    frame_offset: int = 0,
    query_block: int | None = None,
    key_block: int | None = None,
    text_tokens: int = 0,
) -> BlockLayout:
    """The layout in which a query sees the keys at most `radius` away along each axis.

    A radius of None does not limit its axis. Blocks are one frame unless said: a single tile then serves all.
    """
    if any(limit is not None and limit < 0 for limit in radius):
        raise ValueError(f"radius={radius}: need 0 or more along each axis, or None for no limit")
    frames, rows, columns = radius
    tokens = Tokens.of(grid, key_frames, frame_offset, text_tokens, query_block, key_block)
    return _within(tokens, Reach(frames=frames, rows=rows, columns=columns))


def local(
    *,
    grid: Grid,
    radius: float,
    frame_radius: int | None = None,
    key_frames: int | None = None,
    frame_offset: int = 0,
    query_block: int | None = None,
    key_block: int | None = None,
    text_tokens: int = 0,
) -> BlockLayout:
    """The layout in which a query sees a disc: (row, column) at most `radius` away by Euclidean distance.

    `frame_radius` limits the frames as well. Blocks are one frame unless said. Source: CLEAR (2412.16112).
    """
    if radius < 0 or (frame_radius is not None and frame_radius < 0):
        raise ValueError(f"radius={radius}, frame_radius={frame_radius}: need 0 or more")
    squared = math.floor(radius * radius + 1e-9)  # sqrt(13) squared is below 13
    tokens = Tokens.of(grid, key_frames, frame_offset, text_tokens, query_block, key_block)
    return _within(tokens, Reach(frames=frame_radius, squared=squared))


def radial(
    *,
    grid: Grid,
    key_frames: int | None = None,
    frame_offset: int = 0,
    query_block: int = 128,
    key_block: int = 128,
    first_frame_sink: bool = True,
    text_tokens: int = 0,
) -> BlockLayout:
    """The layout of Radial attention (arXiv 2506.19852): a band within frames, narrower if they are far.

    With S tokens a frame and r = floor(log2(distance of frames)), a query sees keys less than S / 2^r tokens
    from its own place in the frame; where that is under one token, only its own place, in one frame of
    ceil(2^r / S). All see the first key frame, unless said. As in the paper, a block is seen whole if any
    of its pairs is.
    """
    tokens = Tokens.of(grid, key_frames, frame_offset, text_tokens, query_block, key_block)
    return _radial(tokens, first_frame_sink)


@lru_cache(maxsize=64)
def _dense(num_queries: int, num_keys: int, query_block: int, key_block: int) -> BlockLayout:
    check_blocks(query_block, key_block)
    mask = torch.ones(1, 1, -(-num_queries // query_block), -(-num_keys // key_block), dtype=torch.bool)
    return from_block_mask(
        mask, num_queries=num_queries, num_keys=num_keys, query_block=query_block, key_block=key_block
    )


@lru_cache(maxsize=64)
def _within(tokens: Tokens, reach: Reach) -> BlockLayout:
    if tokens.query_block == tokens.key_block == tokens.per_frame:
        return _within_by_frames(tokens, reach)

    # looked up, not computed: 4 s and not 12 for 32,760 tokens without a limit of frames (one contended core)
    tile_SS = _within_a_frame(tokens, reach)

    def sees(query: Tensor, key: Tensor) -> Tensor:
        seen = tile_SS[query[:, 0] % tokens.per_frame].index_select(1, key[0] % tokens.per_frame)
        if reach.frames is not None:
            query_frame = query // tokens.per_frame + tokens.frame_offset
            seen &= (query_frame - key // tokens.per_frame).abs() <= reach.frames
        return seen | (query >= tokens.video_queries) | (key >= tokens.video_keys) if tokens.text else seen

    query_bounds = _bounds(tokens, tokens.video_queries, tokens.query_block, tokens.frame_offset)
    key_bounds = _bounds(tokens, tokens.video_keys, tokens.key_block, 0)
    gaps = (
        torch.maximum(key_low - query_high.unsqueeze(1), query_low.unsqueeze(1) - key_high).clamp(min=0)
        for (query_low, query_high), (key_low, key_high) in zip(query_bounds, key_bounds, strict=True)
    )
    candidates = tokens.text_blocks_RC() | reach.all(*gaps)
    return from_rule(sees, **tokens.sizes, candidates_RC=candidates)


def _bounds(tokens: Tokens, num_tokens: int, block: int, frame_offset: int) -> list[tuple[Tensor, Tensor]]:
    """Per axis the lowest and the highest place in each block (of a block of text alone, any)."""
    first = torch.arange(0, num_tokens + tokens.text, block).clamp(max=num_tokens - 1)
    last = (torch.arange(0, num_tokens + tokens.text, block) + block).clamp(max=num_tokens) - 1
    lows, highs = tokens.places(first, frame_offset), tokens.places(last, frame_offset)
    # a block that goes on in the next frame (or row) can have any row (or column)
    one_frame = lows[0] == highs[0]
    one_row = one_frame & (lows[1] == highs[1])
    is_known = (torch.ones_like(one_frame), one_frame, one_row)
    return [
        (torch.where(known, low, 0), torch.where(known, high, size - 1))
        for known, low, high, size in zip(is_known, lows, highs, (0, *tokens.grid[1:]), strict=True)
    ]


def _within_a_frame(tokens: Tokens, reach: Reach) -> Tensor:
    """[S, S] True where a token of one frame sees a token of another that is within reach."""
    _, row, column = tokens.places(torch.arange(tokens.per_frame))
    return reach.in_frame((row.unsqueeze(1) - row).abs(), (column.unsqueeze(1) - column).abs())


def _within_by_frames(tokens: Tokens, reach: Reach) -> BlockLayout:
    """As from_rule finds it, from one tile instead of all pairs of tokens."""
    tile_SS = _within_a_frame(tokens, reach)
    has_text = tokens.text_blocks_RC()
    query_frame = torch.arange(len(has_text)).unsqueeze(1) + tokens.frame_offset
    frame_gap = (query_frame - torch.arange(has_text.shape[1])).abs()
    near = ~has_text if reach.frames is None else ~has_text & (frame_gap <= reach.frames)
    if tile_SS.all():
        return from_block_mask((near | has_text).view(1, 1, *near.shape), **tokens.sizes)
    lists = BlockLists.of_mask(near.view(1, 1, *near.shape))
    return BlockLayout(
        **tokens.sizes,
        full=BlockLists.of_mask(has_text.view(1, 1, *near.shape)),
        partial=PartialBlocks(
            lists=lists,
            tile_ids_BHRM=torch.zeros_like(lists.indices_BHRM),
            tiles_Nqk=tile_SS.unsqueeze(0),
        ),
    )


@lru_cache(maxsize=64)
def _radial(tokens: Tokens, first_frame_sink: bool) -> BlockLayout:
    query_block, query_frame, query_low, query_high = _pieces(tokens, tokens.grid[0], tokens.query_block)
    key_block, key_frame, key_low, key_high = _pieces(tokens, tokens.key_frames, tokens.key_block)
    frame_gap = (query_frame.unsqueeze(1) + tokens.frame_offset - key_frame).abs()
    shrink = 2 ** frame_gap.clamp(min=1).double().log2().floor().long()
    place_gap = torch.maximum(key_low - query_high.unsqueeze(1), query_low.unsqueeze(1) - key_high).clamp(
        min=0
    )
    near = (place_gap + 1) * shrink <= tokens.per_frame
    every = -(-shrink // tokens.per_frame)
    far = (shrink > tokens.per_frame) & (place_gap == 0) & (frame_gap % every == 0)
    kept = near | far
    if first_frame_sink:
        kept |= key_frame == 0
    mask = tokens.text_blocks_RC()
    rows, columns = kept.nonzero(as_tuple=True)
    mask[query_block[rows], key_block[columns]] = True
    return from_block_mask(mask.view(1, 1, *mask.shape), **tokens.sizes, may_see_more=True)


def _pieces(tokens: Tokens, num_frames: int, block: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(Block, frame, first place, last place) of the runs of tokens of one block in one frame."""
    num_tokens = num_frames * tokens.per_frame
    starts = torch.cat(
        (torch.arange(0, num_tokens, block), torch.arange(0, num_tokens, tokens.per_frame))
    ).unique()
    ends = torch.cat((starts[1:], torch.tensor([num_tokens]))) - 1
    return starts // block, starts // tokens.per_frame, starts % tokens.per_frame, ends % tokens.per_frame
