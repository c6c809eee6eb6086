"""Clusters of tokens and the order by them."""

import pytest
import torch

from vidgen.kernels.attention.clusters import cluster_order, kmeans


def blobs(batch: int = 2, heads: int = 3, groups: int = 5, tokens: int = 67, seed: int = 0):
    """(tokens [B, H, S, D] around far centres, the group of each)."""
    generator = torch.Generator().manual_seed(seed)
    centres = 10 * torch.eye(groups, 8)
    labels = torch.cat(
        [
            torch.randperm(groups, generator=generator),
            torch.randint(groups, (tokens - groups,), generator=generator),
        ]
    )
    x = centres[labels] + 0.1 * torch.randn(batch, heads, tokens, 8, generator=generator)
    return x, labels


def test_groups_that_are_far_apart_are_found():
    x, groups = blobs()
    start = x[:, :, :5].clone()  # one token of each
    _, labels = kmeans(x, 5, iterations=50, centroids=start)
    same = labels.unsqueeze(-1) == labels.unsqueeze(-2)
    assert torch.equal(same, (groups.unsqueeze(-1) == groups).expand_as(same))


def test_a_centroid_is_the_mean_of_its_tokens():
    x, _ = blobs()
    centroids, labels = kmeans(x, 5, iterations=50, centroids=x[:, :, :5].clone())
    for cluster in range(5):
        mean = x[1, 2][labels[1, 2] == cluster].mean(0)
        torch.testing.assert_close(centroids[1, 2, cluster], mean)


def test_a_token_is_in_the_cluster_of_its_nearest_centroid():
    x = torch.randn(1, 2, 101, 12, generator=torch.Generator().manual_seed(1))
    centroids, labels = kmeans(x, 7, iterations=3)
    assert torch.equal(labels, torch.cdist(x, centroids).argmin(-1))


def test_more_iterations_come_nearer():
    x = torch.randn(1, 1, 203, 6, generator=torch.Generator().manual_seed(2))

    def spread(iterations):
        centroids, _ = kmeans(x, 9, iterations=iterations)
        return torch.cdist(x, centroids).amin(-1).square().sum().item()

    assert spread(20) < spread(5) < spread(1)


def test_a_second_call_goes_on_from_the_centroids_of_the_first():
    x = torch.randn(1, 2, 120, 6, generator=torch.Generator().manual_seed(3))
    first, _ = kmeans(x, 8, iterations=3)
    second, labels = kmeans(x, 8, iterations=4, centroids=first)
    whole, expected = kmeans(x, 8, iterations=7)
    assert torch.equal(second, whole)
    assert torch.equal(labels, expected)


def test_a_head_has_the_clusters_that_it_has_alone():
    easy, _ = blobs(batch=1, heads=1, tokens=90)
    hard = torch.randn(1, 2, 90, 8, generator=torch.Generator().manual_seed(4))
    together, labels = kmeans(torch.cat((easy, hard), 1), 6, iterations=30)
    for head, x in enumerate((easy[:, 0], hard[:, 0], hard[:, 1])):
        alone, own_labels = kmeans(x.unsqueeze(1), 6, iterations=30)
        assert torch.equal(together[:, head], alone[:, 0])
        assert torch.equal(labels[:, head], own_labels[:, 0])


def test_an_empty_cluster_keeps_its_centroid():
    x = torch.randn(1, 1, 20, 4, generator=torch.Generator().manual_seed(5))
    far = torch.full((1, 1, 1, 4), 1e3)
    centroids, labels = kmeans(x, 3, iterations=5, centroids=torch.cat((x[:, :, :2], far), 2))
    assert torch.equal(centroids[:, :, 2:], far)
    assert not (labels == 2).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_centroids_are_fp32(dtype):
    centroids, _ = kmeans(torch.randn(1, 1, 30, 4).to(dtype), 3, iterations=2)
    assert centroids.dtype == torch.float32


@pytest.mark.parametrize("num_clusters", [1, 4, 9])
def test_the_order_puts_clusters_side_by_side_and_its_inverse_takes_it_back(num_clusters):
    labels = torch.randint(min(num_clusters, 4), (2, 3, 53), generator=torch.Generator().manual_seed(6))
    order, inverse, sizes = cluster_order(labels, num_clusters)
    assert torch.equal(order.gather(-1, inverse), torch.arange(53).expand(2, 3, -1))
    assert torch.equal(inverse.gather(-1, order), torch.arange(53).expand(2, 3, -1))
    assert torch.equal(sizes, torch.nn.functional.one_hot(labels, num_clusters).sum(2))
    for cluster in range(num_clusters):  # each in its old order
        start = int(sizes[1, 2, :cluster].sum())
        members = order[1, 2, start : start + int(sizes[1, 2, cluster])]
        assert torch.equal(members, (labels[1, 2] == cluster).nonzero()[:, 0])


def test_impossible_numbers_are_errors():
    x = torch.randn(1, 1, 5, 4)
    with pytest.raises(ValueError, match="need 1 to 5"):
        kmeans(x, 6, iterations=1)
    with pytest.raises(ValueError, match="iterations=0"):
        kmeans(x, 2, iterations=0)
    with pytest.raises(ValueError, match=r"need \(1, 1, 2, 4\)"):
        kmeans(x, 2, iterations=1, centroids=x[:, :, :3])
