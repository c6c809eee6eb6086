"""Laws of the world: exact, on a torus, the same at any size, told by its caption, split the same always."""

import itertools
import math
import random

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from vidgen.world import (
    BACKGROUNDS,
    COLOURS,
    MOTIONS,
    PATTERNS,
    RADIUS_RANGE,
    SHAPES,
    SPEED_RANGE,
    TEMPLATE_WEIGHTS,
    TEMPLATES,
    VELOCITIES,
    WORLDS,
    Scene,
    background_pixels,
    coverage,
    draw_caption,
    parse_caption,
    render_clips,
)

EVERY_SCENE = WORLDS["full"].scenes()


def render(scene: Scene, *, num_frames: int = 16, size: int = 32, seed: int = 0) -> Tensor:
    return render_clips([scene], num_frames=num_frames, size=size, rng=random.Random(seed))[0]


def red_circle(motion: str, background: str = "black") -> Scene:
    return Scene(colour="red", shape="circle", motion=motion, background=background)


def test_worlds_hold_every_combination_once():
    assert len(set(EVERY_SCENE)) == len(EVERY_SCENE) == 6 * 3 * 6 * 6
    assert len(WORLDS["small"].scenes()) == 6 * 3 * 5 * 4
    assert set(WORLDS["small"].scenes()) < set(EVERY_SCENE)


@pytest.mark.parametrize("name", WORLDS)
def test_split_is_a_partition_that_never_changes(name):
    trained, held_out = WORLDS[name].split()
    assert (trained, held_out) == WORLDS[name].split()
    assert not set(trained) & set(held_out)
    assert set(trained) | set(held_out) == set(WORLDS[name].scenes())
    assert len(held_out) == round(0.2 * len(WORLDS[name].scenes()))


@pytest.mark.parametrize("name", WORLDS)
def test_every_word_is_trained_although_some_scenes_are_not(name):
    trained, _ = WORLDS[name].split()
    for factor in ("colour", "shape", "motion", "background"):
        assert {getattr(s, factor) for s in trained} == {getattr(s, factor) for s in WORLDS[name].scenes()}


def test_a_full_caption_tells_its_scene():
    whole = [template for template in TEMPLATES if "{background}" in template and "{motion}" in template]
    for scene, template in itertools.product(EVERY_SCENE, whole):
        assert parse_caption(scene.caption(template)) == scene


def test_captions_tell_scenes_apart():
    assert len({scene.caption() for scene in EVERY_SCENE}) == len(EVERY_SCENE)


@pytest.mark.parametrize(
    ("prompt", "factor"),
    [
        ("a circle moving left over a black background", "colour"),
        ("a red moving left over a black background", "shape"),
        ("a red circle over a black background", "motion"),
        ("a red circle moving left", "background"),
        ("a red blue circle moving left over a black background", "colour"),
        ("", "colour"),
    ],
)
def test_a_prompt_without_one_of_each_factor_is_an_error_that_names_it(prompt, factor):
    with pytest.raises(ValueError, match=f"must name one {factor} of"):
        parse_caption(prompt)


def test_drawn_captions_follow_their_weights():
    rng = random.Random(0)
    scene = EVERY_SCENE[7]
    drawn = [draw_caption(scene, rng) for _ in range(4000)]
    for template, weight in zip(TEMPLATES, TEMPLATE_WEIGHTS, strict=True):
        assert drawn.count(scene.caption(template)) / 4000 == pytest.approx(weight, abs=0.03)
    assert sum(TEMPLATE_WEIGHTS) == pytest.approx(1)


@pytest.mark.parametrize("size", [24, 32, 48, 64])
def test_clips_have_their_shape_and_range(size):
    scenes = random.Random(1).choices(EVERY_SCENE, k=6)
    clips = render_clips(scenes, num_frames=5, size=size, rng=random.Random(2))
    assert clips.shape == (6, 3, 5, size, size) and clips.dtype == torch.float32
    assert -1 <= clips.min() and clips.max() <= 1


def test_the_same_seed_draws_the_same_clip():
    assert torch.equal(render(EVERY_SCENE[5], seed=3), render(EVERY_SCENE[5], seed=3))
    assert not torch.equal(render(EVERY_SCENE[5], seed=3), render(EVERY_SCENE[5], seed=4))


@pytest.mark.parametrize("background", [*BACKGROUNDS, *PATTERNS])
def test_a_clip_shows_only_its_background_its_colour_and_their_blends(background):
    clip = render(red_circle("left", background))
    behind = (background_pixels(background, 32) / 127.5 - 1).unsqueeze(1)
    colour = (torch.tensor(COLOURS["red"]) / 127.5 - 1).view(3, 1, 1, 1)
    contrast = colour - behind
    alpha = ((clip - behind) * contrast).sum(0) / contrast.square().sum(0)
    torch.testing.assert_close(clip, behind + alpha * contrast, atol=1e-5, rtol=0)
    assert alpha.min() > -1e-5 and alpha.max() < 1 + 1e-5
    assert (alpha > 0.999).any() and (alpha < 0.001).any()


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_has_the_area_of_its_circle(shape):
    size, radius = 200, 40.0
    offset = torch.arange(size) + 0.5 - size / 2
    index = torch.tensor(SHAPES.index(shape))
    covered = coverage(index, offset.view(1, -1), offset.view(-1, 1), torch.tensor(radius))
    assert covered.sum().item() == pytest.approx(math.pi * radius**2, rel=0.01)
    for offsets in (offset.view(1, -1), offset.view(-1, 1)):
        assert (covered * offsets).sum().item() / covered.sum().item() == pytest.approx(0, abs=0.3)


def test_a_triangle_stands_on_its_base():
    offset = torch.arange(64) + 0.5 - 32
    covered = coverage(torch.tensor(2), offset.view(1, -1), offset.view(-1, 1), torch.tensor(12.0))
    rows = covered.sum(1)
    assert rows.argmax() > 32 and (rows > 0).nonzero().min() < 20


@pytest.mark.parametrize("motion", MOTIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_nothing_is_lost_over_the_borders(shape, motion):
    scene = Scene(colour="yellow", shape=shape, motion=motion, background="black")
    areas = (render(scene, num_frames=48)[0] + 1).sum((1, 2))
    assert areas.max() / areas.min() < 1.03


@pytest.mark.parametrize("motion", [name for name in VELOCITIES if name != "still"])
def test_a_whole_number_of_pixels_later_the_frame_is_rolled(motion, monkeypatch):
    monkeypatch.setattr("vidgen.world.SPEED_RANGE", (1 / 32, 1 / 32))
    clip = render(red_circle(motion))
    dx, dy = (int(v) for v in VELOCITIES[motion])
    rolled = torch.roll(clip[:, :-1], (dy, dx), (2, 3))
    torch.testing.assert_close(clip[:, 1:], rolled, atol=1e-3, rtol=0)


def test_a_still_scene_does_not_change():
    clip = render(red_circle("still"))
    assert (clip == clip[:, :1]).all()


def heights(clip: Tensor) -> Tensor:
    """Centroid row per frame in frame sides, of an object that crosses no horizontal border."""
    size = clip.shape[-1]
    mass = (clip[0] - clip[0].min()).sum(2)
    return (mass * (torch.arange(size) + 0.5)).sum(1) / mass.sum(1) / size


def test_a_bounce_goes_between_a_quarter_and_three_quarters():
    for seed in range(8):
        path = heights(render(red_circle("bouncing"), num_frames=100, size=64, seed=seed))
        assert path.min() == pytest.approx(0.25, abs=0.02) and path.max() == pytest.approx(0.75, abs=0.02)
        steps = path.diff().abs()
        assert steps.median() <= SPEED_RANGE[1] + 1e-3 and steps.median() >= SPEED_RANGE[0] - 1e-3
        assert steps.max() <= SPEED_RANGE[1] + 1e-3


def test_sizes_lie_in_their_range():
    for seed in range(30):
        clip = render(red_circle("still"), num_frames=1, size=64, seed=seed)
        area = ((clip[0] + 1) * 127.5 - 10).sum() / 210 / 64**2
        assert RADIUS_RANGE[0] - 0.005 <= math.sqrt(area / math.pi) <= RADIUS_RANGE[1] + 0.005


def test_a_scene_is_the_same_at_any_size():
    for scene in random.Random(3).choices([s for s in EVERY_SCENE if s.background in BACKGROUNDS], k=6):
        small = render(scene, size=32, num_frames=4)
        large = functional.avg_pool2d(render(scene, size=64, num_frames=4), 2)
        assert (small - large).abs().mean() < 0.01


@pytest.mark.parametrize("size", [32, 64])
def test_patterns_have_8_cells_a_side(size):
    cell = size // 8
    for name, dims in (("striped", (2,)), ("checkered", (1, 2))):
        pattern = background_pixels(name, size)
        for dim in dims:
            assert torch.equal(pattern, pattern.roll(2 * cell, dim))
            assert not torch.equal(pattern, pattern.roll(cell, dim))
    assert torch.equal(background_pixels("striped", size), background_pixels("striped", size).roll(1, 1))


def test_palette_and_backgrounds_are_far_apart():
    behind = torch.tensor([*BACKGROUNDS.values(), (70, 70, 70), (190, 190, 190)]).float()
    palette = torch.tensor(list(COLOURS.values())).float()
    assert torch.cdist(palette, behind).min() > 100 and torch.pdist(palette).min() > 100
