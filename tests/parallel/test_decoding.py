"""Laws of the decoder's rank: blocks in order, as soon as they are there, and so is what went wrong."""

import threading
import time
from collections.abc import Callable

import torch
from torch import Tensor

from vidgen.parallel.decoding import Decoder
from vidgen.parallel.rank import Whereabouts

WHERE = Whereabouts(pid=1, host="here", node="n", peak_memory_bytes=0)
LONG_S = 30.0


def decoder(decode: Callable[[Tensor], Tensor]) -> Decoder:
    made = Decoder(WHERE)
    made.begin(lambda: decode, num_threads=1)
    return made


def test_a_poll_that_waits_answers_as_soon_as_a_block_is_decoded_and_with_all_that_are():
    waiting = decoder(lambda latents: latents + 1)
    timer = threading.Timer(0.2, lambda: [waiting.put(block, torch.tensor([block])) for block in (4, 5)])
    timer.start()
    start = time.monotonic()
    found = list(waiting.poll(wait_s=LONG_S).decoded)
    while len(found) < 2:
        found += waiting.poll(wait_s=LONG_S).decoded
    assert time.monotonic() - start < LONG_S / 2
    assert [(each.block, each.frames.tolist()) for each in found] == [(4, [5]), (5, [6])]


def test_a_poll_answers_with_nothing_when_its_wait_is_over():
    waiting = decoder(lambda latents: latents)
    start = time.monotonic()
    assert waiting.poll(wait_s=0.1).decoded == [] and waiting.poll().decoded == []
    assert 0.1 <= time.monotonic() - start < LONG_S


def test_what_goes_wrong_ends_the_wait_and_is_told_in_every_poll_from_then_on():
    def fails(latents: Tensor) -> Tensor:
        raise ValueError("no such colour")

    waiting = decoder(fails)
    waiting.put(0, torch.zeros(1))
    start = time.monotonic()
    for _ in range(2):
        report = waiting.poll(wait_s=LONG_S) if not waiting.poll().failure else waiting.poll()
        assert report.failure is not None and report.failure.message == "decoder: ValueError: no such colour"
    assert time.monotonic() - start < LONG_S / 2
