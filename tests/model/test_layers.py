"""Laws of a layer's parts: context as keys and values is attention over the concatenation."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from vidgen.kernels.attention.windows import sliding_window_3d
from vidgen.kernels.rope.reference import rotate
from vidgen.model.context import KeyValue, concatenate
from vidgen.model.layers import NoiseLevelEmbedding, Positions, RMSNorm, SelfAttention
from vidgen.model.rope import rotations

ROWS, COLUMNS, WIDTH, HEADS = 3, 2, 24, 2
TOKENS = ROWS * COLUMNS


def positions(frames: int, before: int = 0, after: int = 0, window: Any = None) -> Positions:
    key_frames = before + frames + after
    turns = rotations((key_frames, ROWS, COLUMNS), WIDTH // HEADS, 100.0, torch.device("cpu"))
    layout = window and sliding_window_3d(
        grid=(frames, ROWS, COLUMNS), radius=window, key_frames=key_frames, frame_offset=before
    )
    return Positions(*turns, slice(before * TOKENS, (before + frames) * TOKENS), layout)


@pytest.fixture
def attend(dit: Any) -> SelfAttention:
    return dit(width=WIDTH, num_heads=HEADS).layers[1].self_attention


def explicit(attend: SelfAttention, tokens: Tensor, own: slice) -> Tensor:
    """Every own frame's tokens attend to all tokens [F, S, D]; the softmax written out, in float64."""
    frames = tokens.shape[0]
    turns = rotations((frames, ROWS, COLUMNS), WIDTH // HEADS, 100.0, torch.device("cpu"))

    def heads(x: Tensor) -> Tensor:
        return x.double().flatten(0, 1).unflatten(-1, (HEADS, -1))

    query = rotate(heads(attend.query_norm(attend.query(tokens)))[None], *turns)[0]
    key = rotate(heads(attend.key_norm(attend.key(tokens)))[None], *turns)[0]
    value = heads(attend.value(tokens))
    scores = torch.einsum("qhd,khd->hqk", query, key) / math.sqrt(WIDTH // HEADS)
    weights = scores.exp() / scores.exp().sum(dim=-1, keepdim=True)
    out = torch.einsum("hqk,khd->qhd", weights, value).flatten(1).unflatten(0, (frames, TOKENS))[own]
    return torch.nn.functional.linear(out, attend.out.weight.double(), attend.out.bias.double())


@pytest.mark.parametrize(("before", "after"), [(0, 0), (2, 0), (0, 3), (2, 1), (5, 5)])
def test_context_keys_equal_attention_over_the_concatenation(
    before: int, after: int, attend: SelfAttention, draw: Any
):
    frames = 3
    tokens = draw(before + frames + after, TOKENS, WIDTH)
    parts = tokens.split((before, frames, after))

    def lent(part: Tensor) -> KeyValue | None:
        """K,V as the neighbour makes them: at other places, in another forward."""
        return attend(part[None], positions(part.shape[0]), None, None)[1] if part.shape[0] else None

    found, own = attend(parts[1][None], positions(frames, before, after), lent(parts[0]), lent(parts[2]))
    expected = explicit(attend, tokens, slice(before, before + frames))
    torch.testing.assert_close(found[0].double(), expected, rtol=1e-5, atol=1e-5)

    whole, _ = attend(tokens[None], positions(before + frames + after), None, None)
    torch.testing.assert_close(found[0], whole[0, before : before + frames], rtol=1e-5, atol=1e-5)
    assert own.num_frames == frames
    assert torch.equal(own.key_BFSHD.flatten(-2), attend.key_norm(attend.key(parts[1][None])))


def test_windowed_context_keys_equal_the_windowed_concatenation(attend: SelfAttention, draw: Any):
    tokens, window = draw(1, 7, TOKENS, WIDTH), (2, 1, 1)
    parts = tokens.split((2, 3, 2), dim=1)
    before, after = (attend(part, positions(2), None, None)[1] for part in (parts[0], parts[2]))
    found, _ = attend(parts[1], positions(3, 2, 2, window), before, after)
    whole, _ = attend(tokens, positions(7, window=window), None, None)
    torch.testing.assert_close(found, whole[:, 2:5], rtol=1e-5, atol=1e-5)


def test_concatenated_context_is_its_parts_in_order_layer_by_layer(draw: Any):
    first, second = (
        tuple(KeyValue(draw(1, frames, 2, 1, 4), draw(1, frames, 2, 1, 4)) for _ in range(3))
        for frames in (2, 3)
    )
    joined = concatenate(first, (), second)
    assert [kv.num_frames for kv in joined] == [5, 5, 5]
    for layer, one, other in zip(joined, first, second, strict=True):
        assert torch.equal(layer.key_BFSHD, torch.cat((one.key_BFSHD, other.key_BFSHD), dim=1))
        assert torch.equal(layer.value_BFSHD, torch.cat((one.value_BFSHD, other.value_BFSHD), dim=1))
    assert concatenate((), ()) == ()
    assert concatenate(first, ()) is first


def test_frames_of_keys_are_copies_that_let_the_rest_go(draw: Any):
    whole = KeyValue(draw(1, 6, 2, 1, 4), draw(1, 6, 2, 1, 4))
    part = whole.frames(2, 4)
    for tensor, source in ((part.key_BFSHD, whole.key_BFSHD), (part.value_BFSHD, whole.value_BFSHD)):
        assert torch.equal(tensor, source[:, 2:4])
        assert tensor.untyped_storage().nbytes() == tensor.nbytes


def test_norms_are_what_they_are_named(draw: Any):
    x = 3 * draw(2, 4, WIDTH) + 1
    norm = RMSNorm(WIDTH, 1e-6)
    torch.testing.assert_close(norm(x).square().mean(dim=-1), torch.ones(2, 4))
    torch.testing.assert_close(norm(x), norm(5 * x))


def test_noise_level_embedding_tells_levels_apart():
    torch.manual_seed(0)
    embed = NoiseLevelEmbedding(32, 24)
    levels = torch.linspace(0, 1, 51)
    embedded = embed(levels[None])[0]
    assert embedded.shape == (51, 24)
    assert (torch.cdist(embedded, embedded) + 1e3 * torch.eye(51)).min() > 1e-3
