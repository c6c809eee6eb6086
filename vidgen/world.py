"""The procedural world the built-in model is trained on: coloured shapes that move over a background.

Every clip is rendered exactly (anti-aliased, on a torus: what leaves on one side enters on the other) from
a `Scene`, which is also its caption. Sizes and speeds are fractions of the frame's side, so that a scene
means the same at any resolution.
"""

import math
import random
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

# B batch, F frames, Y X pixels

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "green": (40, 180, 60),
    "blue": (50, 90, 235),
    "yellow": (240, 215, 50),
    "purple": (165, 60, 205),
    "cyan": (60, 215, 220),
}
SHAPES = ("circle", "square", "triangle")
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "black": (10, 10, 10),
    "white": (245, 245, 245),
    "gray": (128, 128, 128),
    "navy": (20, 30, 90),
}
PATTERNS = ("striped", "checkered")
PATTERN_COLOURS = ((70, 70, 70), (190, 190, 190))
VELOCITIES: dict[str, tuple[float, float]] = {  # (x, y) direction; y grows downward
    "left": (-1.0, 0.0),
    "right": (1.0, 0.0),
    "up": (0.0, -1.0),
    "down": (0.0, 1.0),
    "still": (0.0, 0.0),
}
MOTIONS = (*VELOCITIES, "bouncing")
RADIUS_RANGE = (0.19, 0.25)  # of the frame's side, for the circle; other shapes have its area
SPEED_RANGE = (0.022, 0.031)  # frame sides per frame
TEMPLATES = (
    "a {colour} {shape} {motion} over a {background} background",
    "{colour} {shape} {motion} over {background} background",
    "a {background} background with a {colour} {shape} {motion}",
    "a {colour} {shape} {motion}",
    "a {colour} {shape} over a {background} background",
)
TEMPLATE_WEIGHTS = (0.7, 0.1, 0.1, 0.05, 0.05)


@dataclass(frozen=True, kw_only=True, slots=True)
class Scene:
    """One shape of one colour moving one way over one background."""

    colour: str
    shape: str
    motion: str
    background: str

    def caption(self, template: str = TEMPLATES[0]) -> str:
        """The prompt that describes this scene."""
        motion = {"still": "staying still", "bouncing": "bouncing"}.get(self.motion, f"moving {self.motion}")
        return template.format(
            colour=self.colour, shape=self.shape, motion=motion, background=self.background
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class World:
    """Which scenes there are. `small` is what a CPU can learn in hours, `full` what a GPU can."""

    motions: tuple[str, ...]
    backgrounds: tuple[str, ...]
    held_out_share: float = 0.2

    @property
    def words(self) -> tuple[str, ...]:
        """The words that mean something here: all that a model of this world can know."""
        return (*COLOURS, *SHAPES, *self.motions, *self.backgrounds)

    def scenes(self) -> list[Scene]:
        """Every scene, in a fixed order."""
        return [
            Scene(colour=c, shape=s, motion=m, background=b)
            for c, s, m, b in product(COLOURS, SHAPES, self.motions, self.backgrounds)
        ]

    def split(self) -> tuple[list[Scene], list[Scene]]:
        """(trained, held out): the same split always, so that held-out combinations are never seen."""
        scenes = self.scenes()
        held = set(random.Random(0).sample(range(len(scenes)), round(self.held_out_share * len(scenes))))
        return (
            [scene for i, scene in enumerate(scenes) if i not in held],
            [scene for i, scene in enumerate(scenes) if i in held],
        )


WORLDS = {
    "small": World(motions=tuple(VELOCITIES), backgrounds=tuple(BACKGROUNDS)),
    "full": World(motions=MOTIONS, backgrounds=(*BACKGROUNDS, *PATTERNS)),
}


def parse_caption(prompt: str) -> Scene:
    """The scene that a caption of any template describes. ValueError names the factor that is missing."""
    words = prompt.lower().replace(",", " ").split()

    def find(factor: str, names: tuple[str, ...]) -> str:
        found = [word for word in words if word in names]
        if len(found) != 1:
            raise ValueError(
                f"prompt {prompt!r} must name one {factor} of: {', '.join(names)}; found {found}"
            )
        return found[0]

    return Scene(
        colour=find("colour", tuple(COLOURS)),
        shape=find("shape", SHAPES),
        motion=find("motion", MOTIONS),
        background=find("background", (*BACKGROUNDS, *PATTERNS)),
    )


def draw_caption(scene: Scene, rng: random.Random) -> str:
    """A caption in a random template, mostly the full one."""
    return scene.caption(rng.choices(TEMPLATES, TEMPLATE_WEIGHTS)[0])


def background_pixels(background: str, size: int) -> Tensor:
    """[3, Y, X] in [0, 255]: a plain colour or a pattern of 8 cells a side."""
    if background in BACKGROUNDS:
        return torch.tensor(BACKGROUNDS[background], dtype=torch.float32).view(3, 1, 1).expand(3, size, size)
    cell = torch.arange(size) * 8 // size
    parity = cell.view(1, -1).expand(size, size) % 2
    if background == "checkered":
        parity = (cell.view(-1, 1) + cell.view(1, -1)) % 2
    colours = torch.tensor(PATTERN_COLOURS, dtype=torch.float32)
    return colours[parity].permute(2, 0, 1)


def coverage(shape: Tensor, dx: Tensor, dy: Tensor, radius: Tensor) -> Tensor:
    """Share of each pixel that the shape covers, in [0, 1].

    `shape` (index into SHAPES) and `radius` (pixels) broadcast against the offsets `dx`, `dy` (pixels) from
    the shape's centroid. All shapes have the area of the circle of that radius.
    """
    circle = (dx.square() + dy.square()).sqrt() - radius
    square = torch.maximum(dx.abs(), dy.abs()) - radius * (math.sqrt(math.pi) / 2)
    inradius = radius * math.sqrt(math.pi / (3 * math.sqrt(3)))
    sides = torch.maximum(dy, dx.abs() * (math.sqrt(3) / 2) - dy / 2)
    triangle = sides - inradius
    distance = torch.where(shape == 0, circle, torch.where(shape == 1, square, triangle))
    return (0.5 - distance).clamp(0, 1)


def _centres(scenes: list[Scene], num_frames: int, rng: random.Random) -> Tensor:
    """The centroid in every frame [B, F, 2], in frame sides."""
    drawn = [(rng.random(), rng.random(), rng.uniform(*SPEED_RANGE)) for _ in scenes]
    starts, speeds = torch.tensor(drawn, dtype=torch.float64)[:, None].split((2, 1), dim=2)
    ways = torch.tensor([VELOCITIES.get(scene.motion, (0.0, 0.0)) for scene in scenes], dtype=torch.float64)
    moved = torch.arange(num_frames).view(1, -1, 1) * speeds
    centres = starts + moved * ways[:, None]
    for clip, scene in enumerate(scenes):
        if scene.motion == "bouncing":
            heights = (((rng.random() + moved[clip, :, 0]) % 1.0) * 2 - 1).abs()  # triangle wave
            centres[clip, :, 1] = 0.25 + 0.5 * heights
    return centres.float()


def render_clips(
    scenes: list[Scene], *, num_frames: int, size: int, rng: random.Random, device: torch.device | str = "cpu"
) -> Tensor:
    """Clips [B, 3, F, Y, X] in [-1, 1] of the scenes, with random start, size and speed, on a device."""
    centres = _centres(scenes, num_frames, rng).to(device) * size
    radius = torch.tensor([rng.uniform(*RADIUS_RANGE) for _ in scenes]).to(device).view(-1, 1, 1, 1) * size
    shape = torch.tensor([SHAPES.index(scene.shape) for scene in scenes]).to(device).view(-1, 1, 1, 1)
    colour = torch.tensor([COLOURS[scene.colour] for scene in scenes], dtype=torch.float32).to(device)
    plain = {name: background_pixels(name, size).to(device) for name in {s.background for s in scenes}}
    behind = torch.stack([plain[scene.background] for scene in scenes]).unsqueeze(2)

    pixel = torch.arange(size, device=device) + 0.5
    dx = (pixel - centres[..., 0, None] + size / 2) % size - size / 2  # [B, F, X]
    dy = (pixel - centres[..., 1, None] + size / 2) % size - size / 2
    alpha = coverage(shape, dx.unsqueeze(2), dy.unsqueeze(3), radius).unsqueeze(1)
    frames = behind + alpha * (colour.view(-1, 3, 1, 1, 1) - behind)
    return frames / 127.5 - 1
