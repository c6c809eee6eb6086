"""Laws of the layouts from geometry: equal to their rule asked one pair of tokens at a time."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vidgen.kernels.attention.layout import BlockLayout
from vidgen.kernels.attention.windows import dense, local, radial, sliding_window_3d

Place = tuple[int, int, int]


@dataclass(frozen=True, kw_only=True)
class Case:
    grid: Place
    before: int = 0
    after: int = 0
    text: int = 0
    query_block: int | None = None
    key_block: int | None = None

    @property
    def key_frames(self) -> int:
        return self.before + self.grid[0] + self.after

    @property
    def made_of(self) -> dict[str, object]:
        blocks = {"query_block": self.query_block, "key_block": self.key_block}
        return {
            "grid": self.grid,
            "key_frames": self.key_frames,
            "frame_offset": self.before,
            "text_tokens": self.text,
            **{name: block for name, block in blocks.items() if block is not None},
        }

    def places(self) -> tuple[list[Place], list[Place]]:
        """Of video queries and keys, both in key frames."""
        _, rows, columns = self.grid
        frames = range(self.before, self.before + self.grid[0])
        queries = list(product(frames, range(rows), range(columns)))
        return queries, list(product(range(self.key_frames), range(rows), range(columns)))

    def mask(self, sees: Callable[[Place, Place], bool]) -> Tensor:
        """[Q, K] of a rule for places; text sees all and is seen by all."""
        queries, keys = self.places()
        mask = torch.ones(len(queries) + self.text, len(keys) + self.text, dtype=torch.bool)
        mask[: len(queries), : len(keys)] = torch.tensor([[sees(q, k) for k in keys] for q in queries])
        return mask


@st.composite
def cases(draw: st.DrawFn, needs_blocks: bool = False) -> Case:
    grid = draw(st.integers(1, 4)), draw(st.integers(1, 4)), draw(st.integers(1, 5))
    block = st.integers(1, 25)
    blocks = st.tuples(block, block) if needs_blocks else st.tuples(block | st.none(), block | st.none())
    query_block, key_block = draw(blocks)
    return Case(
        grid=grid,
        before=draw(st.integers(0, 2)),
        after=draw(st.integers(0, 2)),
        text=draw(st.sampled_from([0, 0, 1, 3, 17])),
        query_block=query_block,
        key_block=key_block,
    )


radii = st.none() | st.integers(0, 5)


def in_window(radius: tuple[int | None, int | None, int | None]) -> Callable[[Place, Place], bool]:
    return lambda query, key: all(
        limit is None or abs(a - b) <= limit for a, b, limit in zip(query, key, radius, strict=True)
    )


def in_disc(radius: float, frame_radius: int | None) -> Callable[[Place, Place], bool]:
    return lambda query, key: (
        math.hypot(query[1] - key[1], query[2] - key[2]) <= radius + 1e-9
        and (frame_radius is None or abs(query[0] - key[0]) <= frame_radius)
    )


def in_radial(case: Case, has_sink: bool) -> Callable[[Place, Place], bool]:
    per_frame = case.grid[1] * case.grid[2]

    def sees(query: Place, key: Place) -> bool:
        gap = abs(query[0] - key[0])
        share = per_frame / 2 ** math.floor(math.log2(max(gap, 1)))
        apart = abs((query[1] - key[1]) * case.grid[2] + query[2] - key[2])
        if has_sink and key[0] == 0:
            return True
        return apart + 1 <= share if share >= 1 else apart == 0 and gap % math.ceil(1 / share) == 0

    return sees


def any_in_block(mask: Tensor, layout: BlockLayout) -> Tensor:
    """The mask with every block whole of which anything is True."""
    rows, columns = layout.num_rows, layout.num_key_blocks
    padded = torch.zeros(rows * layout.query_block, columns * layout.key_block, dtype=torch.bool)
    padded[: mask.shape[0], : mask.shape[1]] = mask
    blocks = padded.view(rows, layout.query_block, columns, layout.key_block).any(3).any(1)
    whole = blocks.repeat_interleave(layout.query_block, 0).repeat_interleave(layout.key_block, 1)
    return whole[: mask.shape[0], : mask.shape[1]]


@given(cases(), st.tuples(radii, radii, radii))
def test_a_sliding_window_is_what_lies_within_the_radius_along_every_axis(
    case: Case, radius: tuple[int | None, int | None, int | None]
):
    layout = sliding_window_3d(radius=radius, **case.made_of)  # pyright: ignore[reportArgumentType]
    assert torch.equal(layout.dense_mask()[0, 0], case.mask(in_window(radius)))
    assert not layout.may_see_more


@given(
    cases(), st.sampled_from([0, 0.5, 1, 1.5, math.sqrt(2), math.sqrt(13), 9]), st.none() | st.integers(0, 3)
)
def test_a_local_window_is_a_disc(case: Case, radius: float, frame_radius: int | None):
    layout = local(radius=radius, frame_radius=frame_radius, **case.made_of)  # pyright: ignore[reportArgumentType]
    assert torch.equal(layout.dense_mask()[0, 0], case.mask(in_disc(radius, frame_radius)))


def test_a_disc_has_its_rim_although_a_root_squared_is_less():
    radius = math.sqrt(13)
    assert radius * radius < 13
    seen = local(grid=(1, 9, 9), radius=radius).dense_mask()[0, 0, 4 * 9 + 4].view(9, 9)
    assert seen[4 + 3, 4 + 2] and not seen[4 + 3, 4 + 3]


@given(cases(needs_blocks=True), st.booleans())
def test_radial_is_every_block_of_which_its_rule_sees_anything(case: Case, has_sink: bool):
    layout = radial(first_frame_sink=has_sink, **case.made_of)  # pyright: ignore[reportArgumentType]
    expected = any_in_block(case.mask(in_radial(case, has_sink)), layout)
    assert torch.equal(layout.dense_mask()[0, 0], expected)
    assert layout.may_see_more and layout.partial is None


@pytest.mark.parametrize("per_frame", [(1, 1), (1, 3), (2, 2)], ids=str)
def test_radial_sees_far_frames_now_and_then_only(per_frame: tuple[int, int]):
    case = Case(grid=(40, *per_frame), query_block=1, key_block=1)
    layout = radial(first_frame_sink=False, **case.made_of)  # pyright: ignore[reportArgumentType]
    assert torch.equal(layout.dense_mask()[0, 0], case.mask(in_radial(case, False)))
    assert layout.density_BH < 0.6


@pytest.mark.parametrize("blocks", [{}, {"query_block": 16, "key_block": 16}], ids=["frames", "16"])
def test_away_from_borders_a_window_is_that_of_the_neighbour_shifted(blocks: dict[str, int]):
    grid, radius = (7, 8, 9), (1, 2, 3)
    mask = sliding_window_3d(grid=grid, radius=radius, **blocks).dense_mask()[0, 0].view(*grid, *grid)
    inner = [range(limit, size - limit) for limit, size in zip(radius, grid, strict=True)]
    middle = mask[3, 4, 4]
    for frame, row, column in product(*inner):
        shifted = middle.roll((frame - 3, row - 4, column - 4), (0, 1, 2))
        assert torch.equal(mask[frame, row, column], shifted)
    assert mask[0, 0, 0].sum() == 2 * 3 * 4  # at a corner the window is cut, not shifted inwards


@given(cases(), st.tuples(radii, radii, radii))
@settings(max_examples=40)
def test_seeing_is_mutual_and_every_query_sees_its_own_place(
    case: Case, radius: tuple[int | None, int | None, int | None]
):
    layout = sliding_window_3d(radius=radius, **case.made_of)  # pyright: ignore[reportArgumentType]
    mask = layout.dense_mask()[0, 0]
    queries, keys = case.places()
    own = torch.tensor([keys.index(place) for place in queries])
    among_own = mask[: len(queries)][:, own]
    assert among_own.diagonal().all()
    assert torch.equal(among_own, among_own.T)


@given(st.integers(1, 50), st.integers(1, 50), st.integers(1, 20), st.integers(1, 20))
def test_dense_sees_everything_in_whole_blocks(queries: int, keys: int, query_block: int, key_block: int):
    layout = dense(queries, keys, query_block, key_block)
    assert layout.dense_mask().shape == (1, 1, queries, keys)
    assert layout.dense_mask().all() and layout.partial is None
    assert layout.work == 1 and layout.density_BH.item() == pytest.approx(1)


@pytest.mark.parametrize(
    "layout",
    [
        sliding_window_3d(grid=(3, 4, 5), radius=(None, None, None), query_block=7, key_block=16),
        sliding_window_3d(grid=(3, 4, 5), radius=(9, 9, 9), key_frames=5, text_tokens=3),
        local(grid=(3, 4, 5), radius=9),
    ],
    ids=["no limit", "wide", "disc"],
)
def test_a_window_as_wide_as_the_grid_has_whole_blocks_only(layout: BlockLayout):
    assert layout.dense_mask().all() and layout.partial is None


def test_one_tile_serves_all_frames():
    layout = sliding_window_3d(grid=(5, 4, 6), radius=(1, 1, 2))
    assert (layout.query_block, layout.key_block) == (24, 24)
    assert layout.partial is not None and len(layout.partial.tiles_Nqk) == 1
    assert layout.partial.lists.counts_BHR.flatten().tolist() == [2, 3, 3, 3, 2]


@pytest.mark.parametrize(
    "make",
    [
        lambda: dense(30, 40),
        lambda: sliding_window_3d(grid=(2, 3, 4), radius=(1, 1, 1)),
        lambda: local(grid=(2, 3, 4), radius=2, key_frames=4, frame_offset=1),
        lambda: radial(grid=(2, 3, 4)),
    ],
    ids=["dense", "window", "disc", "radial"],
)
def test_equal_arguments_give_the_same_layout(make: Callable[[], BlockLayout]):
    assert make() is make()


def test_arguments_left_out_are_the_same_as_said():
    said = sliding_window_3d(
        grid=(2, 3, 4), radius=(1, 1, 1), key_frames=2, frame_offset=0, query_block=12, key_block=12
    )
    assert sliding_window_3d(grid=(2, 3, 4), radius=(1, 1, 1)) is said


@pytest.mark.parametrize(("frames", "key_frames", "frame_offset"), [(3, 2, 0), (3, 4, 2), (3, 4, -1)])
def test_query_frames_outside_the_key_frames_are_an_error(frames: int, key_frames: int, frame_offset: int):
    with pytest.raises(ValueError, match=f"{key_frames} key frames"):
        sliding_window_3d(
            grid=(frames, 2, 2), radius=(1, 1, 1), key_frames=key_frames, frame_offset=frame_offset
        )


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: sliding_window_3d(grid=(3, 2, 2), radius=(1, -1, 1), key_frames=3), "radius"),
        (lambda: local(grid=(3, 2, 2), radius=-1), "radius=-1"),
        (lambda: local(grid=(3, 2, 2), radius=1, frame_radius=-2), "frame_radius=-2"),
        (lambda: radial(grid=(3, 0, 2)), "grid"),
        (lambda: radial(grid=(3, 2, 2), text_tokens=-1), "text_tokens=-1"),
        (lambda: radial(grid=(3, 2, 2), query_block=0), "query_block=0"),
        (lambda: sliding_window_3d(grid=(3, 2, 2), radius=(1, 1, 1), key_block=-4), "key_block=-4"),
        (lambda: dense(4, 4, 0, 4), "query_block=0"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_is_an_error_that_names_it(make: Callable[[], BlockLayout], says: str):
    with pytest.raises(ValueError, match=says):
        make()
