"""Which keys each query sees in a layer, in an order of the tokens that suits it; and that as tensors."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from vidgen.kernels.attention.api import attention
from vidgen.kernels.attention.layout import BlockLayout, BlockLists

# B batch, H heads (each 1 where all are alike), Q queries, K keys, D head dimension, P places of an order


@dataclass(frozen=True, kw_only=True, eq=False)
class Choice:
    """A layout, of tokens as they are or in an order of their own, which may name tokens twice as padding."""

    layout: BlockLayout
    query_order_BHP: Tensor | None = None  # integers: which token is at each place
    key_order_BHP: Tensor | None = None
    query_places_BHQ: Tensor | None = None  # at which place each query is

    def attend(
        self, query_BQHD: Tensor, key_BKHD: Tensor, value_BKHD: Tensor, *, return_lse: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """(attended [B, Q, H, D], LSE [B, H, Q] if asked for), in the order of the queries given."""
        if self.query_order_BHP is None or self.key_order_BHP is None or self.query_places_BHQ is None:
            if return_lse:
                return attention(query_BQHD, key_BKHD, value_BKHD, layout=self.layout, return_lse=True)
            return attention(query_BQHD, key_BKHD, value_BKHD, layout=self.layout), None
        query = taken(query_BQHD, self.query_order_BHP)
        key, value = taken(key_BKHD, self.key_order_BHP), taken(value_BKHD, self.key_order_BHP)
        if not return_lse:
            out = attention(query, key, value, layout=self.layout)
            return taken(out, self.query_places_BHQ), None
        out, lse_BHP = attention(query, key, value, layout=self.layout, return_lse=True)
        places = self.query_places_BHQ.long().expand(*lse_BHP.shape[:2], -1)
        return taken(out, self.query_places_BHQ), lse_BHP.gather(-1, places)

    @cached_property
    def density_H(self) -> Tensor:
        """Share of (query, key) pairs seen, mean over the batch, on the CPU; [1] if heads are alike."""
        if self.query_places_BHQ is None:
            return self.layout.density_BH.mean(0).cpu()
        assert self.layout.partial is None  # padding among the queries does not count
        lengths = self.layout.lengths_BHC
        keys_BHR = (self.layout.full.mask(self.layout.num_key_blocks) * lengths.unsqueeze(2)).sum(-1)
        rows_BHQ = self.query_places_BHQ.long() // self.layout.query_block
        keys_BHR = keys_BHR.expand(rows_BHQ.shape[0], max(keys_BHR.shape[1], rows_BHQ.shape[1]), -1)
        keys_BHQ = keys_BHR.gather(-1, rows_BHQ.expand(*keys_BHR.shape[:2], -1))
        return (keys_BHQ.float().mean(-1) / lengths.sum(-1)).mean(0).cpu()

    def tensors(self) -> dict[str, Tensor]:
        """What `of_tensors` needs to make this again. Only for layouts of whole blocks of one length."""
        assert self.layout.partial is None and self.layout.key_lengths_BHC is None
        lists = self.layout.full
        kept = {"counts": lists.counts_BHR.contiguous(), "indices": lists.indices_BHRM.contiguous()}
        if self.query_order_BHP is not None and self.key_order_BHP is not None:
            kept["query_order"] = self.query_order_BHP.to(torch.int32).contiguous()
            kept["key_order"] = self.key_order_BHP.to(torch.int32).contiguous()
        return kept

    @classmethod
    def of_tensors(
        cls,
        kept: Mapping[str, Tensor],
        *,
        num_queries: int,
        num_keys: int,
        query_block: int,
        key_block: int,
        may_see_more: bool,
    ) -> "Choice":
        """The choice of which these are the tensors."""
        order = kept.get("query_order")
        return cls(
            layout=BlockLayout(
                num_queries=num_queries,
                num_keys=num_keys,
                query_block=query_block,
                key_block=key_block,
                full=BlockLists(counts_BHR=kept["counts"], indices_BHRM=kept["indices"]),
                may_see_more=may_see_more,
            ),
            query_order_BHP=order,
            key_order_BHP=kept.get("key_order"),
            query_places_BHQ=None if order is None else inverse(order),
        )


def taken(tokens_BSHD: Tensor, order_BHP: Tensor) -> Tensor:
    """[B, P, H, D]: the tokens in an order, which may be another for each batch entry and head."""
    if order_BHP.shape[:2] == (1, 1):
        return tokens_BSHD[:, order_BHP[0, 0].long()]
    batch, _, num_heads, head_dim = tokens_BSHD.shape
    places = order_BHP.expand(batch, num_heads, -1).transpose(1, 2).unsqueeze(-1).long()
    return tokens_BSHD.gather(1, places.expand(-1, -1, -1, head_dim))


def inverse(order_BHP: Tensor) -> Tensor:
    """At which place of a permutation each number is."""
    numbers = torch.arange(order_BHP.shape[-1], device=order_BHP.device).expand_as(order_BHP)
    return torch.empty_like(numbers.contiguous()).scatter_(-1, order_BHP.long(), numbers)


def text_blocks(num_video: int, num_text: int, block: int, device: torch.device) -> Tensor:
    """True for each block in which there is text, of video tokens with text behind."""
    ends = torch.arange(0, num_video + num_text, block, device=device) + block
    return (ends > num_video) & bool(num_text)
