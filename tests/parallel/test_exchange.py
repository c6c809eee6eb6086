"""Laws of exchanges: everyone gets what the others sent, bit for bit, or an error says who is missing."""

import importlib.util
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vidgen.parallel.lanes.exchange import Exchange, in_process
from vidgen.parallel.transport import TransportError

SHORT_S = 0.2
DTYPES = [torch.float32, torch.bfloat16, torch.int64]


def _load() -> Any:
    spec = importlib.util.spec_from_file_location("together", Path(__file__).with_name("together.py"))
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


together = _load()


def among(ends: Sequence[Exchange], work: Callable[[Exchange], Any]) -> list[Any]:
    """What each member's work comes to, in threads; errors as results."""
    return together.on_each(len(ends), lambda index: work(ends[index]))


def numbers(shape: Sequence[int], *seeds: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """What a member sends to another: known to both sides of a test."""
    generator = torch.Generator().manual_seed(hash(seeds) % (1 << 31))
    return (torch.randn(*shape, generator=generator) * 100).to(dtype)


shapes = st.lists(st.integers(0, 4), min_size=1, max_size=3).map(tuple)


@st.composite
def tables(draw: st.DrawFn) -> list[list[tuple[int, ...]]]:
    """[from][to] shapes among 1 to 4 members, some of them empty."""
    size = draw(st.integers(1, 4))
    row = st.lists(shapes, min_size=size, max_size=size)
    return draw(st.lists(row, min_size=size, max_size=size))


@given(tables(), st.sampled_from(DTYPES), st.booleans())
@settings(max_examples=60)
def test_each_part_arrives_where_it_belongs_bit_for_bit(
    table: list[list[tuple[int, ...]]], dtype: torch.dtype, is_strided: bool
):
    size = len(table)

    def part(sender: int, taker: int) -> Tensor:
        whole = numbers(table[sender][taker], sender, taker, dtype=dtype)
        return whole.flip(0).transpose(0, -1).contiguous().transpose(0, -1).flip(0) if is_strided else whole

    def work(end: Exchange) -> list[Tensor]:
        own = [part(end.index, taker) for taker in range(size)]
        received = end.swap(own, [table[sender][end.index] for sender in range(size)])
        assert received[end.index] is own[end.index]
        return received

    ends = in_process(range(size), timeout_s=10)
    for taker, received in enumerate(among(ends, work)):
        for sender, found in enumerate(received):
            assert torch.equal(found, part(sender, taker))
    for end in ends:
        sent = [math.prod(shape) for taker, shape in enumerate(table[end.index]) if taker != end.index]
        assert end.bytes_sent == sum(sent) * dtype.itemsize


@given(tables())
@settings(max_examples=30)
def test_groups_of_tensors_travel_as_one_message(table: list[list[tuple[int, ...]]]):
    size = len(table)

    def group(sender: int, taker: int) -> list[Tensor]:
        return [numbers((*table[sender][taker], more), sender, taker, more) for more in (1, 3, 2)]

    def work(end: Exchange) -> list[list[Tensor]]:
        own = [group(end.index, taker) for taker in range(size)]
        wanted = [[each.shape for each in group(sender, end.index)] for sender in range(size)]
        return end.swap_groups(own, wanted)

    for taker, received in enumerate(among(in_process(range(size), timeout_s=10), work)):
        for sender, found in enumerate(received):
            for got, sent in zip(found, group(sender, taker), strict=True):
                assert torch.equal(got, sent)


@given(st.lists(shapes, min_size=1, max_size=5))
@settings(max_examples=30)
def test_all_that_is_gathered_is_the_same_everywhere(held: list[tuple[int, ...]]):
    def work(end: Exchange) -> list[Tensor]:
        return end.gather(numbers(held[end.index], end.index), held)

    for received in among(in_process(range(len(held)), timeout_s=10), work):
        for sender, found in enumerate(received):
            assert torch.equal(found, numbers(held[sender], sender))


@given(st.lists(shapes, min_size=1, max_size=5), st.integers(0, 2))
@settings(max_examples=30)
def test_round_the_ring_each_sees_what_all_hold_and_then_its_own_again(
    held: list[tuple[int, ...]], slow: int
):
    size = len(held)

    def work(end: Exchange) -> list[Tensor]:
        seen = [numbers(held[end.index], end.index)]
        for turn in range(1, size + 1):
            taken = end.turn(seen[-1], held[(end.index - turn) % size])
            if end.index == slow:
                time.sleep(0.001)
            seen.append(taken())
        return seen

    for index, seen in enumerate(among(in_process(range(size), timeout_s=10), work)):
        for turn, found in enumerate(seen):
            assert torch.equal(found, numbers(held[(index - turn) % size], (index - turn) % size))


def test_a_hand_over_round_the_ring_does_not_wait_for_who_takes_it():
    first, second = in_process((0, 1), timeout_s=10)
    start = time.monotonic()
    taken = first.turn(torch.ones(3), (3,))
    assert time.monotonic() - start < 5
    assert torch.equal(second.turn(torch.zeros(3), (3,))(), torch.ones(3))
    assert torch.equal(taken(), torch.zeros(3))


def test_what_is_sent_is_what_it_was_at_the_call():
    first, second = in_process((0, 1), timeout_s=10)
    sent = torch.ones(3)
    taken = first.turn(sent, (3,))
    sent.zero_()
    assert torch.equal(second.turn(torch.zeros(3), (3,))(), torch.ones(3))
    taken()


def swap(end: Exchange) -> Any:
    return end.swap([torch.ones(2)] * end.size, [(2,)] * end.size)


def gather(end: Exchange) -> Any:
    return end.gather(torch.ones(2), [(2,)] * end.size)


def turns(end: Exchange) -> Any:
    taken = torch.ones(2)
    for _ in range(end.size - 1):
        taken = end.turn(taken, (2,))()
    return taken


@pytest.mark.parametrize("collective", [swap, gather, turns], ids=["swap", "gather", "turn"])
def test_a_member_that_does_not_come_is_named_by_its_rank_before_long(collective: Callable[..., Any]):
    ranks = (4, 7, 9)
    ends = in_process(ranks, timeout_s=SHORT_S)
    start = time.monotonic()
    absent, *others = among(ends, lambda end: None if end.index == 1 else collective(end))
    assert time.monotonic() - start < 5
    errors = [absent, others[1]]
    # by the ring, who waits for one that waits for the missing one names that
    blamed = {7} if collective is not turns else {4, 7, 9}
    assert all(isinstance(error, TransportError) and error.peer in blamed for error in errors)
    assert isinstance(others[1], TransportError)
    assert str(others[1]).startswith("rank 9: rank 7 sent nothing for 0.2 s")
