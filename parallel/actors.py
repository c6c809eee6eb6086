"""Ranks and decoders as Ray actors: the same objects, which also know where they are and reach each other."""

import os
from typing import Any

import ray

from vidgen.parallel.decoding import Decoder
from vidgen.parallel.memory import peak_memory_bytes
from vidgen.parallel.rank import Rank, Whereabouts


class RankActor(Rank):
    """A Rank in a Ray actor, which knows where it is and hands clean blocks to the decoder."""

    def __init__(self, index: int, decoder: Any) -> None:
        context = ray.get_runtime_context()

        def emit(block: int, latents: Any) -> None:
            decoder.put.remote(block, latents)

        super().__init__(index, emit if index == 0 else None, _own_host(), context.get_node_id())


class DecoderActor(Decoder):
    """A Decoder in a Ray actor."""

    def __init__(self) -> None:
        whereabouts = Whereabouts(
            pid=os.getpid(), host=_own_host(), node=ray.get_runtime_context().get_node_id(),
            peak_memory_bytes=peak_memory_bytes(),
        )  # fmt: skip
        super().__init__(whereabouts)


def _own_host() -> str:
    return ray.util.get_node_ip_address()
