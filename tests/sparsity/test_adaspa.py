"""AdaSpa: how many blocks a head keeps, which, and what later searches compute."""

from itertools import combinations_with_replacement
from typing import Any

import pytest
import torch

from vidgen.kernels.attention import select
from vidgen.kernels.attention.api import attention
from vidgen.kernels.attention.reference import attention_reference, block_mass_reference
from vidgen.sparsity import scheduled
from vidgen.sparsity.adaspa import adapted, on_levels
from vidgen.sparsity.policy import Kind

BLOCKS: dict[str, Any] = {"query_block": 16, "key_block": 16}


def exact_mass(query, key, value):
    _, lse = attention_reference(query, key, value)
    return block_mass_reference(query, key, lse, **BLOCKS)


def search(make, place, tokens, here=None, **changes):
    """(the layout chosen, report, the exact mass) of the first search."""
    here = here or place(2, frames_before=2)
    policy = make("adaspa", **changes)
    given = tokens(here)
    _, state, report = policy.attend(*given, here, {})
    _, _, after = policy.attend(*given, here, state)
    return after.layout, report, exact_mass(*given)


@pytest.mark.parametrize("density", [0.1, 0.3, 0.5])
def test_every_row_of_a_head_keeps_as_many_blocks(density, place, tokens, make):
    layout, _, _ = search(make, place, tokens, density=density, head_adaptive=False)
    assert (layout.full.counts_BHR == round(density * layout.num_key_blocks)).all()


def test_the_blocks_kept_are_those_of_most_mass(place, tokens, make):
    layout, _, mass = search(make, place, tokens, density=0.3, head_adaptive=False)
    kept = layout.block_mask()
    least_kept = mass.masked_fill(~kept, torch.inf).amin(-1)
    most_left = mass.masked_fill(kept, -torch.inf).amax(-1)
    assert (least_kept >= most_left).all()


def test_the_recall_told_is_the_mass_kept(place, tokens, make):
    for changes in ({"density": 0.2}, {"recall": 0.9}, {"density": 0.4, "head_adaptive": False}):
        layout, report, mass = search(make, place, tokens, **changes)
        torch.testing.assert_close(report.recall_H, select.recall(mass, layout).mean(0).float())


def test_recall_grows_with_density(place, tokens, make):
    recalls = [
        search(make, place, tokens, density=density, head_adaptive=False)[1].recall_H
        for density in (0.08, 0.2, 0.4, 0.7, 0.9)
    ]
    assert all((more > less).all() for less, more in zip(recalls, recalls[1:], strict=False))


@pytest.mark.parametrize("recall", [0.5, 0.8, 0.95, 0.999])
@pytest.mark.parametrize("heads", [1, 3], ids=lambda heads: f"{heads} heads")
def test_a_recall_is_reached_with_the_smallest_level(recall, heads, place, tokens, make):
    here = place(2, frames_before=2)
    policy, given = make("adaspa", recall=recall), tokens(here, heads=heads)
    _, state, report = policy.attend(*given, here, {})
    assert (report.recall_H >= recall).all()
    mass = exact_mass(*given)
    for head in range(heads):  # so few heads have a level each
        count = int(state["counts"][0, head, 0])
        if count > 1:
            own = mass[:, head : head + 1]
            less = select.top_k(
                own, count - 1, num_queries=here.num_queries, num_keys=here.num_keys, **BLOCKS
            )
            assert select.recall(own, less).item() < recall


def test_a_layer_has_at_most_three_levels(place, tokens, make):
    here = place(2, frames_before=2)
    _, state, report = make("adaspa", recall=0.9).attend(*tokens(here, heads=9), here, {})
    assert len(state["counts"].unique()) <= 3
    assert (report.recall_H >= 0.9).all()


@pytest.mark.parametrize(
    "needs", [[5, 1, 9, 2, 7, 7], [3, 3], [1], [4, 8, 1], [1, 2, 3, 4, 10, 11, 12]], ids=str
)
def test_levels_are_the_cheapest_that_suffice(needs):
    found = on_levels(needs)
    assert all(level >= need for level, need in zip(found, needs, strict=True))
    cheapest = min(
        sum(min(level for level in (*levels, max(needs)) if level >= need) for need in needs)
        for levels in combinations_with_replacement(range(1, max(needs) + 1), 2)
    )
    assert sum(found) == cheapest
    assert len(set(found)) <= 3


@pytest.mark.parametrize("density", [0.2, 0.5, 0.8])
def test_adapting_to_heads_keeps_the_mean(density, place, tokens, make):
    layout, _, _ = search(make, place, tokens, density=density, head_adaptive=True)
    counts = layout.full.counts_BHR[0, :, 0]
    assert counts.float().mean() == round(density * layout.num_key_blocks)
    if density == 0.2:
        assert len(counts.unique()) > 1


def test_heads_of_high_recall_give_to_those_of_low_recall():
    recall = torch.tensor([[0.95, 0.3, 0.85, 0.6, 0.5, 0.7], [0.99, 0.98, 0.97, 0.96, 0.95, 0.94]])
    assert adapted(recall).tolist() == [[-1, 1, -1, 0, 1, 0], [-1, -1, -1, 1, 1, 1]]
    assert adapted(torch.tensor([[0.1, 0.2]])).tolist() == [[0, 0]]
    assert adapted(torch.tensor([[0.9]])).tolist() == [[0]]


def test_later_searches_run_no_dense_attention(place, tokens, make, monkeypatch):
    policy, state, layouts, lse = make("adaspa"), {}, [], torch.empty(0)
    for step in range(2, 10):
        here = place(step)
        _, state, report = policy.attend(*tokens(here, change=0.3 * step), here, state)
        layouts.append(report.layout)
        if step == 2:
            assert report.layout is None, "the first search is dense"
            lse = state["lse"]

            def no_dense(*tensors, **_):
                raise AssertionError("dense attention")

            monkeypatch.setattr(scheduled, "attention", no_dense)
        if step == 6:
            assert report.kind == Kind.SEARCH
        if step < 6:
            assert torch.equal(state["lse"], lse)
    assert layouts[3] is layouts[1] and layouts[7] is layouts[4]
    assert not torch.equal(layouts[4].block_mask(), layouts[3].block_mask())
    assert "lse" not in state, "nothing to search for any more"


def test_a_later_search_chooses_by_the_log_sum_exps_of_the_first(place, tokens, make):
    policy = make("adaspa", head_adaptive=False)
    first, later = place(2), place(6)
    _, state, _ = policy.attend(*tokens(first), first, {})
    query, key, value = tokens(later, change=5)
    _, after, report = policy.attend(query, key, value, later, state)
    mass = block_mass_reference(query, key, state["lse"], **BLOCKS)
    torch.testing.assert_close(report.recall_H, select.recall(mass, report.layout).mean(0).float())
    assert torch.equal(after["counts"], report.layout.full.counts_BHR)


@pytest.mark.parametrize("restore", [False, True], ids=["plain", "restored"])
@pytest.mark.parametrize("flat_first", [True, False], ids=["flat then sharp", "sharp then flat"])
def test_a_choice_of_too_much_is_dense_until_the_next_search(flat_first, restore, place, tokens, make):
    policy, state = make("adaspa", recall=0.9, dense_above=0.7, restore=restore), {}
    for step in range(2, 10):
        here, is_flat = place(step), flat_first == (step < 6)
        query, key, value = tokens(here)
        query = 0.01 * query if is_flat else query
        out, state, report = policy.attend(query, key, value, here, state)
        assert (report.kind == Kind.SEARCH) == (step in (2, 6))
        if is_flat:
            assert torch.equal(out, attention(query, key, value))
            assert report.layout is None
        elif step not in (2, 6):
            assert report.kind == Kind.SPARSE


def test_text_counts_among_the_blocks_of_a_row(place, tokens, make):
    here = place(2, text_tokens=20)  # the last 20 of 125 tokens: blocks 6 and 7 of 8
    layout, report, _ = search(make, place, tokens, here, density=0.5, head_adaptive=False)
    mask = layout.block_mask()
    assert mask[..., 6:].all() and mask[:, :, 6:].all()
    assert (mask[:, :, :6].sum(-1) == 4).all()


def test_a_share_too_small_for_text_keeps_one_block_more(place, tokens, make):
    here = place(2, text_tokens=20)
    layout, _, _ = search(make, place, tokens, here, density=0.01)
    assert (layout.block_mask()[:, :, :6].sum(-1) == 3).all()
