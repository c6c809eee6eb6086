"""Laws of attention: equal to the softmax written out under an explicit mask, for odd sizes."""

import math
from dataclasses import dataclass
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from vidgen.kernels.attention.api import attention
from vidgen.kernels.attention.layout import BlockLayout
from vidgen.kernels.attention.windows import sliding_window_3d


@dataclass(frozen=True)
class Case:
    grid: tuple[int, int, int]
    radius: tuple[int | None, int | None, int | None]
    before: int = 0
    after: int = 0
    heads: int = 2
    head_dim: int = 8

    def __str__(self) -> str:
        frames, rows, columns = self.grid
        radius = ",".join("all" if r is None else str(r) for r in self.radius)
        return (
            f"{self.before}+{frames}+{self.after}x{rows}x{columns}-r{radius}-H{self.heads}-D{self.head_dim}"
        )

    @property
    def key_frames(self) -> int:
        return self.before + self.grid[0] + self.after

    def layout(self) -> BlockLayout:
        return sliding_window_3d(
            grid=self.grid, radius=self.radius, key_frames=self.key_frames, frame_offset=self.before
        )

    def mask(self) -> Tensor:
        """[Q, K] True where every axis' distance is at most its radius, one pair of places at a time."""
        frames, rows, columns = self.grid
        queries = product(range(self.before, self.before + frames), range(rows), range(columns))
        keys = list(product(range(self.key_frames), range(rows), range(columns)))
        return torch.tensor(
            [
                [
                    all(r is None or abs(a - b) <= r for a, b, r in zip(q, k, self.radius, strict=True))
                    for k in keys
                ]
                for q in queries
            ]
        )


CASES = [
    Case((3, 3, 5), (1, 1, 1)),
    Case((3, 3, 5), (1, 1, 2), before=2, after=3),
    Case((1, 5, 3), (2, 0, 1), before=4, after=1),
    Case((5, 1, 7), (0, None, 2), before=1, after=1),
    Case((4, 3, 3), (2, None, None), before=3, after=2),
    Case((3, 7, 1), (None, 2, None), before=1),
    Case((3, 5, 3), (None, None, 0), after=2),
    Case((2, 3, 3), (0, 0, 0), before=1, after=1),
    Case((2, 3, 3), (None, None, None), before=1, after=1),
    Case((3, 2, 3), (9, 9, 9), before=1, after=2),
    Case((7, 3, 5), (1, 1, 1), before=1, after=1, heads=1, head_dim=5),
    Case((1, 1, 1), (0, 0, 0)),
]


def explicit(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None = None
) -> Tensor:
    """The softmax written out, in float64."""
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    scores = torch.einsum("bqhd,bkhd->bhqk", query.double(), key.double()) * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    weights = (scores - scores.amax(dim=-1, keepdim=True)).exp()
    weights = weights / weights.sum(dim=-1, keepdim=True)
    return torch.einsum("bhqk,bkhd->bqhd", weights, value.double()).float()


def draw(case: Case, batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    tokens = case.grid[1] * case.grid[2]

    def tensor(frames: int) -> Tensor:
        return torch.randn(batch, frames * tokens, case.heads, case.head_dim, generator=generator)

    return tensor(case.grid[0]), tensor(case.key_frames), tensor(case.key_frames)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_sliding_window_equals_attention_under_the_explicit_mask(case: Case):
    qkv = draw(case)
    found = attention(*qkv, layout=case.layout())
    torch.testing.assert_close(found, explicit(*qkv, case.mask()), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_without_a_layout_every_query_sees_every_key(case: Case):
    qkv = draw(case)
    torch.testing.assert_close(attention(*qkv), explicit(*qkv, None), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("layout", [None, CASES[1].layout()], ids=["dense", "window"])
def test_scale_multiplies_the_scores(layout: Any):
    qkv, mask = draw(CASES[1]), None if layout is None else CASES[1].mask()
    for scale in (0.1, 2.0):
        found = attention(*qkv, layout=layout, scale=scale)
        torch.testing.assert_close(found, explicit(*qkv, mask, scale), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("case", CASES[1:4], ids=str)
def test_keys_outside_the_window_do_not_matter_at_all(case: Case):
    """However large they are; these windows are narrower than the context around them."""
    query, key, value = draw(case)
    unseen = ~case.mask().any(dim=0)
    assert unseen.any()
    poisoned = key.clone()
    poisoned[:, unseen] = 1e30
    assert torch.equal(
        attention(query, poisoned, value, layout=case.layout()),
        attention(query, key, value, layout=case.layout()),
    )


def test_a_constant_value_comes_back_as_it_is():
    """The weights of every query sum to one."""
    for case in CASES:
        query, key, value = draw(case)
        found = attention(query, key, torch.full_like(value, 3.0), layout=case.layout())
        torch.testing.assert_close(found, torch.full_like(found, 3.0))


@pytest.mark.parametrize(("drop_queries", "drop_keys"), [(1, 0), (0, 1), (3, 3)])
def test_tokens_that_do_not_fit_the_layout_are_an_error_that_says_what_does(
    drop_queries: int, drop_keys: int
):
    case = CASES[1]
    query, key, value = draw(case)
    num_queries, num_keys = query.shape[1], key.shape[1]
    with pytest.raises(
        ValueError, match=rf"{num_queries - drop_queries} queries .*\({num_queries}, {num_keys}\)"
    ):
        attention(query[:, drop_queries:], key[:, drop_keys:], value[:, drop_keys:], layout=case.layout())
