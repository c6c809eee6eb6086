"""Laws of messages and links: what is sent arrives as it was, in order, or an error says whom to blame."""

import math
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from vidgen.parallel.transport import (
    ALIGNMENT_BYTES,
    HEADER_BYTES,
    Header,
    InProcessLink,
    Kind,
    MessageLayout,
    TransportError,
    write_message,
)

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHORT_S = 0.1
LAYOUT = MessageLayout((7, 3), torch.float32)


def draw(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Random numbers, with a NaN and an infinity at the front where there is room."""
    numbers = torch.randn(math.prod(shape), generator=torch.Generator().manual_seed(seed))
    numbers[:2] = torch.tensor([math.nan, -math.inf])[: len(numbers)]
    return numbers.to(dtype).view(shape)


def bits(tensor: Tensor) -> list[int]:
    """The tensor's bytes: a NaN equals itself, and -0.0 is not 0.0."""
    return tensor.contiguous().view(-1).view(torch.uint8).tolist()


def work(number: int) -> Header:
    return Header(Kind.WORK, tick=number, block=number % 3, step=number // 3, run=number % 2, slot=number + 1)


def parts_of(number: int) -> tuple[Tensor, Tensor]:
    return torch.full((7,), float(number)), torch.full((3, 1), -float(number))


@st.composite
def messages(draw_from: st.DrawFn) -> tuple[torch.dtype, list[int], list[tuple[int, ...]]]:
    """A dtype, the most elements of each part, and shapes of no more than these."""
    shapes = draw_from(st.lists(st.lists(st.integers(0, 5), max_size=4).map(tuple), max_size=5))
    spare = draw_from(st.lists(st.integers(0, 40), min_size=len(shapes), max_size=len(shapes)))
    sizes = [math.prod(shape) + more for shape, more in zip(shapes, spare, strict=True)]
    return draw_from(st.sampled_from(DTYPES)), sizes, shapes


@given(messages(), st.lists(st.integers(0, 2**62), min_size=5, max_size=5))
def test_what_is_written_is_read_bit_for_bit_in_any_size_up_to_the_layouts(message: Any, numbers: list[int]):
    dtype, sizes, shapes = message
    layout = MessageLayout(tuple(sizes), dtype)
    buffer = torch.full((layout.num_bytes,), 255, dtype=torch.uint8)
    header = Header(Kind.WORK, *numbers)
    parts = [draw(shape, dtype, seed) for seed, shape in enumerate(shapes)]
    layout.write(buffer, header, parts)
    assert layout.read_header(buffer) == header
    found = layout.read(buffer, shapes)
    assert len(found) == len(parts)
    for part, expected in zip(found, parts, strict=True):
        assert part.dtype == dtype and part.shape == expected.shape
        assert bits(part) == bits(expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [(1, 1, 1), (15, 16, 17), (31, 32, 33, 1), (63, 65, 7), (1001, 3)], ids=str)
def test_every_part_lies_at_a_multiple_of_64_bytes_and_within_its_own_room(sizes: Any, dtype: torch.dtype):
    layout = MessageLayout(sizes, dtype)
    buffer = torch.empty(layout.num_bytes, dtype=torch.uint8)
    parts = layout.read(buffer, [(size,) for size in sizes])
    start = buffer.data_ptr()
    assert start % ALIGNMENT_BYTES == 0
    ends = [start + HEADER_BYTES]
    for part in parts:
        assert part.data_ptr() % 64 == 0
        assert ends[-1] <= part.data_ptr() < ends[-1] + 64
        ends.append(part.data_ptr() + part.numel() * part.itemsize)
    assert ends[-1] <= start + layout.num_bytes < ends[-1] + 64


def test_a_part_is_a_view_of_the_buffer_and_no_copy():
    buffer = torch.zeros(LAYOUT.num_bytes, dtype=torch.uint8)
    part, _ = LAYOUT.read(buffer, [(7,), (3,)])
    buffer[HEADER_BYTES : HEADER_BYTES + 4] = torch.tensor([1.5]).view(torch.uint8)
    assert part[0] == 1.5


def test_strided_parts_are_sent_as_what_they_show():
    part = torch.arange(12.0).view(3, 4).t()[1:]
    layout = MessageLayout((12,), torch.float32)
    buffer = torch.empty(layout.num_bytes, dtype=torch.uint8)
    layout.write(buffer, Header(Kind.WORK), [part])
    assert torch.equal(layout.read(buffer, [(3, 3)])[0], part)


@pytest.mark.parametrize(
    "parts",
    [[torch.zeros(8), torch.zeros(3)], [torch.zeros(7)], [torch.zeros(1)] * 3],
    ids=["long", "few", "many"],
)
def test_parts_that_do_not_fit_the_layout_are_no_message(parts: list[Tensor]):
    buffer = torch.empty(LAYOUT.num_bytes, dtype=torch.uint8)
    with pytest.raises((RuntimeError, ValueError)):
        write_message(LAYOUT, buffer, Header(Kind.WORK), parts)


def test_only_the_slot_may_differ_between_two_headers_of_one_item():
    header = Header(Kind.WORK, 3, 1, 2, 0, 9)
    assert header.same_item(header._replace(slot=17))
    for name in ("tick", "block", "step", "run"):
        assert not header.same_item(header._replace(**{name: 7}))
    assert not header.same_item(header._replace(kind=Kind.IDLE))


def test_messages_arrive_in_the_order_they_were_sent_whoever_is_faster():
    link, num_messages = InProcessLink(LAYOUT, depth=3, timeout_s=10), 60

    def send() -> None:
        for number in range(num_messages):
            if number % 20 < 5:
                time.sleep(0.001)
            link.send(work(number), parts_of(number))

    sender = threading.Thread(target=send)
    sender.start()
    for number in range(num_messages):
        if number % 20 > 14:
            time.sleep(0.001)
        header, buffer = link.receive()
        assert header == work(number)
        found = link.layout.read(buffer, [(7,), (3, 1)])
        assert all(torch.equal(*pair) for pair in zip(found, parts_of(number), strict=True))
    sender.join(10)
    link.flush()
    assert link.bytes_sent == num_messages * LAYOUT.num_bytes


def refused_in_time(action: Callable[[], Any]) -> TransportError:
    """The error of an action that must fail once its deadline is over, and not much later."""
    start = time.monotonic()
    with pytest.raises(TransportError) as caught:
        action()
    took = time.monotonic() - start
    assert SHORT_S * 0.9 <= took < SHORT_S + 2.0  # on a busy machine
    return caught.value


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_as_many_messages_as_the_links_depth_are_in_flight_and_no_more(depth: int):
    link = InProcessLink(LAYOUT, depth=depth, timeout_s=SHORT_S, ranks=(3, 4))
    for number in range(depth):
        link.send(work(number), parts_of(number))
    error = refused_in_time(lambda: link.send(work(depth), parts_of(depth)))
    assert str(error) == "rank 3: rank 4 took no message for 0.1 s"
    assert error.peer == 4
    assert link.bytes_sent == depth * LAYOUT.num_bytes
    # the one that was refused never comes, and room for another is made by taking one
    assert link.receive()[0] == work(0)
    link.send(work(depth + 1), parts_of(depth + 1))
    arrived = [link.receive()[0] for _ in range(depth)]
    assert arrived == [work(number) for number in [*range(1, depth), depth + 1]]


def test_waiting_for_a_silent_sender_ends_at_the_deadline_and_names_both_ranks():
    link = InProcessLink(LAYOUT, timeout_s=SHORT_S, ranks=(3, 4))
    error = refused_in_time(link.receive)
    assert str(error) == "rank 4: rank 3 sent nothing for 0.1 s"
    assert error.peer == 3


@pytest.mark.parametrize("kind", [Kind.IDLE, Kind.STOP])
def test_a_message_that_is_no_work_has_a_header_and_no_parts(kind: Kind):
    link = InProcessLink(LAYOUT, timeout_s=SHORT_S)
    link.send(Header(kind, tick=12))
    header, buffer = link.receive()
    assert header == Header(kind, tick=12)
    assert buffer.shape == (LAYOUT.num_bytes,)  # one size for all, or nobody could wait for it


def test_work_without_its_parts_is_not_sent():
    link = InProcessLink(LAYOUT, timeout_s=SHORT_S)
    with pytest.raises(ValueError):
        link.send(work(0))
    assert link.bytes_sent == 0


def test_a_later_write_to_the_senders_tensor_does_not_change_what_was_sent():
    link = InProcessLink(LAYOUT, timeout_s=SHORT_S)
    mine = parts_of(1)
    link.send(work(1), mine)
    for part in mine:
        part.fill_(99.0)
    link.send(work(2), mine)
    for expected in parts_of(1), (torch.full((7,), 99.0), torch.full((3, 1), 99.0)):
        _, buffer = link.receive()
        found = link.layout.read(buffer, [(7,), (3, 1)])
        assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_a_received_buffer_stays_as_it_is_until_the_next_receive():
    link = InProcessLink(LAYOUT, depth=1, timeout_s=SHORT_S)
    link.send(work(1), parts_of(1))
    _, buffer = link.receive()
    found = link.layout.read(buffer, [(7,), (3, 1)])
    link.send(work(2), parts_of(2))
    assert all(torch.equal(*pair) for pair in zip(found, parts_of(1), strict=True))
