"""Windows and tiles against their definitions, among keys of further frames and text."""

from itertools import product
from typing import Any

import pytest
import torch

from vidgen.kernels.attention.windows import local, radial
from vidgen.sparsity.making import make_policy
from vidgen.sparsity.policy import Kind
from vidgen.sparsity.settings import SparsitySettings

SIZES = {
    "alone": {},
    "frames before": {"frames_before": 3},
    "frames before and after": {"frames_before": 1, "frames_after": 2},
    "text": {"frames_before": 1, "text_tokens": 5},
    "whole tiles": {"grid": (4, 4, 6), "frames_before": 2},
    "cut tiles": {"grid": (5, 3, 7), "frames_before": 3, "frames_after": 1, "text_tokens": 9},
    "frames in equal tiles": {"grid": (4, 3, 4), "frames_before": 5},  # 2 + 2, not 3 + 1
    "one token": {"grid": (1, 1, 1)},
}


def attended(given, seen):
    """Attention to the keys in a mask [1 or H, Q, K]."""
    query, key, value = (tensor.double() for tensor in given)
    logits = torch.einsum("bqhd,bkhd->bhqk", query, key) / 4
    return torch.einsum("bhqk,bkhd->bqhd", logits.masked_fill(~seen, -torch.inf).softmax(-1), value)


def tiles_seen(place, tile, window):
    """The mask by the definition: the tiles in the window around a query's tile, which keeps off the ends."""
    tile = [min(size, limit) for size, limit in zip(tile, place.grid, strict=True)]
    tile[0] = -(-place.grid[0] // -(-place.grid[0] // tile[0]))
    _, rows, columns = place.grid
    frame_tiles = []  # of each key frame: runs of frames are cut by themselves
    for frames in (place.frames_before, place.grid[0], place.frames_after):
        first = frame_tiles[-1] + 1 if frame_tiles else 0
        frame_tiles += [first + frame // tile[0] for frame in range(frames)]
    counts = frame_tiles[-1] + 1, -(-rows // tile[1]), -(-columns // tile[2])
    keys = [
        (frame_tiles[frame], row // tile[1], column // tile[2])
        for frame, row, column in product(range(place.key_frames), range(rows), range(columns))
    ]
    start = place.frames_before * rows * columns

    def sees(query, key):
        for at, other, count, size in zip(query, key, counts, window, strict=True):
            size = min(size, count)
            first = min(max(at - size // 2, 0), count - size)
            if not first <= other < first + size:
                return False
        return True

    video = place.num_queries - place.text_tokens
    mask = torch.ones(place.num_queries, place.num_keys, dtype=torch.bool)
    for index in range(video):
        mask[index, : len(keys)] = torch.tensor([sees(keys[start + index], key) for key in keys])
    return mask


@pytest.mark.parametrize("window", [(1, 1, 1), (3, 1, 3), (1, 3, 1)], ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_a_tile_sees_a_window_of_tiles_among_the_keys(size, window, place, tokens, make):
    here = place(4, **SIZES[size])
    seen = tiles_seen(here, (3, 2, 3), window)
    given = tokens(here)
    policy = make("sliding_tile", tile=(3, 2, 3), window=window)
    out, state, report = policy.attend(*given, here, {})
    torch.testing.assert_close(out.double(), attended(given, seen), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(report.density_H, seen.float().mean().expand(4))
    assert not state and report.kind == Kind.SPARSE


def test_each_head_may_have_a_window_of_its_own(place, tokens, make):
    here, windows = place(4, frames_before=2), ((1, 1, 1), (3, 1, 3), (1, 3, 1), (3, 3, 3))
    given = tokens(here)
    out, _, report = make("sliding_tile", tile=(3, 2, 3), window=windows).attend(*given, here, {})
    seen = torch.stack([tiles_seen(here, (3, 2, 3), window) for window in windows])
    torch.testing.assert_close(out.double(), attended(given, seen), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(report.density_H, seen.float().mean((1, 2)))


@pytest.mark.parametrize("name", ["radial", "local"])
@pytest.mark.parametrize("size", SIZES)
def test_windows_lie_around_the_queries_among_the_keys(name, size, place, tokens, make):
    here = place(4, **SIZES[size])
    given = tokens(here)
    sizes: dict[str, Any] = {
        "grid": here.grid,
        "key_frames": here.key_frames,
        "frame_offset": here.frames_before,
        "text_tokens": here.text_tokens,
    }
    if name == "radial":
        seen = radial(**sizes, query_block=4, key_block=4).dense_mask()[0]
    else:
        seen = local(**sizes, radius=1.5, frame_radius=1, query_block=16, key_block=16).dense_mask()[0]
    out, _, report = make(name).attend(*given, here, {})
    torch.testing.assert_close(out.double(), attended(given, seen), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(report.density_H, seen.float().mean().expand(4))


def test_a_layout_is_made_once_for_a_place(place, tokens, make):
    for name in ("sliding_tile", "radial", "local"):
        layouts = []
        for here in (place(4), place(7), place(7, layer=3)):
            query, key, value = tokens(here)
            layouts.append(make(name).attend(query, key, value, here, {})[2].layout)
        assert layouts[0] is layouts[1] is layouts[2]


@pytest.mark.parametrize("name", ["sliding_tile", "radial", "local"])
def test_default_settings_suit_a_small_grid(name, place, tokens):
    here = place(4, grid=(6, 4, 4), frames_before=2)
    for block in (16, 128):
        policy = make_policy(SparsitySettings(policy=name, query_block=block, key_block=block))
        assert policy is not None
        query, key, value = tokens(here)
        out, _, _ = policy.attend(query, key, value, here, {})
        assert out.isfinite().all()
