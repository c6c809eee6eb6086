"""What a sparsity policy is: attention of one layer at one step, with what it keeps for the steps after.

A policy holds settings only. All that it remembers is the state it returns, which whoever calls keeps by
block, layer and guidance branch, saves and restores: so the result depends on (block, step) and on nothing
that ran elsewhere, and a render on ranks equals the loop.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from torch import Tensor

from vidgen.kernels.attention.layout import BlockLayout

# B batch, Q queries, K keys, H heads, D head dimension

State = Mapping[str, Tensor]  # empty before a block's first step


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Which attention this is: where in the model, and how far from noise to video."""

    layer: int
    num_layers: int
    step: int
    num_steps: int
    grid: tuple[int, int, int]  # frames, rows, columns of the queries
    frames_before: int = 0  # further frames of keys, before the queries' and after
    frames_after: int = 0
    text_tokens: int = 0  # at the end of queries and of keys, where text and video attend jointly

    @property
    def key_frames(self) -> int:
        return self.frames_before + self.grid[0] + self.frames_after

    @property
    def num_queries(self) -> int:
        return self.grid[0] * self.grid[1] * self.grid[2] + self.text_tokens

    @property
    def num_keys(self) -> int:
        return self.key_frames * self.grid[1] * self.grid[2] + self.text_tokens


class Kind(StrEnum):
    """How a step's attention was computed."""

    DENSE = "dense"
    SEARCH = "search"  # and a choice was made, for this step or the next ones
    SPARSE = "sparse"


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """What a policy did in one call. Tensors are [H], means over the batch, on the CPU."""

    place: Place
    kind: Kind
    density_H: Tensor  # share of (query, key) pairs seen
    recall_H: Tensor | None = None  # share of attention mass kept, when a search measured it
    search_s: float = 0.0
    layout: BlockLayout | None = None  # what was seen, in an order of the tokens that may be the policy's own


class Policy(Protocol):
    """See the module."""

    @property
    def name(self) -> str: ...

    @property
    def heads_are_alike(self) -> bool:
        """Whether all heads see alike and nothing is kept of them, so that ranks can share them."""
        ...

    def attend(
        self, query_BQHD: Tensor, key_BKHD: Tensor, value_BKHD: Tensor, place: Place, state: State
    ) -> tuple[Tensor, State, Report]:
        """(attended [B, Q, H, D], the state for the block's next step, what was done).

        Keys are those of `place.frames_before`, of the queries' own frames, of `frames_after`, then text.
        """
        ...
