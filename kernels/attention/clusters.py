"""Tokens in groups that are alike, and the order that puts each group together (SVG2, arXiv 2505.18875)."""

import torch
from torch import Tensor

# B batch, H heads, S tokens, D head dimension, C clusters; N = B*H

CHUNK_DISTANCES = (
    1 << 20
)  # fp32 distances of a head at a time: not of all heads, as sums must not depend on others
TOLERANCE = 1e-4  # of the mean way that centroids move


def kmeans(
    x_BHSD: Tensor, num_clusters: int, *, iterations: int, centroids: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(centroids [B, H, C, D] fp32, the cluster of each token [B, H, S] int64), by Euclidean distance.

    The same tokens give the same clusters, whatever other heads are beside them: it starts from `centroids`,
    or from evenly spaced tokens; a head stops for itself once its centroids rest; an empty cluster keeps its
    centroid; sums are matrix products, as atomic additions come in any order.
    """
    batch, num_heads, num_tokens, head_dim = x_BHSD.shape
    if not 1 <= num_clusters <= num_tokens:
        raise ValueError(f"{num_clusters} clusters of {num_tokens} tokens: need 1 to {num_tokens}")
    if iterations < 1:
        raise ValueError(f"iterations={iterations}: need at least 1")
    x_NSD = x_BHSD.flatten(0, 1)
    if centroids is None:
        places = torch.arange(num_clusters, device=x_BHSD.device) * num_tokens // num_clusters
        centroids_NCD = x_NSD[:, places].float()
    else:
        shape = batch, num_heads, num_clusters, head_dim
        if centroids.shape != shape:
            raise ValueError(f"centroids of shape {tuple(centroids.shape)}: need {shape}")
        centroids_NCD = centroids.flatten(0, 1).float()
    is_moving_N = torch.ones(len(x_NSD), dtype=torch.bool, device=x_BHSD.device)
    for _ in range(iterations):
        moved_NCD = _means(x_NSD, centroids_NCD)
        way_N = (moved_NCD - centroids_NCD).norm(dim=-1).mean(-1)
        centroids_NCD = torch.where(is_moving_N.view(-1, 1, 1), moved_NCD, centroids_NCD)
        is_moving_N = is_moving_N & (way_N > TOLERANCE)
        if not is_moving_N.any():
            break
    labels = torch.cat([_nearest(part.float(), centroids_NCD) for part in _parts(x_NSD, num_clusters)], 1)
    return centroids_NCD.unflatten(0, (batch, num_heads)), labels.unflatten(0, (batch, num_heads))


def cluster_order(labels_BHS: Tensor, num_clusters: int) -> tuple[Tensor, Tensor, Tensor]:
    """(order, inverse, sizes): tokens cluster by cluster, each in its old order.

    x[order] has clusters side by side and x[order][inverse] is x (both [B, H, S] int64); sizes are [B, H, C].
    """
    order = labels_BHS.argsort(dim=-1, stable=True)
    numbers = torch.arange(labels_BHS.shape[-1], device=labels_BHS.device).expand_as(order)
    inverse = torch.empty_like(order).scatter_(-1, order, numbers)
    sorted_labels = labels_BHS.gather(-1, order)
    bounds = torch.arange(num_clusters + 1, device=labels_BHS.device).expand(*labels_BHS.shape[:2], -1)
    starts = torch.searchsorted(sorted_labels, bounds.contiguous())
    return order, inverse, starts.diff(dim=-1)


def _parts(x_NSD: Tensor, num_clusters: int) -> tuple[Tensor, ...]:
    return x_NSD.split(max(1, CHUNK_DISTANCES // num_clusters), dim=1)


def _nearest(x_NSD: Tensor, centroids_NCD: Tensor) -> Tensor:
    """[N, S]: the length of x is the same for all centroids, and left out."""
    squares = centroids_NCD.square().sum(-1).unsqueeze(1)
    return torch.baddbmm(squares, x_NSD, centroids_NCD.transpose(1, 2), alpha=-2).argmin(-1)


def _means(x_NSD: Tensor, centroids_NCD: Tensor) -> Tensor:
    """[N, C, D]: of the tokens nearest to each centroid, and the centroid where there are none."""
    num_clusters = centroids_NCD.shape[1]
    sums = torch.zeros_like(centroids_NCD)
    sizes = centroids_NCD.new_zeros(len(x_NSD), num_clusters, 1)
    numbers = torch.arange(num_clusters, device=x_NSD.device).view(1, -1, 1)
    for part in _parts(x_NSD, num_clusters):
        part = part.float()
        is_in_NCS = (_nearest(part, centroids_NCD).unsqueeze(1) == numbers).float()
        sums.baddbmm_(is_in_NCS, part)
        sizes += is_in_NCS.sum(-1, keepdim=True)
    return torch.where(sizes > 0, sums / sizes.clamp(min=1), centroids_NCD)
