"""Settings: what cannot be is an error that says what can."""

import dataclasses

import pytest

from vidgen.sparsity.making import make_policy
from vidgen.sparsity.settings import POLICIES, SparsitySettings

WRONG = {
    "policy": ({"policy": "dense"}, "policy=dense: there are none, adaspa"),
    "density 0": ({"density": 0}, r"density=0: need more than 0 and at most 1"),
    "density above 1": ({"density": 1.5}, "density=1.5"),
    "recall": ({"policy": "adaspa", "recall": -0.1}, "recall=-0.1"),
    "recall elsewhere": ({"policy": "svg2", "recall": 0.9}, "only adaspa takes a recall"),
    "density and recall": ({"policy": "adaspa", "density": 0.2, "recall": 0.9}, "give one of them"),
    "top_p": ({"top_p": 0}, "top_p=0"),
    "min_share": ({"min_share": 2}, "min_share=2: need 0 to 1"),
    "dense_above": ({"dense_above": -1}, "dense_above=-1"),
    "blocks": ({"query_block": 0}, "query_block=0: need at least 1"),
    "clusters": ({"key_clusters": 0}, "key_clusters=0"),
    "iterations": ({"next_iterations": 0}, "next_iterations=0"),
    "no searches": ({"search_at": ()}, r"search_at=\(\): need one share"),
    "search at the end": ({"search_at": (0.2, 1)}, "each from 0 to below 1"),
    "layers": ({"dense_layers": -1}, "dense_layers=-1: need 0 or more"),
    "tile": ({"tile": (2, 0, 2)}, "tile="),
    "even window": ({"window": (3, 2, 3)}, "three odd numbers"),
    "even window of a head": ({"window": ((3, 3, 3), (1, 1, 2))}, "three odd numbers"),
    "radius": ({"radius": -1}, "radius=-1"),
    "frame radius": ({"frame_radius": -1}, "frame_radius=-1"),
    "drift": ({"restore": True, "restore_drift": 2}, "restore_drift=2"),
    "drift without restoration": ({"restore_drift": 0.04}, "set restore=True"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_is_an_error_of_one_line(case):
    given, message = WRONG[case]
    with pytest.raises(ValueError, match=message) as caught:
        SparsitySettings(**given)
    assert "\n" not in str(caught.value)


def test_settings_do_not_change():
    with pytest.raises(dataclasses.FrozenInstanceError):
        SparsitySettings().density = 0.5  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("name", POLICIES)
def test_every_name_has_a_policy_but_none(name):
    policy = make_policy(SparsitySettings(policy=name))
    assert policy is None if name == "none" else policy is not None and policy.name == name


@pytest.mark.parametrize(
    ("search_at", "num_steps", "steps"),
    [
        ((0.2, 0.6), 50, (10, 30)),
        ((0.2, 0.6), 8, (2, 5)),
        ((0.2, 0.6), 4, (1, 2)),
        ((0.2, 0.6), 1, (0,)),
        ((0.6, 0.2, 0.21), 10, (2, 6)),
        ((0,), 10, (0,)),
        ((0.9,), 1, ()),
    ],
)
def test_searches_are_at_shares_of_the_steps(search_at, num_steps, steps):
    assert SparsitySettings(search_at=search_at).search_steps(num_steps) == steps
