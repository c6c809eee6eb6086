"""Restoration: what it gives back, and what it is worth where tokens change."""

import pytest
import torch

from vidgen.kernels.attention.api import attention
from vidgen.kernels.attention.reference import attention_reference
from vidgen.sparsity.policy import Kind
from vidgen.sparsity.restore import drifted, restoration, restored

NAMES = ["adaspa", "svg2", "sliding_tile", "radial", "local"]
LEAST = {  # settings that leave out a good part
    "adaspa": {"density": 0.15},
    "svg2": {"top_p": 0.3},
    "sliding_tile": {"window": (1, 1, 1)},
    "radial": {},
    "local": {"radius": 1, "frame_radius": 0},
}


def errors(policy, place, tokens, steps, speed):
    """(distance from dense attention, report) at each step, of tokens that change by `speed` a step."""
    state, found = {}, []
    for step in steps:
        here = place(step, frames_before=1, text_tokens=3)
        given = tokens(here, change=speed * (step - 2), scattered=True)
        out, state, report = policy.attend(*given, here, state)
        found.append(((out - attention(*given)).norm().item(), report))
    return found


@pytest.mark.parametrize("name", NAMES)
def test_tokens_that_do_not_change_have_dense_attention(name, place, tokens, make):
    policy, state = make(name, restore=True, **LEAST[name]), {}
    for step in range(2, 10):  # beyond the second search, which changes what is seen
        here = place(step, frames_before=1, text_tokens=3)
        given = tokens(here)
        out, state, report = policy.attend(*given, here, state)
        torch.testing.assert_close(out, attention(*given), rtol=1e-4, atol=1e-5)
        if step > 2:
            assert (report.density_H < 1).all()


@pytest.mark.parametrize("name", NAMES)
def test_a_step_that_restoration_begins_at_has_the_bits_of_dense_attention(name, place, tokens, make):
    given, here = tokens(place(2)), place(2)
    out, _, report = make(name, restore=True, **LEAST[name]).attend(*given, here, {})
    assert torch.equal(out, attention(*given))
    assert (report.density_H == 1).all()


@pytest.mark.parametrize("name", NAMES)
def test_tokens_that_change_slowly_come_nearer_to_dense_attention(name, place, tokens, make):
    plain = errors(make(name, **LEAST[name]), place, tokens, range(2, 10), speed=0.2)
    better = errors(make(name, restore=True, **LEAST[name]), place, tokens, range(2, 10), speed=0.2)
    for (error, report), (restored_error, _) in zip(plain, better, strict=True):
        if report.kind != Kind.DENSE and report.place.step > 2:
            assert restored_error < 0.8 * error, report.place.step


def test_dense_attention_runs_at_the_first_search_only(place, tokens, make):
    for name in NAMES:
        reports = [
            report
            for _, report in errors(
                make(name, restore=True, **LEAST[name]), place, tokens, range(10), speed=0.1
            )
        ]
        assert [bool((report.density_H == 1).all()) for report in reports] == [True] * 3 + [False] * 7


def test_rho_is_the_share_of_the_sparse_part():
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 5, 2, 4, generator=generator) for _ in range(3))
    full, full_lse = attention_reference(query, key, value)
    sparse, sparse_lse = attention_reference(query, key[:, :3], value[:, :3])
    kept = restoration(full, full_lse, sparse, sparse_lse)
    weights = torch.einsum("bqhd,bkhd->bhqk", query.double(), key.double()).div(2).softmax(-1)
    torch.testing.assert_close(kept["rho"], weights[..., :3].sum(-1).float())
    rest = torch.einsum("bhqk,bkhd->bqhd", weights[..., 3:], value[:, 3:].double())
    torch.testing.assert_close(kept["residual"], rest, rtol=1e-5, atol=1e-6)
    again = restored(sparse, kept["rho"], kept["residual"])
    torch.testing.assert_close(again, full, rtol=1e-5, atol=1e-6)


def test_a_query_that_sees_nothing_has_all_its_attention_restored():
    full, lse = torch.randn(1, 3, 1, 4), torch.zeros(1, 1, 3)
    kept = restoration(full, lse, torch.zeros_like(full), torch.full_like(lse, -torch.inf))
    assert torch.equal(restored(torch.zeros_like(full), kept["rho"], kept["residual"]), full)


def test_drift_raises_rho_at_each_step_up_to_1(place, tokens, make):
    policy, state, rhos = make("adaspa", restore=True, restore_drift=0.25), {}, []
    for step in range(2, 6):
        _, state, _ = policy.attend(*tokens(place(step)), place(step), state)
        rhos.append(state["rho"])
    for before, after in zip(rhos, rhos[1:], strict=False):
        assert torch.equal(after, drifted(before, 0.25))
    assert rhos[-1].max() == 1
    assert drifted(torch.tensor([0.5, 0.9]), 0.25).tolist() == [0.75, 1.0]


def test_a_layout_that_is_restored_must_not_be_exceeded(place, tokens, make):
    for name in NAMES:
        for restore in (False, True):
            state = {}
            for step in (2, 3):
                policy = make(name, restore=restore)
                _, state, report = policy.attend(*tokens(place(step)), place(step), state)
            assert report.layout is not None
            assert not (restore and report.layout.may_see_more)
