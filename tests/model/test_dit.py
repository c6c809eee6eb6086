"""Laws of the DiT: what may change its output, and what may not."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vidgen.kernels.attention.api import attention_backend
from vidgen.model.context import Context, KeyValue
from vidgen.model.dit import DiT, DiTConfig
from vidgen.model.patches import fold, unfold

VARIANTS: dict[str, dict[str, Any]] = {
    "dense": {},
    "window": {"window": (1, 1, 0)},
    "convolutions": {"convolutions": True, "patch": (1, 1)},
    "linear-skip": {"linear_skip": True},
    "tall-patch": {"patch": (4, 1)},
}
variants = pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS)


def inputs(draw: Any, frames: int = 3, batch: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    return draw(batch, 3, frames, 4, 6), draw(batch, frames).sigmoid(), draw(batch, 5, 7)


def lent_by(model: DiT, draw: Any, frames: int, batch: int = 1) -> Any:
    return model.forward_and_lend(*inputs(draw, frames, batch))[1]


@variants
def test_velocity_has_the_shape_of_the_latents_and_depends_on_every_input(settings: Any, dit: Any, draw: Any):
    model = dit(**settings)
    latents, levels, text = inputs(draw)
    velocity = model(latents, levels, text)
    assert velocity.shape == latents.shape
    lent = lent_by(model, draw, 2)
    others = [
        model(latents + 0.1, levels, text),
        model(latents, levels * 0.9, text),
        model(latents, levels, text + 0.1),
        model(latents, levels, text, Context(before=lent)),
        model(latents, levels, text, Context(after=lent)),
        model(latents, levels, text, Context(before=lent, after=lent)),
    ]
    for one in range(len(others)):
        for other in [velocity, *others[:one]]:
            assert (others[one] - other).abs().max() > 1e-3


@variants
def test_embed_layers_project_is_forward_bit_for_bit(settings: Any, dit: Any, draw: Any):
    """A pipeline stage runs a slice of the layers."""
    model = dit(**settings)
    latents, levels, text = inputs(draw)
    context = Context(before=lent_by(model, draw, 2), after=lent_by(model, draw, 1))
    velocity, lent = model.forward_and_lend(latents, levels, text, context)
    x, shared = model.embed(latents), model.condition(levels, text)
    grid, part = model.token_grid(latents.shape), copy.copy(model)
    part._modules = dict(model._modules)
    for index, layer in enumerate(model.layers):
        part.layers = torch.nn.ModuleList([layer])
        own_context = Context(before=(context.before[index],), after=(context.after[index],))
        x, own = part.run_layers(x, shared, grid, own_context)
        assert torch.equal(own[0].key_BFSHD, lent[index].key_BFSHD)
        assert torch.equal(own[0].value_BFSHD, lent[index].value_BFSHD)
    out = model.project(x, shared.noise_BFD, grid)
    assert torch.equal(model.velocity(out, latents, levels), velocity)
    assert torch.equal(model(latents, levels, text, context), velocity)


def test_one_layers_context_is_a_dense_forward_over_all_frames(dit: Any, draw: Any):
    """With one layer the neighbours' K,V do not depend on what they saw, so lending them loses nothing."""
    model = dit(num_layers=1)
    latents, levels, text = inputs(draw, frames=7)
    lent = [
        model.forward_and_lend(latents[:, :, part], levels[:, part], text)[1]
        for part in (slice(0, 2), slice(5, 7))
    ]
    found = model(latents[:, :, 2:5], levels[:, 2:5], text, Context(before=lent[0], after=lent[1]))
    torch.testing.assert_close(found, model(latents, levels, text)[:, :, 2:5], rtol=1e-4, atol=1e-5)


@variants
def test_batch_elements_do_not_mix(settings: Any, dit: Any, draw: Any):
    model = dit(**settings)
    latents, levels, text = inputs(draw, batch=3)
    context = Context(before=lent_by(model, draw, 2, batch=3))
    together = model(latents, levels, text, context)
    for index in range(3):
        only = slice(index, index + 1)
        before = tuple(KeyValue(kv.key_BFSHD[only], kv.value_BFSHD[only]) for kv in context.before)
        alone = model(latents[only], levels[only], text[only], Context(before=before))
        torch.testing.assert_close(together[only], alone, rtol=1e-4, atol=1e-5)
    changed = latents.clone()
    changed[1] += 1
    assert torch.equal(model(changed, levels, text, context)[[0, 2]], together[[0, 2]])


@pytest.mark.parametrize("window", [(9, 9, 9), (None, None, None), (None, 3, 2), (5, None, None)], ids=str)
def test_a_window_that_covers_everything_is_no_window(window: Any, dit: Any, draw: Any):
    dense, windowed = dit(), dit(window=window)
    arguments = inputs(draw)
    context = Context(before=lent_by(dense, draw, 2), after=lent_by(dense, draw, 1))
    torch.testing.assert_close(
        windowed(*arguments, context), dense(*arguments, context), rtol=1e-4, atol=1e-5
    )


def test_frames_outside_the_window_do_not_matter(dit: Any, draw: Any):
    """One layer, radius 1: the first frame sees the last frame before it, the last the first after it."""
    model = dit(window=(1, None, None), num_layers=1)
    arguments = inputs(draw)
    two_before, two_after = lent_by(model, draw, 2), lent_by(model, draw, 2)
    expected = model(*arguments, Context(before=two_before, after=two_after))
    near = Context(
        before=tuple(kv.frames(1, 2) for kv in two_before), after=tuple(kv.frames(0, 1) for kv in two_after)
    )
    torch.testing.assert_close(model(*arguments, near), expected, rtol=1e-4, atol=1e-5)
    assert (model(*arguments) - expected)[:, :, 1].abs().max() < 1e-5
    assert (model(*arguments) - expected)[:, :, [0, 2]].abs().amax(dim=(0, 1, 3, 4)).min() > 1e-3


@pytest.mark.parametrize("settings", [{}, {"convolutions": True}, {"linear_skip": True}], ids=str)
def test_a_frames_noise_level_touches_that_frame_only_where_attention_is_windowed_to_it(
    settings: Any, dit: Any, draw: Any
):
    latents, levels, text = inputs(draw, frames=4)
    changed = levels.clone()
    changed[0, 2] = 0.9
    alone, dense = dit(window=(0, None, None), **settings), dit(**settings)
    moved = alone(latents, levels, text) != alone(latents, changed, text)
    assert moved.any(dim=1).flatten(2).any(dim=2).tolist() == [[False, False, True, False]]
    moved = dense(latents, levels, text) != dense(latents, changed, text)
    assert moved.any(dim=1).flatten(2).any(dim=2).all()


@pytest.mark.parametrize("patch", [(2, 2), (1, 1), (1, 3), (4, 2)], ids=str)
def test_unfolding_patches_undoes_folding(patch: tuple[int, int], draw: Any):
    latents = draw(2, 3, 3, 4, 6)
    p, q = patch
    folded = fold(latents, patch)
    assert folded.shape == (6, 3 * p * q, 4 // p, 6 // q)
    assert torch.equal(unfold(folded, latents, patch), latents)
    places = [(c, i, j) for c in range(3) for i in range(p) for j in range(q)]
    for channel, (c, i, j) in enumerate(places):
        expected = latents[:, c, :, i::p, j::q].flatten(0, 1)
        assert torch.equal(folded[:, channel], expected)


LEVELS = torch.tensor([0.0, 0.05, 0.3, 0.5, 0.8, 1.0])
VARIANCE = torch.tensor([0.1, 0.5, 1.0, 4.0])


@pytest.fixture
def linear(dit: Any) -> DiT:
    """A model with linear_skip whose network outputs zero, over latents of known variance per channel."""
    model = dit(linear_skip=True, latent_channels=4, patch=(8, 8))
    model.variance.copy_(VARIANCE)
    nn.init.zeros_(model.patch_out.weight)
    nn.init.zeros_(model.patch_out.bias)
    return model


def samples(draw: Any) -> tuple[Tensor, Tensor, Tensor]:
    """(clean, noise, noisy latents [16, 4, F, 16, 16]): a frame for each of LEVELS."""
    shape = (16, 4, len(LEVELS), 16, 16)
    clean = draw(*shape) * VARIANCE.sqrt().view(1, -1, 1, 1, 1)
    noise, t = draw(*shape), LEVELS.view(1, 1, -1, 1, 1)
    return clean, noise, (1 - t) * clean + t * noise


def by_channel_and_level(x: Tensor) -> Tensor:
    """[channels, levels, samples]."""
    return x.permute(1, 2, 0, 3, 4).flatten(2)


def test_a_silent_network_with_linear_skip_gives_the_best_linear_velocity(linear: DiT, draw: Any):
    clean, noise, noisy = samples(draw)
    velocity = linear(noisy, LEVELS.expand(16, -1), draw(16, 5, 7))
    t, v = LEVELS.view(1, -1, 1), VARIANCE.view(-1, 1, 1)
    best_clean = (1 - t) * v / ((1 - t) ** 2 * v + t**2)  # regression of clean on noisy, closed form
    best_noise = t / ((1 - t) ** 2 * v + t**2)
    z, found, target = (by_channel_and_level(x) for x in (noisy, velocity, noise - clean))
    torch.testing.assert_close(found, (best_noise - best_clean) * z, rtol=1e-4, atol=1e-5)

    fitted = (z * target).sum(dim=2, keepdim=True) / z.square().sum(dim=2, keepdim=True)
    error, least_error = ((x - target).square().mean(dim=2) for x in (found, fitted * z))
    assert (error <= least_error * 1.01).all()


@pytest.mark.parametrize("output", ["correction", "gain"])
def test_with_linear_skip_a_unit_output_corrects_by_as_much_as_the_linear_estimate_is_wrong(
    output: str, linear: DiT, draw: Any
):
    """Either kind of output at 1 moves the velocity by the deviation of what the estimate leaves over."""
    clean, noise, noisy = samples(draw)
    levels, text = LEVELS.expand(16, -1), draw(16, 5, 7)
    estimate = linear(noisy, levels, text)
    correction, gain = linear.patch_out.bias.chunk(2)  # type: ignore[union-attr]
    nn.init.ones_(correction if output == "correction" else gain)
    moved = by_channel_and_level(linear(noisy, levels, text) - estimate).square().mean(dim=2)
    left_over = by_channel_and_level(noise - clean - estimate).square().mean(dim=2)
    torch.testing.assert_close(left_over, moved, rtol=0.1, atol=1e-6)


def test_a_fresh_model_outputs_zero():
    torch.manual_seed(0)
    model = DiT(DiTConfig(latent_channels=3, width=24, num_layers=1, num_heads=2, ffn_width=8, text_width=7))
    assert not model(torch.randn(1, 3, 2, 4, 4), torch.full((1, 2), 0.5), torch.randn(1, 5, 7)).any()


@pytest.mark.parametrize(("width", "num_heads"), [(25, 2), (24, 5), (6, 2), (10, 10)])
def test_a_width_that_is_no_even_multiple_of_the_heads_is_an_error(width: int, num_heads: int):
    with pytest.raises(ValueError, match=f"width={width}: .*num_heads={num_heads}"):
        DiTConfig(width=width, num_heads=num_heads)


@pytest.mark.parametrize("shape", [(5, 6), (4, 7)], ids=str)
def test_latents_that_are_no_multiple_of_the_patch_are_an_error(shape: tuple[int, int], dit: Any, draw: Any):
    with pytest.raises(ValueError, match="multiple"):
        dit()(draw(1, 3, 2, *shape), torch.full((1, 2), 0.5), draw(1, 5, 7))


@pytest.mark.parametrize(
    ("config", "billions"),
    [
        (DiTConfig(), 1.42),
        (DiTConfig(width=5120, num_layers=40, num_heads=40, ffn_width=13824), 14.29),
    ],
    ids=["1.3B", "14B"],
)
def test_at_wans_sizes_it_has_wans_number_of_parameters(config: DiTConfig, billions: float):
    with torch.device("meta"):
        model = DiT(config)
    assert round(sum(p.numel() for p in model.parameters()) / 1e9, 2) == billions


@pytest.mark.parametrize("settings", [{}, {"window": (1, 1, 0)}], ids=["dense", "window"])
def test_a_models_attention_backend_is_used_until_it_is_reset(settings: Any, dit: Any, draw: Any):
    model = dit(**settings)
    given = inputs(draw, 4)
    expected = model(*given)
    try:
        for name in ("cpu", "reference"):
            model.set_attention_backend(name)
            torch.testing.assert_close(model(*given), expected, rtol=1e-4, atol=1e-5)
        model.set_attention_backend("sage")
        with pytest.raises(ValueError, match="backend=sage: runs on cuda, not on cpu; able here: "):
            model(*given)
        with pytest.raises(ValueError, match="attention backend fast: there are native"):
            model.set_attention_backend("fast")
    finally:
        model.reset_attention_backend()
    assert torch.equal(model(*given), expected)
    with attention_backend("sage"), pytest.raises(ValueError, match="backend=sage"):
        model(*given)
