"""Where a DiT's self-attention looks: the share of its mass in the query's frame and in those beside it."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

# B batch, Q query tokens, K key tokens, H heads, D head width, F key frames, S tokens per frame

NUM_QUERIES = 64  # looked at in each run of a layer: the scores of all would cost as much as the attention
NAMES = ("same_frame", "within_one_frame")


def frame_mass(query_BQHD: Tensor, key_BKHD: Tensor, frame_tokens: int, first_query: int) -> Tensor:
    """Shares in [0, 1] of some queries' attention, and of the keys, by the distance of frames: [2, 2].

    Rows: the same frame, and it with the ones on both sides; columns: mass, and share of keys, which is what
    even attention would give. `first_query` is where the first query's own key lies.
    """
    num_queries, num_keys = query_BQHD.shape[1], key_BKHD.shape[1]
    draw = torch.randperm(num_queries, generator=torch.Generator().manual_seed(0))[:NUM_QUERIES]
    rows = draw.to(query_BQHD.device)
    logits_BHQK = torch.einsum("bqhd,bkhd->bhqk", query_BQHD[:, rows].float(), key_BKHD.float())
    shares_BHQK = (logits_BHQK / math.sqrt(query_BQHD.shape[-1])).softmax(-1)
    mass_QK = shares_BHQK.mean((0, 1))
    key_frames = torch.arange(num_keys, device=rows.device) // frame_tokens
    query_frames = (first_query + rows) // frame_tokens
    distance_QK = (query_frames[:, None] - key_frames[None]).abs()
    near = [(distance_QK <= reach).float() for reach in (0, 1)]
    return torch.stack([torch.stack([(mass_QK * n).sum(-1).mean(), n.mean()]) for n in near])


class AttentionMass:
    """Means over the runs of every layer that sees all keys; those with a window or a policy are left out.

    Distances are places in the sequence of keys: frames of an anchor stand right before the rest.
    """

    def __init__(self, num_layers: int) -> None:
        self.sums = np.zeros((num_layers, 2, 2))
        self.counts = np.zeros(num_layers, dtype=int)

    def hook(self, layer: int, block: nn.Module) -> Callable[[], None]:
        """Look at a layer's attention from here on, until what comes back is called."""

        def before(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            x_BFSD, positions, kv_before, kv_after, attend = inputs
            if attend is not None or positions.window is not None:
                return inputs

            def attend_and_look(query_BQHD: Tensor, key_BKHD: Tensor, value_BKHD: Tensor) -> Tensor:
                own = positions.own_tokens
                self.sums[layer] += frame_mass(query_BQHD, key_BKHD, x_BFSD.shape[2], own.start).cpu().numpy()
                self.counts[layer] += 1
                return positions.attend(query_BQHD, key_BKHD, value_BKHD)

            return x_BFSD, positions, kv_before, kv_after, attend_and_look

        return block.get_submodule("self_attention").register_forward_pre_hook(before).remove

    def as_dict(self) -> dict[str, list[float]] | None:
        """Shares by layer, `even_` those of even attention; None where no layer's attention was looked at."""
        if not self.counts.all():
            return None
        means = self.sums / self.counts[:, None, None]
        named = {name: means[:, row] for row, name in enumerate(NAMES)}
        mass = {name: rows[:, 0].tolist() for name, rows in named.items()}
        return mass | {f"even_{name}": rows[:, 1].tolist() for name, rows in named.items()}
