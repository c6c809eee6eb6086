"""Queries, keys and values whose attention has structure, and policies for small grids."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from vidgen.sparsity.making import make_policy
from vidgen.sparsity.policy import Place, Policy
from vidgen.sparsity.settings import SparsitySettings

# B batch, S tokens, H heads, D head dimension

GROUPS = 9


def make_place(step: int = 2, **changes: Any) -> Place:
    """A place of 5 x 3 x 7 tokens, no multiple of any block; of 10 steps, 2 and 6 are searches."""
    given: dict[str, Any] = {"layer": 1, "num_layers": 4, "num_steps": 10, "grid": (5, 3, 7)}
    return Place(**(given | changes), step=step)


def make_tokens(
    place: Place,
    *,
    heads: int = 4,
    batch: int = 1,
    scattered: bool = False,
    change: float = 0.0,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key, value [B, S, H, D]: a token looks for those of its own group, head 0 most sharply.

    Groups are runs of tokens, or scattered; `change` moves all tokens by so much of a fixed noise.
    """
    generator = torch.Generator().manual_seed(0)
    directions = torch.linalg.qr(torch.randn(heads, 16, 16, generator=generator))[0][:, :GROUPS]
    before = place.frames_before * place.grid[1] * place.grid[2]
    group = torch.arange(place.num_keys) * GROUPS // place.num_keys
    if scattered:
        group = group[torch.randperm(place.num_keys, generator=generator)]
    own = torch.arange(before, before + place.num_queries).clamp(max=place.num_keys - 1)
    key = directions[:, group].transpose(0, 1)
    sharpness = torch.linspace(28, 6, heads).view(-1, 1)

    def noisy(x_SHD: Tensor) -> Tensor:
        shape = batch, *x_SHD.shape
        noise, moves = (torch.randn(shape, generator=generator) for _ in range(2))
        return (x_SHD + 0.1 * noise + 0.1 * change * moves).to(dtype)

    return noisy(key[own] * sharpness), noisy(key), noisy(torch.randn(key.shape, generator=generator))


SETTINGS: dict[str, dict[str, Any]] = {
    "adaspa": {"density": 0.3},
    "svg2": {"query_clusters": 9, "key_clusters": 9, "top_p": 0.5, "min_share": 0.05},
    "sliding_tile": {"tile": (2, 2, 2), "window": (1, 3, 1)},
    "radial": {"query_block": 4, "key_block": 4},
    "local": {"radius": 1.5, "frame_radius": 1},
}


def policy_of(name: str, **changes: Any) -> Policy:
    """A policy for small grids."""
    usual = {"policy": name, "query_block": 16, "key_block": 16, "dense_above": 1.0}
    usual |= {"search_at": (0.2, 0.6), "restore": False} | SETTINGS[name]
    if "recall" in changes:
        usual.pop("density", None)  # it is one or the other
    given = usual | changes
    policy = make_policy(SparsitySettings(**given))
    assert policy is not None
    return policy


@pytest.fixture
def place() -> Callable[..., Place]:
    return make_place


@pytest.fixture
def tokens() -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    return make_tokens


@pytest.fixture
def make() -> Callable[..., Policy]:
    return policy_of
