"""Ranks that are threads of one test, and what they hold. Loaded by path: a test folder is not on it."""

import threading
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from vidgen.kernels.attention.api import attention
from vidgen.kernels.attention.layout import BlockLayout
from vidgen.parallel.lanes.exchange import Exchange, in_process
from vidgen.parallel.lanes.sequence import SplitSequence
from vidgen.parallel.topology import Lanes

LIMIT_S = 10.0
Case = tuple[Tensor, Tensor, Tensor]  # queries, keys and values [B, F, S, H, D]


def on_each(num_ranks: int, work: Callable[[int], Any]) -> list[Any]:
    """What each rank's work comes to, in threads; errors as results."""
    results: list[Any] = [None] * num_ranks

    def run(rank: int) -> None:
        try:
            results[rank] = work(rank)
        except BaseException as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(num_ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * LIMIT_S)
    assert not any(thread.is_alive() for thread in threads), "a wait without a deadline"
    return results


def right(results: list[Any]) -> list[Any]:
    """The results, unless one is an error."""
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


def split(lanes: Lanes, tokens_per_frame: int, timeout_s: float = LIMIT_S) -> list[SplitSequence]:
    """Every lane's part, between threads."""
    ends: dict[tuple[str, int], Exchange] = {}
    for axis in ("ring", "ulysses"):
        for lane in range(lanes.num_lanes):
            peers = lanes.peers(lane, axis)
            if lane == peers[0]:
                for peer, end in zip(peers, in_process(peers, timeout_s=timeout_s), strict=True):
                    ends[axis, peer] = end
    return [
        SplitSequence(tokens_per_frame, ends["ulysses", lane], ends["ring", lane])
        for lane in range(lanes.num_lanes)
    ]


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def drawn_case(*shape: int) -> Case:
    """Queries, keys and values of as many frames."""
    return drawn(0, *shape), drawn(1, *shape), drawn(2, *shape)


sizes = st.fixed_dictionaries(
    {
        "batch": st.integers(1, 2), "frames": st.integers(1, 3), "more": st.integers(0, 2),
        "tokens": st.integers(1, 9), "heads": st.integers(1, 5), "width": st.sampled_from([4, 8]),
        "seed": st.integers(0, 1 << 16),
    }
)  # fmt: skip
lane_counts = st.sampled_from([(1, 2), (1, 3), (1, 4), (2, 1), (3, 1), (4, 1), (2, 2), (3, 2), (2, 3)])


def tensors(size: dict[str, int]) -> Case:
    """Queries and more frames of keys and values [B, F, S, H, D]."""
    tail = size["tokens"], size["heads"], size["width"]
    query = drawn(size["seed"], size["batch"], size["frames"], *tail)
    key, value = (
        drawn(size["seed"] + n, size["batch"], size["frames"] + size["more"], *tail) for n in (1, 2)
    )
    return query, key, value


def whole(
    query_BFSHD: Tensor, key_BFSHD: Tensor, value_BFSHD: Tensor, layout: BlockLayout | None = None
) -> Tensor:
    """What one process makes of them."""
    flat = [tensor.flatten(1, 2) for tensor in (query_BFSHD, key_BFSHD, value_BFSHD)]
    return attention(flat[0], flat[1], flat[2], layout=layout).view(query_BFSHD.shape)


def attended(
    lanes: Lanes, query_BFSHD: Tensor, key_BFSHD: Tensor, value_BFSHD: Tensor, attend: Any = attention,
    **options: Any,
) -> Tensor:  # fmt: skip
    """Attention [B, F, S, H, D] by lanes that each have their part of the tokens alone."""
    batch, frames, tokens, num_heads, _ = query_BFSHD.shape
    split_parts = split(lanes, tokens)

    def work(lane: int) -> Tensor:
        part = split_parts[lane]
        around = part.around(attend, key_BFSHD.shape[1], query_frames=frames, **options)
        mine = [tensor[:, :, part.tokens].flatten(1, 2) for tensor in (query_BFSHD, key_BFSHD, value_BFSHD)]
        out = around(mine[0], mine[1], mine[2])
        return out.view(batch, frames, -1 if out.numel() else 0, num_heads, query_BFSHD.shape[-1])

    return torch.cat(right(on_each(lanes.num_lanes, work)), dim=2)


def close(found: Tensor, wanted: Tensor) -> None:
    error = (found.double() - wanted.double()).norm() / wanted.double().norm().clamp(min=1e-30)
    assert error <= 1e-5, f"relative error {error}"
