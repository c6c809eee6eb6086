"""Attention round a ring: to all keys, where each member holds some of them.

Source: ring attention (arXiv 2310.01889). A member keeps its queries and attends to what it holds while that
travels on to the next; the parts are merged by their log-sum-exps, in the order of the members, so that a
query's result does not depend on who holds it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from vidgen.kernels.attention.api import attention
from vidgen.kernels.attention.cut import cut
from vidgen.kernels.attention.layout import BlockLayout
from vidgen.kernels.attention.merge import merge
from vidgen.parallel.lanes.exchange import Exchange
from vidgen.parallel.lanes.runs import runs_of
from vidgen.parallel.lanes.splits import SCHEME, Held, move

# B batch, F frames, S tokens of a frame, Q queries, K keys at hand, H heads, D head dimension


def attend_dense(
    ring: Exchange, query_BFSHD: Tensor, key_BFSHD: Tensor, value_BFSHD: Tensor, tokens: Sequence[range]
) -> Tensor:
    """Attention [B, F, S, H, D] of the queries at hand to every key; members hold `tokens` of each frame."""
    query, key, value = (tensor.flatten(1, 2) for tensor in (query_BFSHD, key_BFSHD, value_BFSHD))
    keys_held = [key_BFSHD.shape[1] * len(part) for part in tokens]
    return _attend(ring, query, key, value, keys_held).view(query_BFSHD.shape)


def attend_blocks(
    ring: Exchange,
    query_BFSHD: Tensor,
    key_BFSHD: Tensor,
    value_BFSHD: Tensor,
    tokens: Sequence[range],
    layout: BlockLayout,
) -> Tensor:
    """The same [B, F, S, H, D] under a layout of all queries and keys.

    A member's queries and keys are all over the layout's blocks. So tokens go to who gets their blocks, and
    each member sees by the layout cut to its rows and to the key blocks that have come round.
    """
    num_queries, num_keys = (tensor.shape[1] * tokens[-1].stop for tensor in (query_BFSHD, key_BFSHD))
    assert (layout.num_queries, layout.num_keys) == (num_queries, num_keys), "the layout is of all tokens"
    query_runs, key_runs = (
        runs_of(ring.index, tuple(tokens), tensor.shape[1], *blocks, tensor.device)
        for tensor, *blocks in (
            (query_BFSHD, layout.num_rows, layout.query_block),
            (key_BFSHD, layout.num_key_blocks, layout.key_block),
        )
    )
    to_blocks, from_blocks = SCHEME["to blocks"], SCHEME["from blocks"]
    (query,) = move(to_blocks, ring, [query_BFSHD], Held(tokens=tokens, runs=query_runs))
    key, value = move(to_blocks, ring, [key_BFSHD, value_BFSHD], Held(tokens=tokens, runs=key_runs))
    rows = query_runs.blocks[ring.index]
    layouts = [cut(layout, rows, part) if rows and part else None for part in key_runs.blocks]
    out = _attend(ring, query, key, value, key_runs.lengths, layouts)
    return move(from_blocks, ring, [out], Held(tokens=tokens, runs=query_runs))[0]


def _attend(
    ring: Exchange,
    query_BQHD: Tensor,
    key_BKHD: Tensor,
    value_BKHD: Tensor,
    keys_held: Sequence[int],
    layouts: Sequence[BlockLayout | None] | None = None,
) -> Tensor:
    """Attention [B, Q, H, D] to the keys of all members, who hold so many each.

    `layouts`: what the queries at hand see of each member's keys.
    """
    batch, _, *head = key_BKHD.shape
    held_2BKHD = torch.stack((key_BKHD, value_BKHD))
    found: dict[int, tuple[Tensor, Tensor]] = {}
    for turn in range(ring.size):
        member = (ring.index - turn) % ring.size
        taken = None
        if turn < ring.size - 1:
            taken = ring.turn(held_2BKHD, (2, batch, keys_held[(member - 1) % ring.size], *head))
        layout = layouts[member] if layouts else None
        if query_BQHD.numel() and keys_held[member] and (layout is None or _sees_any(layout)):
            found[member] = attention(query_BQHD, *held_2BKHD, layout=layout, return_lse=True)
        if taken is not None:
            held_2BKHD = taken()
    if not found:
        return torch.zeros_like(query_BQHD)
    return merge([found[member] for member in sorted(found)])[0]


def _sees_any(layout: BlockLayout) -> bool:
    """Whether any query sees a key: told from how long the lists are, without waiting for the device."""
    lists = [layout.full] if layout.partial is None else [layout.full, layout.partial.lists]
    return any(each.indices_BHRM.shape[-1] for each in lists)
