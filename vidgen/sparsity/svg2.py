"""Tokens sorted by k-means, blocks by the attention that centroids estimate (SVG2, arXiv 2505.18875).

Blocks of the engine have one length and clusters have not: the sorted tokens are cut into blocks, and a row
keeps each key block that overlaps a key cluster kept for any query cluster in the row. So every pair of the
paper's mask is seen, and some more. Text stays behind the video, and blocks with text are always kept.
The paper clusters anew at every step; here clusters, like all choices, are made at searches and used between.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from vidgen.kernels.attention import select
from vidgen.kernels.attention.clusters import cluster_order, kmeans
from vidgen.kernels.attention.layout import from_block_mask
from vidgen.sparsity.choice import Choice, text_blocks
from vidgen.sparsity.policy import Place, State
from vidgen.sparsity.scheduled import Chosen

# B batch, H heads, S tokens, P places (video in cluster order, then text), D head dimension, R rows,
# C key blocks, I clusters of queries, J clusters of keys

QUERY_CLUSTERS, KEY_CLUSTERS = 100, 500  # the paper's, for 30 to 100 thousand tokens
TOKENS_PER_CLUSTER = 8  # at least


@dataclass(frozen=True, kw_only=True, slots=True)
class SVG2:
    """See the module. The recall it tells is an estimate: the share of mass that centroids say is kept."""

    query_clusters: int | None
    key_clusters: int | None
    top_p: float
    min_share: float
    first_iterations: int
    next_iterations: int
    query_block: int
    key_block: int
    may_see_more: bool

    @property
    def searches(self) -> bool:
        return True

    @property
    def needs_lse(self) -> bool:
        return False

    def choose(self, query_BQHD: Tensor, key_BKHD: Tensor, place: Place, state: State) -> Chosen:
        """From the centroids of the state, if it has any."""
        text = place.text_tokens
        wanted = self.query_clusters or QUERY_CLUSTERS, self.key_clusters or KEY_CLUSTERS
        queries = self._clusters(query_BQHD, text, wanted[0], state.get("query_centroids"))
        keys = self._clusters(key_BKHD, text, wanted[1], state.get("key_centroids"))
        shares_BHIJ = estimated_shares(queries.centroids, keys.centroids, keys.sizes)
        kept_BHIJ = top_shares(shares_BHIJ, self.top_p, self.min_share)
        text_R = text_blocks(place.num_queries - text, text, self.query_block, query_BQHD.device)
        text_C = text_blocks(place.num_keys - text, text, self.key_block, query_BQHD.device)
        rows = queries.overlaps(self.query_block, len(text_R))
        columns = keys.overlaps(self.key_block, len(text_C))
        mask = (rows @ kept_BHIJ.float() @ columns.transpose(2, 3) > 0) | text_R.unsqueeze(-1) | text_C
        layout = from_block_mask(
            mask,
            num_queries=place.num_queries,
            num_keys=place.num_keys,
            query_block=self.query_block,
            key_block=self.key_block,
            may_see_more=self.may_see_more,
        )
        choice = Choice(
            layout=layout,
            query_order_BHP=queries.order,
            key_order_BHP=keys.order,
            query_places_BHQ=queries.places,
        )
        weights = queries.sizes / queries.sizes.sum(-1, keepdim=True)
        recall_H = ((shares_BHIJ * kept_BHIJ).sum(-1) * weights).sum(-1).mean(0).cpu()
        kept = {"query_centroids": queries.centroids, "key_centroids": keys.centroids}
        return Chosen(choice=choice, recall_H=recall_H, kept=kept)

    def _clusters(
        self, tokens_BSHD: Tensor, num_text: int, num_clusters: int, centroids: Tensor | None
    ) -> "Clusters":
        num_video = tokens_BSHD.shape[1] - num_text
        num_clusters = max(1, min(num_clusters, num_video // TOKENS_PER_CLUSTER))
        if centroids is not None and centroids.shape[2] != num_clusters:  # of other settings
            centroids = None
        x_BHSD = tokens_BSHD[:, :num_video].transpose(1, 2)
        iterations = self.first_iterations if centroids is None else self.next_iterations
        centroids, labels = kmeans(x_BHSD, num_clusters, iterations=iterations, centroids=centroids)
        order, inverse, sizes = cluster_order(labels, num_clusters)
        text = torch.arange(num_video, num_video + num_text, device=order.device).expand(*order.shape[:2], -1)
        return Clusters(
            centroids=centroids.contiguous(),
            order=torch.cat((order, text), -1),
            places=torch.cat((inverse, text), -1),
            sizes=sizes,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Clusters:
    """Of queries or of keys, per batch entry and head."""

    centroids: Tensor  # fp32 [B, H, clusters, D]
    order: Tensor  # [B, H, P]
    places: Tensor  # the inverse
    sizes: Tensor  # [B, H, clusters]

    def overlaps(self, block: int, num_blocks: int) -> Tensor:
        """[B, H, blocks, clusters] 1.0 where a block of the sorted tokens has some of a cluster."""
        ends = self.sizes.cumsum(-1).unsqueeze(2)
        starts = ends - self.sizes.unsqueeze(2)
        block_starts = torch.arange(num_blocks, device=ends.device).unsqueeze(1) * block
        return ((starts < block_starts + block) & (ends > block_starts) & (starts < ends)).float()


def estimated_shares(query_BHID: Tensor, key_BHJD: Tensor, sizes_BHJ: Tensor) -> Tensor:
    """Share of a query cluster's attention on each key cluster [B, H, I, J], as if tokens were centroids."""
    logits = query_BHID @ key_BHJD.transpose(2, 3) / math.sqrt(query_BHID.shape[-1])
    return (logits + sizes_BHJ.float().log().unsqueeze(2)).softmax(-1)


def top_shares(shares_BHIJ: Tensor, top_p: float, min_share: float) -> Tensor:
    """True for the largest shares up to the one at which they sum to top_p, and for so many at least."""
    num_queries, num_keys = shares_BHIJ.shape[2:]
    least = max(1, math.ceil(min_share * num_keys))
    chosen = select.top_p(
        shares_BHIJ,
        top_p,
        at_least=least,
        num_queries=num_queries,
        num_keys=num_keys,
        query_block=1,
        key_block=1,
    )
    return chosen.block_mask()
