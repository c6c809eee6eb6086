"""SVG2: what clusters make of structure that is scattered over the tokens."""

import pytest
import torch

from vidgen.kernels.attention.api import attention
from vidgen.kernels.attention.reference import attention_reference
from vidgen.sparsity import svg2
from vidgen.sparsity.choice import Choice, inverse, taken
from vidgen.sparsity.policy import Kind

SIZES = {
    "no multiple of a block": {},
    "context": {"frames_before": 2, "frames_after": 1},
    "text": {"text_tokens": 5, "frames_before": 1},
    "small": {"grid": (1, 3, 3)},
}


def seen_by(layout, state, place):
    """[B, H, Q, K] True where a query sees a key, in the order of the tokens."""
    mask = layout.dense_mask()
    rows = inverse(state["query_order"]).unsqueeze(-1).expand(-1, -1, -1, place.num_keys)
    columns = inverse(state["key_order"]).unsqueeze(-2).expand(-1, -1, place.num_queries, -1)
    return mask.gather(2, rows).gather(3, columns)


def searched(make, place, tokens, **changes):
    """(tensors, output, state, report, place) of a first search on scattered groups."""
    here = place(2, **changes.pop("where", {}))
    given = tokens(here, scattered=True)
    out, state, report = make("svg2", **changes).attend(*given, here, {})
    return given, out, state, report, here


@pytest.mark.parametrize("size", SIZES)
def test_the_output_is_attention_to_what_is_seen_in_the_order_of_the_tokens(size, place, tokens, make):
    given, out, state, report, here = searched(make, place, tokens, where=SIZES[size])
    seen = seen_by(report.layout, state, here)
    query, key, value = (tensor.double() for tensor in given)
    logits = torch.einsum("bqhd,bkhd->bhqk", query, key) / 4
    weights = logits.masked_fill(~seen, -torch.inf).softmax(-1)
    exact = torch.einsum("bhqk,bkhd->bqhd", weights, value)
    torch.testing.assert_close(out.double(), exact, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(report.density_H, seen.float().mean((0, 2, 3)))


@pytest.mark.parametrize("size", ["context", "text"])
def test_every_pair_of_kept_clusters_is_seen(size, place, tokens, make, monkeypatch):
    kept, labels = [], []
    plain_shares, plain_kmeans = svg2.top_shares, svg2.kmeans

    def top_shares(*given):
        kept.append(plain_shares(*given))
        return kept[-1]

    def kmeans(*given, **more):
        found = plain_kmeans(*given, **more)
        labels.append(found[1])
        return found

    monkeypatch.setattr(svg2, "top_shares", top_shares)
    monkeypatch.setattr(svg2, "kmeans", kmeans)
    _, _, state, report, here = searched(make, place, tokens, where=SIZES[size])
    seen = seen_by(report.layout, state, here)
    clusters_of_keys = labels[1].unsqueeze(2).expand(-1, -1, kept[0].shape[2], -1)
    by_key = kept[0].gather(3, clusters_of_keys)  # [B, H, I, video keys]
    pairs = by_key.gather(2, labels[0].unsqueeze(-1).expand(-1, -1, -1, by_key.shape[3]))
    assert pairs.any() and not pairs.all()
    assert seen[:, :, : pairs.shape[2], : pairs.shape[3]][pairs].all()
    text = here.text_tokens
    if text:
        assert seen[:, :, -text:].all() and seen[..., -text:].all()


def test_scattered_groups_are_attended_to_almost_whole(place, tokens, make):
    where = {"grid": (9, 6, 8)}
    given, out, state, report, here = searched(make, place, tokens, where=where, top_p=0.9)
    assert report.density_H.mean() < 0.7
    _, lse = attention_reference(*given)
    logits = torch.einsum("bqhd,bkhd->bhqk", *(tensor.double() for tensor in given[:2])) / 4
    mass = (logits - lse.unsqueeze(-1)).exp() * seen_by(report.layout, state, here)
    assert (mass.sum(-1).mean((0, 2)) >= 0.85).all()
    assert (report.recall_H >= 0.9 - 1e-6).all()
    assert (out - attention(*given)).abs().mean() < 0.1 * attention(*given).abs().mean()


def test_what_is_seen_grows_with_top_p_and_with_the_least_share(place, tokens, make):
    def density(**changes):
        return searched(make, place, tokens, **changes)[3].density_H

    assert (density(top_p=0.2) <= density(top_p=0.6)).all()
    assert (density(top_p=0.6) <= density(top_p=0.95)).all()
    assert (density(top_p=0.2) <= density(top_p=0.2, min_share=0.5)).all()
    assert (density(min_share=1.0) == 1).all()


def test_top_p_of_1_has_the_bits_of_dense_attention(place, tokens, make):
    given, out, state, report, _ = searched(make, place, tokens, top_p=1)
    assert torch.equal(out, attention(*given))
    assert not state and report.kind == Kind.DENSE


def test_top_shares_keep_the_cluster_that_crosses():
    shares = torch.tensor([[[[0.5, 0.1, 0.3, 0.1], [0.25, 0.25, 0.25, 0.25]]]])
    assert svg2.top_shares(shares, 0.45, 0.0).tolist() == [
        [[[True, False, False, False], [True, True, False, False]]]
    ]
    assert svg2.top_shares(shares, 0.6, 0.0).sum(-1).tolist() == [[[2, 3]]]
    assert svg2.top_shares(shares, 0.1, 0.6).sum(-1).tolist() == [[[3, 3]]]


def test_an_estimated_share_is_exact_where_tokens_are_their_centroids():
    generator = torch.Generator().manual_seed(0)
    centroids = torch.randn(1, 1, 3, 4, generator=generator)
    sizes = torch.tensor([[[2, 0, 5]]])
    query = torch.randn(1, 1, 2, 4, generator=generator)
    logits = query @ centroids.repeat_interleave(sizes[0, 0], 2).transpose(2, 3) / 2
    weights = logits.softmax(-1)
    expected = torch.stack((weights[..., :2].sum(-1), torch.zeros(1, 1, 2), weights[..., 2:].sum(-1)), -1)
    torch.testing.assert_close(svg2.estimated_shares(query, centroids, sizes), expected)


def test_the_next_search_starts_from_the_centroids_and_takes_few_iterations(place, tokens, make, monkeypatch):
    calls = []
    plain = svg2.kmeans

    def kmeans(x, num_clusters, *, iterations, centroids):
        calls.append((iterations, centroids))
        return plain(x, num_clusters, iterations=iterations, centroids=centroids)

    monkeypatch.setattr(svg2, "kmeans", kmeans)
    policy, state, states = make("svg2"), {}, []
    for step in range(2, 8):
        here = place(step)
        _, state, _ = policy.attend(*tokens(here, scattered=True, change=0.1 * step), here, state)
        states.append(state)
    assert [iterations for iterations, _ in calls] == [50, 50, 2, 2]
    assert calls[0][1] is None and torch.equal(calls[2][1], states[0]["query_centroids"])
    assert torch.equal(calls[3][1], states[0]["key_centroids"])


@pytest.mark.parametrize(
    ("tokens_in_all", "queries", "keys"), [(96, 12, 12), (8, 1, 1), (3, 1, 1), (8000, 100, 500)]
)
def test_clusters_are_as_many_as_the_sequence_bears(tokens_in_all, queries, keys, make):
    method = make("svg2", query_clusters=None, key_clusters=None, first_iterations=1).method
    x = torch.randn(1, tokens_in_all, 1, 2, generator=torch.Generator().manual_seed(0))
    assert method._clusters(x, 0, svg2.QUERY_CLUSTERS, None).centroids.shape[2] == queries
    assert method._clusters(x, 0, svg2.KEY_CLUSTERS, None).centroids.shape[2] == keys


def test_orders_are_permutations_that_leave_text_at_the_end(place, tokens, make):
    given, _, state, _, here = searched(make, place, tokens, where={"text_tokens": 5, "frames_before": 1})
    for name, count in (("query_order", here.num_queries), ("key_order", here.num_keys)):
        order = state[name]
        assert order.dtype == torch.int32
        assert torch.equal(order.sort(-1).values, torch.arange(count).expand_as(order).int())
        assert torch.equal(order[..., -5:], torch.arange(count - 5, count).expand(*order.shape[:2], -1).int())
    order = state["query_order"]
    assert torch.equal(taken(taken(given[0], order), inverse(order)), given[0])


def test_a_choice_from_its_tensors_is_the_same(place, tokens, make):
    given, out, state, report, here = searched(make, place, tokens)
    sizes = {"num_queries": here.num_queries, "num_keys": here.num_keys, "query_block": 16, "key_block": 16}
    again = Choice.of_tensors(dict(state), may_see_more=True, **sizes)
    assert torch.equal(again.attend(*given)[0], out)
    assert torch.equal(again.density_H, report.density_H)
