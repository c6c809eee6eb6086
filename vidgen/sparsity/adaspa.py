"""Blocks by the attention that falls on them, equally many in each row of a head (AdaSpa, arXiv 2502.21079).

Each head has a level: the share asked for; or, head-adaptive, less for heads that keep their mass anyway and
as much more for those that do not; or the least that reaches a recall, on three levels a layer at the most.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import torch
from torch import Tensor

from vidgen.kernels.attention.mass import block_mass
from vidgen.kernels.attention.select import top_k
from vidgen.sparsity.choice import Choice, text_blocks
from vidgen.sparsity.policy import Place, State
from vidgen.sparsity.scheduled import Chosen

# B batch, H heads, Q queries, K keys, D head dimension, R rows (blocks of queries), C key blocks

HIGH_RECALL = 0.8  # the paper's: a head that keeps more needs less
MAX_LEVELS = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class AdaSpa:
    """See the module. Blocks with text are always kept, and count as part of a row's share."""

    density: float | None  # or a recall
    recall: float | None
    query_block: int
    key_block: int
    head_adaptive: bool
    may_see_more: bool

    @property
    def searches(self) -> bool:
        return True

    @property
    def needs_lse(self) -> bool:
        return True

    def choose(self, query_BQHD: Tensor, key_BKHD: Tensor, place: Place, state: State) -> Chosen:
        """By the LSE of the state: exact where it is this step's own, else the estimate of the paper."""
        blocks = {"query_block": self.query_block, "key_block": self.key_block}
        mass = block_mass(query_BQHD, key_BKHD, state["lse"], **blocks)
        text = place.text_tokens
        text_R = text_blocks(place.num_queries - text, text, self.query_block, mass.device)
        text_C = text_blocks(place.num_keys - text, text, self.key_block, mass.device)
        curve_BHC = _recalls(mass, text_R, text_C)
        counts_BH = self._counts(curve_BHC, int(text_C.sum()))
        layout = top_k(
            mass,
            counts_BH,
            num_queries=place.num_queries,
            num_keys=place.num_keys,
            always_RC=text_R.unsqueeze(1) | text_C,
            **blocks,
        )
        if not self.may_see_more:
            layout = replace(layout, may_see_more=False, prepared={})
        recall_H = curve_BHC.gather(-1, counts_BH.unsqueeze(-1) - 1).mean((0, 2))
        return Chosen(choice=Choice(layout=layout), recall_H=recall_H)

    def _counts(self, curve_BHC: Tensor, num_text: int) -> Tensor:
        """How many blocks a row of each head keeps [B, H], on the CPU."""
        num_columns = curve_BHC.shape[-1]
        least = min(num_text + 1, num_columns)
        if self.recall is not None:
            needs_BH = (curve_BHC < self.recall).sum(-1).add(1).clamp(least, num_columns)
            return torch.tensor([on_levels(needs_H) for needs_H in needs_BH.tolist()])
        assert self.density is not None
        count = min(max(round(self.density * num_columns), least), num_columns)
        if not self.head_adaptive:
            return torch.full(curve_BHC.shape[:2], count)
        change = min((count - num_text) // 2, num_columns - count)
        return count + change * adapted(curve_BHC[..., count - 1])


def adapted(recall_BH: Tensor) -> Tensor:
    """Per head -1, 0 or 1 level, zero in sum: as many heads get more as get less, at most half of them."""
    num_heads = recall_BH.shape[1]
    num_less = (recall_BH > HIGH_RECALL).sum(1, keepdim=True).clamp(max=num_heads // 2)
    order = recall_BH.argsort(dim=1, descending=True, stable=True)
    rank_BH = torch.empty_like(order).scatter_(1, order, torch.arange(num_heads).expand_as(order))
    return (rank_BH >= num_heads - num_less).long() - (rank_BH < num_less).long()


def on_levels(needs: Sequence[int], max_levels: int = MAX_LEVELS) -> list[int]:
    """Each need raised to one of a few levels, with the least sum: few, as heads run side by side."""
    values = sorted(set(needs))
    *lower, highest = values

    def raised(levels: tuple[int, ...]) -> list[int]:
        return [next(level for level in levels if level >= need) for need in needs]

    options = combinations(lower, min(max_levels - 1, len(lower)))
    return min((raised((*option, highest)) for option in options), key=sum)


def _recalls(mass_BHRC: Tensor, text_R: Tensor, text_C: Tensor) -> Tensor:
    """Share of its mass that a head keeps with 1, 2, ... blocks of each row [B, H, C], on the CPU.

    Blocks with text come first, and rows with text keep all.
    """
    order = torch.argsort(mass_BHRC.masked_fill(text_C, math.inf), dim=-1, descending=True)
    kept = mass_BHRC.gather(-1, order).double().cumsum(-1)
    kept = torch.where(text_R.unsqueeze(-1), kept[..., -1:], kept).sum(2)
    return (kept / kept[..., -1:]).float().cpu()
