"""Laws of the checker: it accepts every clip of the world, also a little damaged, and no other clip."""

import functools
import math
import random

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from vidgen.codec.dct import DctCodec, DctConfig
from vidgen.measure.adherence import FACTORS, adherence, drift, judge, measure_clip, windows
from vidgen.world import (
    BACKGROUNDS,
    COLOURS,
    MOTIONS,
    PATTERNS,
    SHAPES,
    WORLDS,
    Scene,
    background_pixels,
    coverage,
    render_clips,
)

RED_SCENE = Scene(colour="red", shape="circle", motion="left", background="black")
SAME = {name: getattr(RED_SCENE, name) for name in FACTORS}
EVERYTHING_RIGHT = dict.fromkeys((*FACTORS, "joint"), 1.0)


def render(scene: Scene, seed: int = 0, num_frames: int = 16, size: int = 32) -> Tensor:
    return render_clips([scene], num_frames=num_frames, size=size, rng=random.Random(seed))[0]


def real_clips(
    world: str, size: int, num_frames: int, count: int, seed: int = 1
) -> tuple[Tensor, list[Scene]]:
    rng = random.Random(seed)
    scenes = rng.choices(WORLDS[world].scenes(), k=count)
    return render_clips(scenes, num_frames=num_frames, size=size, rng=rng), scenes


def keep(clips: Tensor) -> Tensor:
    return clips


def add_noise(clips: Tensor) -> Tensor:
    return clips + 0.05 * torch.randn(clips.shape, generator=torch.Generator().manual_seed(0))


def blur_and_add_noise(clips: Tensor) -> Tensor:
    """Half of a 3x3 box blur: 27 dB over patterns at 32 pixels, 31 dB over plain backgrounds."""
    frames = functional.pad(clips.transpose(1, 2).flatten(0, 1), (1, 1, 1, 1), mode="circular")
    blurred = functional.avg_pool2d(frames, 3, 1).unflatten(0, (len(clips), -1)).transpose(1, 2)
    return add_noise((clips + blurred) / 2)


@functools.cache
def fitted_codec(size: int) -> DctCodec:
    fitting, _ = real_clips("full", size, 16, 64, seed=2)
    codec = DctCodec(DctConfig())
    codec.fit(fitting)
    return codec


def code_and_decode(clips: Tensor) -> Tensor:
    """Through the codec, fitted to other clips of the full world; 32 dB."""
    codec = fitted_codec(clips.shape[-1])
    return torch.cat([codec.decode(codec.encode(part)) for part in clips.split(8)])


DAMAGES = [keep, add_noise, blur_and_add_noise, code_and_decode]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("num_frames", [16, 32])
@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize("world", WORLDS)
def test_real_clips_are_right(world, size, num_frames, damage):
    clips, scenes = real_clips(world, size, num_frames, 6)
    assert adherence(damage(clips), scenes) == EVERYTHING_RIGHT


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("num_frames", [16, 32])
@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize("world", WORLDS)
def test_each_of_400_real_clips_is_right(world, size, num_frames, damage):
    clips, scenes = real_clips(world, size, num_frames, 400, seed=3)
    assert adherence(damage(clips), scenes) == EVERYTHING_RIGHT


@pytest.mark.parametrize("size", [24, 48])
def test_clips_of_8_frames_and_other_sizes_are_right(size):
    clips, scenes = real_clips("full", size, 8, 40)
    assert adherence(clips, scenes) == EVERYTHING_RIGHT


def test_half_precision_and_values_out_of_range_change_nothing():
    clip = render(RED_SCENE)
    assert judge(clip.bfloat16(), RED_SCENE).all
    assert measure_clip(torch.where(clip < -0.9, clip - 5, clip)).background == "black"


OTHERS = {
    "colour": list(COLOURS),
    "shape": list(SHAPES),
    "motion": [name for name in MOTIONS if name != "bouncing"],
    "background": [*BACKGROUNDS, *PATTERNS],
}


@pytest.mark.parametrize(
    ("factor", "shown", "asked"),
    [(factor, a, b) for factor, names in OTHERS.items() for a in names for b in names if a != b],
)
def test_one_wrong_factor_is_the_only_one_wrong(factor, shown, asked):
    verdict = judge(render(Scene(**SAME | {factor: shown})), Scene(**SAME | {factor: asked}))
    assert {name for name in FACTORS if not getattr(verdict, name)} == {factor}


BOUNCING = Scene(colour="red", shape="circle", motion="bouncing", background="black")


@pytest.mark.parametrize("motion", ["left", "right", "still", "up", "down"])
def test_a_bounce_that_turns_is_no_other_motion(motion):
    for seed in range(8):
        clip = render(BOUNCING, seed, num_frames=32)
        assert judge(clip, BOUNCING).all
        assert not judge(clip, Scene(colour="red", shape="circle", motion=motion, background="black")).motion


@pytest.mark.parametrize("motion", ["left", "right", "still", "up", "down"])
def test_motion_over_32_frames_is_no_bounce(motion):
    for seed in range(4):
        scene = Scene(colour="red", shape="circle", motion=motion, background="black")
        assert not judge(render(scene, seed, num_frames=32), BOUNCING).motion


def drawn(centres: list[tuple[float, float]], radius: float = 0.22, colours=("red",), shape=0) -> Tensor:
    """A 32x32 clip over black with the object at those centres (frame sides), in colours by turns."""
    size = 32
    pixel = torch.arange(size) + 0.5
    behind = background_pixels("black", size)
    frames = []
    for frame, (x, y) in enumerate(centres):
        dx = (pixel.view(1, -1) - x * size + size / 2) % size - size / 2
        dy = (pixel.view(-1, 1) - y * size + size / 2) % size - size / 2
        alpha = coverage(torch.tensor(shape), dx, dy, torch.tensor(radius * size))
        colour = torch.tensor(COLOURS[colours[frame * len(colours) // len(centres)]]).view(3, 1, 1)
        frames.append(behind + alpha * (colour - behind))
    return torch.stack(frames, 1) / 127.5 - 1


def going_left(num_frames: int = 16) -> list[tuple[float, float]]:
    return [(0.8 - 0.026 * frame, 0.5) for frame in range(num_frames)]


def test_the_clips_drawn_here_are_right():
    assert judge(drawn(going_left()), RED_SCENE).all


def scattered() -> Tensor:
    rng = random.Random(0)
    return drawn([(rng.random(), rng.random()) for _ in range(16)])


def half_visible() -> Tensor:
    return torch.cat([drawn(going_left(8)), drawn(going_left(8), radius=-1)], 1)


WRONG_CLIPS = {
    "noise": (lambda: torch.randn(3, 16, 32, 32, generator=torch.Generator().manual_seed(0)), set(FACTORS)),
    "weak noise": (
        lambda: 0.3 * torch.randn(3, 16, 32, 32, generator=torch.Generator().manual_seed(0)) - 0.9,
        {"colour", "shape", "motion"},
    ),
    "nan": (lambda: torch.full((3, 16, 32, 32), math.nan), set(FACTORS)),
    "nan in half of the frames": (
        lambda: torch.cat([drawn(going_left(8)), torch.full((3, 8, 32, 32), math.nan)], 1),
        set(FACTORS),
    ),
    "blank": (lambda: drawn(going_left(), radius=-1), {"colour", "shape", "motion"}),
    "one colour everywhere": (lambda: drawn(going_left(), radius=2), set(FACTORS)),
    "a speck": (lambda: drawn(going_left(), radius=0.05), {"colour", "shape", "motion"}),
    "scattered": (scattered, {"motion"}),
    "jumps halfway": (lambda: drawn(going_left()[:8] + going_left(14)[:5:-1]), {"motion"}),
    "stops halfway": (lambda: drawn(going_left()[:8] + [going_left()[7]] * 8), {"motion"}),
    "turns halfway": (lambda: drawn(going_left()[:8] + going_left()[8:0:-1]), {"motion"}),
    "diagonal": (lambda: drawn([(x, x) for x, _ in going_left()]), {"motion"}),
    "too fast": (lambda: drawn([(0.8 - 0.12 * frame, 0.5) for frame in range(16)]), {"motion"}),
    "changes colour halfway": (lambda: drawn(going_left(), colours=("red", "green")), {"colour"}),
    "changes colour near the end": (
        lambda: drawn(going_left(), colours=("red",) * 7 + ("blue",)),
        {"colour"},
    ),
    "changes shape halfway": (
        lambda: torch.cat([drawn(going_left()[:8]), drawn(going_left()[8:], shape=2)], 1),
        {"shape"},
    ),
    "visible in half of the frames": (half_visible, {"colour", "shape", "motion"}),
    "visible in every other frame": (
        lambda: torch.where(torch.arange(16).view(1, -1, 1, 1) % 2 == 0, drawn(going_left()), -0.92),
        {"colour", "shape", "motion"},
    ),
    "background changes halfway": (
        lambda: torch.cat(
            [render(RED_SCENE)[:, :8], render(Scene(**SAME | {"background": "navy"}))[:, 8:]], 1
        ),
        {"background"},
    ),
}


@pytest.mark.parametrize("name", WRONG_CLIPS)
def test_a_clip_that_no_caption_describes_is_wrong(name):
    clip, wrong = WRONG_CLIPS[name]
    verdict = judge(clip(), RED_SCENE)
    assert wrong <= {factor for factor in FACTORS if not getattr(verdict, factor)}


@pytest.mark.parametrize("other", ["yellow", "red"])
def test_two_objects_are_wrong(other):
    first = drawn(going_left(), radius=0.2)
    second = drawn([(x + 0.5, y) for x, y in going_left()], radius=0.2, colours=(other,))
    verdict = judge(torch.maximum(first, second), RED_SCENE)
    assert not verdict.shape
    assert verdict.colour == (other == "red")


def test_a_second_colour_in_one_object_is_wrong():
    clip = drawn(going_left())
    other = drawn(going_left(), colours=("green",))
    left_half = (torch.arange(32) < 16).view(1, 1, 1, -1)
    assert not judge(torch.where(left_half, clip, other), RED_SCENE).colour


def test_no_wrong_clip_is_right_for_any_scene():
    for clip, _ in WRONG_CLIPS.values():
        measured = measure_clip(clip())
        assert not any(measured.verdict(scene).all for scene in WORLDS["full"].scenes())


def test_evidence_says_where_the_object_is():
    measured = measure_clip(drawn(going_left()))
    path = torch.tensor(measured.path)
    torch.testing.assert_close(path, torch.tensor(going_left()), atol=0.01, rtol=0)
    assert measured.displacement == pytest.approx((-0.026, 0), abs=1e-3)
    assert measured.foreground_share == pytest.approx([math.pi * 0.22**2] * 16, rel=0.05)
    assert max(measured.ious, key=lambda name: measured.ious[name]) == "circle"


def test_a_triangle_across_the_border_has_its_true_centroid():
    centres = [(0.97, 0.02)] * 8
    path = torch.tensor(measure_clip(drawn(centres, shape=2)).path)
    torch.testing.assert_close(path, torch.tensor(centres), atol=0.01, rtol=0)


@pytest.mark.parametrize("shape", [(3, 7, 32, 32), (2, 3, 16, 32, 32), (1, 16, 32, 32), (3, 16, 32, 48)])
def test_a_clip_that_cannot_be_judged_is_an_error(shape):
    with pytest.raises(ValueError, match=r"need one clip \[3, frames >= 8"):
        measure_clip(torch.zeros(shape))


def test_adherence_gives_the_share_of_each_factor():
    clips = torch.stack([render(RED_SCENE), render(RED_SCENE)])
    shares = adherence(clips, [RED_SCENE, Scene(**SAME | {"colour": "blue"})])
    assert shares == {"colour": 0.5, "shape": 1, "motion": 1, "background": 1, "joint": 0.5}
    with pytest.raises(ValueError, match="shorter"):
        adherence(clips, [RED_SCENE])


@pytest.mark.parametrize(("num_frames", "count"), [(16, 1), (17, 2), (32, 2), (40, 3)])
def test_windows_cover_every_frame(num_frames, count):
    seen = windows(render(RED_SCENE, num_frames=num_frames))
    assert len(seen) == count
    assert all(measured.verdict(RED_SCENE).all for measured in seen)


def test_windows_longer_than_the_video_are_an_error():
    with pytest.raises(ValueError, match="length=16: need 8 to 12"):
        windows(render(RED_SCENE, num_frames=12))


def test_drift_finds_an_object_that_fades_away():
    video = render(RED_SCENE, num_frames=64)
    assert drift(video, RED_SCENE) == {"first": EVERYTHING_RIGHT, "last": EVERYTHING_RIGHT}
    video[:, 40:] = video[:, 40:].mean()
    drifted = drift(video, RED_SCENE)
    assert drifted["first"]["joint"] == 1 and drifted["last"]["colour"] == 0
    with pytest.raises(ValueError, match="need 32"):
        drift(video[:, :31], RED_SCENE)
