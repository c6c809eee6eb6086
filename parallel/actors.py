"""Ranks and decoders as Ray actors: the same objects, which also know where they are and reach each other."""

import os
from typing import Any

import numpy as np
import ray
import torch
from numpy.typing import NDArray
from torch import Tensor

from vidgen.parallel.decoding import Decoder
from vidgen.parallel.memory import peak_memory_bytes
from vidgen.parallel.rank import Rank, Whereabouts

Sent = tuple[str, tuple[int, ...], NDArray[np.uint8] | None]  # dtype, shape, bytes if there are any


class RankActor(Rank):
    """A Rank in a Ray actor, which knows where it is and hands clean blocks to the decoder."""

    def __init__(self, index: int, decoder: Any) -> None:
        context = ray.get_runtime_context()
        ray.util.register_serializer(Tensor, serializer=to_bytes, deserializer=from_bytes)

        def emit(block: int, latents: Any) -> None:
            decoder.put.remote(block, latents)

        super().__init__(index, emit if index == 0 else None, _own_host(), context.get_node_id())


def to_bytes(tensor: Tensor) -> Sent:
    """A tensor as Ray sends it without copying it into an archive, which takes it three times as long."""
    flat = tensor.detach().cpu().reshape(-1)
    data = flat.view(torch.uint8).numpy() if len(flat) else None
    return str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), data


def from_bytes(sent: Sent) -> Tensor:
    """The same tensor on the CPU, in memory of its own."""
    name, shape, data = sent
    dtype: torch.dtype = getattr(torch, name)
    if data is None:
        return torch.empty(shape, dtype=dtype)
    return torch.from_numpy(data.copy()).view(dtype).reshape(shape)


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
