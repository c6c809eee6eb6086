"""Laws of every policy: when it is dense, what its state may be, what it must keep."""

import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file

from vidgen.kernels.attention.api import attention
from vidgen.sparsity.policy import Kind
from vidgen.sparsity.settings import POLICIES

NAMES = [name for name in POLICIES if name != "none"]
SEARCHING = ["adaspa", "svg2"]
RESTORING = [False, True]


def run(policy, place, tokens, steps, state=None, **more):
    """(outputs, the last state, reports) of some steps, tokens changing a little from step to step."""
    outs, reports, state = [], [], state or {}
    for step in steps:
        here = place(step, **more)
        out, state, report = policy.attend(*tokens(here, change=0.1 * step), here, state)
        outs.append(out)
        reports.append(report)
    return outs, state, reports


@pytest.mark.parametrize("keeping", [{"density": 1}, {"recall": 1}, {"dense_above": 0}], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_a_policy_that_keeps_all_has_the_bits_of_dense_attention(name, keeping, place, tokens, make):
    outs, _, reports = run(make(name, **keeping), place, tokens, range(10), frames_before=2)
    for step, (out, report) in enumerate(zip(outs, reports, strict=True)):
        assert torch.equal(out, attention(*tokens(place(step, frames_before=2), change=0.1 * step)))
        assert (report.density_H == 1).all()


@pytest.mark.parametrize("name", NAMES)
def test_steps_before_the_first_search_are_dense_and_leave_nothing(name, place, tokens, make):
    outs, state, reports = run(make(name), place, tokens, range(2))
    assert torch.equal(outs[1], attention(*tokens(place(1), change=0.1)))
    assert not state
    assert {report.kind for report in reports} == {Kind.DENSE}


@pytest.mark.parametrize("name", NAMES)
def test_the_first_layers_are_dense_when_asked_for(name, place, tokens, make):
    policy = make(name, dense_layers=2)
    for layer, is_dense in ((1, True), (2, False)):
        _, _, reports = run(policy, place, tokens, range(2, 9), layer=layer)
        assert ({report.kind for report in reports} == {Kind.DENSE}) == is_dense


@pytest.mark.parametrize("restore", RESTORING, ids=["plain", "restored"])
@pytest.mark.parametrize("name", NAMES)
def test_sparse_steps_see_less_than_all(name, restore, place, tokens, make):
    outs, _, reports = run(make(name, restore=restore), place, tokens, range(10), text_tokens=3)
    assert reports[3].kind == Kind.SPARSE
    assert reports[3].density_H.shape == (4,)
    assert (reports[3].density_H < 0.97).all()
    assert not torch.equal(outs[3], attention(*tokens(place(3, text_tokens=3), change=0.3)))
    assert all(out.isfinite().all() for out in outs)


@pytest.mark.parametrize("name", SEARCHING)
def test_searches_are_where_they_are_asked_for(name, place, tokens, make):
    _, _, reports = run(make(name, search_at=(0.3, 0.5, 0.9)), place, tokens, range(10))
    kinds = [report.kind for report in reports]
    assert [step for step, kind in enumerate(kinds) if kind == Kind.SEARCH] == [3, 5, 9]
    for report in reports:
        assert (report.recall_H is not None) == (report.kind == Kind.SEARCH)
        assert (report.search_s > 0) == (report.kind == Kind.SEARCH)


@pytest.mark.parametrize("name", SEARCHING)
def test_a_search_that_was_passed_over_is_made_at_the_next_step(name, place, tokens, make):
    _, _, reports = run(make(name), place, tokens, [2, 3, 7, 8])
    assert [report.kind for report in reports] == [Kind.SEARCH, Kind.SPARSE, Kind.SEARCH, Kind.SPARSE]


@pytest.mark.parametrize("restore", RESTORING, ids=["plain", "restored"])
@pytest.mark.parametrize("name", NAMES)
def test_a_state_from_disk_goes_on_with_the_same_bits(name, restore, place, tokens, make, tmp_path):
    policy = make(name, restore=restore, restore_drift=0.01 * restore)
    _, state, _ = run(policy, place, tokens, range(5), text_tokens=3)
    assert all(tensor.is_contiguous() for tensor in state.values())
    save_file(dict(state), tmp_path / "state.safetensors")
    loaded = load_file(tmp_path / "state.safetensors")
    expected, last, _ = run(policy, place, tokens, range(5, 10), state, text_tokens=3)
    for copy in (loaded, pickle.loads(pickle.dumps(state)), state):
        outs, end, _ = run(policy, place, tokens, range(5, 10), copy, text_tokens=3)
        assert all(map(torch.equal, outs, expected))
        assert end.keys() == last.keys()
        assert all(torch.equal(end[key], last[key]) for key in end)


@pytest.mark.parametrize("restore", RESTORING, ids=["plain", "restored"])
@pytest.mark.parametrize("name", NAMES)
def test_a_state_is_not_changed(name, restore, place, tokens, make):
    policy = make(name, restore=restore, restore_drift=0.01 * restore)
    _, state, _ = run(policy, place, tokens, range(4))
    before = {key: tensor.clone() for key, tensor in state.items()}
    run(policy, place, tokens, range(4, 10), state)
    assert before.keys() == state.keys()
    assert all(torch.equal(before[key], state[key]) for key in before)


MISFITS = {
    "following frames appear": {"frames_after": 1},
    "an anchor comes in": {"frames_before": 3},
    "other frames of as many keys": {"frames_before": 1, "frames_after": 1},
    "another resolution": {"grid": (5, 7, 3)},
    "text": {"text_tokens": 2},
}


@pytest.mark.parametrize("restore", RESTORING, ids=["plain", "restored"])
@pytest.mark.parametrize("change", MISFITS)
@pytest.mark.parametrize("name", NAMES)
def test_a_state_of_other_tokens_is_dropped(name, change, restore, place, tokens, make):
    policy = make(name, restore=restore)
    _, state, _ = run(policy, place, tokens, range(4), frames_before=2)
    more = {"frames_before": 2} | MISFITS[change]
    outs, after, reports = run(policy, place, tokens, [4, 5], state, **more)
    expected, fresh, _ = run(policy, place, tokens, [4, 5], **more)
    assert all(map(torch.equal, outs, expected))
    assert after.keys() == fresh.keys()
    assert all(torch.equal(after[key], fresh[key]) for key in after)
    if name in SEARCHING:
        assert reports[0].kind == Kind.SEARCH


@pytest.mark.parametrize("name", NAMES)
def test_text_is_seen_by_all_and_sees_all(name, place, tokens, make):
    policy, more = make(name), {"frames_before": 1, "text_tokens": 5}
    _, state, _ = run(policy, place, tokens, range(4), **more)
    here = place(4, **more)
    query, key, value = tokens(here)
    # a value of 1 for one token alone: it is what is seen if and only if there is anything
    marked = torch.zeros_like(value)
    marked[:, -5:] = 1
    query = 0.1 * query  # far enough from 0 for every pair
    out, _, _ = policy.attend(query, key, marked, here, state)
    assert (out > 0).all()
    out, _, _ = policy.attend(query, key, value, here, state)
    torch.testing.assert_close(out[:, -5:], attention(query, key, value)[:, -5:])


@pytest.mark.parametrize("name", NAMES)
def test_batch_entries_do_not_mix(name, place, tokens, make):
    policy = make(name, restore=True)
    states = [{}, {}, {}]
    for step in (2, 3, 6, 7):
        both = tokens(place(step), batch=2, change=0.1 * step)
        parts = [both, *(tuple(t[i : i + 1] for t in both) for i in range(2))]
        outs = []
        for index, part in enumerate(parts):
            out, states[index], _ = policy.attend(*part, place(step), states[index])
            outs.append(out)
        torch.testing.assert_close(outs[0], torch.cat(outs[1:]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_stays(name, dtype, place, tokens, make):
    policy, state = make(name, restore=True), {}
    for step in (2, 3, 6, 7):
        out, state, _ = policy.attend(*tokens(place(step), dtype=dtype), place(step), state)
        assert out.dtype == dtype
        exact = attention(*(tensor.float() for tensor in tokens(place(step), dtype=dtype)))
        assert (out.float() - exact).abs().max() < 0.1


def test_tensors_of_other_sizes_are_an_error(place, tokens, make):
    with pytest.raises(ValueError, match="105 queries and 105 keys: this place needs 105 and 126"):
        make("adaspa").attend(*tokens(place(2)), place(2, frames_before=1), {})


def test_a_schedule_without_a_step_to_search_at_is_dense(place, tokens, make):
    outs, _, reports = run(make("svg2", search_at=(0.9,)), place, tokens, [0], num_steps=1)
    assert reports[0].kind == Kind.DENSE
    assert torch.equal(outs[0], attention(*tokens(place(0))))
