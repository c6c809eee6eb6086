"""Whether a model draws scenes or remembers clips: each sample beside the nearest of many training clips.

A sample of a scene that was never trained on should be about as far from every training clip as a real clip
of that scene is. One that is much nearer was remembered. Pixels are compared, so a remembered clip that is
moved by a few of them is not found.
"""

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vidgen.builtin import SmallModel
from vidgen.measure.adherence import CLIP_FRAMES
from vidgen.measure.generate import generate
from vidgen.types import Recommended
from vidgen.world import WORLDS, Scene, render_clips

# N clips, B references of a batch, F frames, Y X pixels; pixels in [-1, 1]

BATCH = 200


@dataclass(frozen=True, kw_only=True)
class Nearest:
    """What is nearest to each of some clips: how far it is, root mean square over all pixels, and itself."""

    distance_N: Tensor
    clips_N3FYX: Tensor


def nearest(clips_N3FYX: Tensor, references: Iterable[Tensor]) -> Nearest:
    """The nearest to each clip of all clips in batches of references [B, 3, F, Y, X]."""
    flat = clips_N3FYX.flatten(1)
    distance_N = torch.full((len(flat),), float("inf"))
    found = torch.zeros_like(clips_N3FYX)
    for batch in references:
        apart_NB = torch.cdist(flat, batch.flatten(1)) / flat.shape[1] ** 0.5
        least_N, which_N = apart_NB.min(1)
        closer_N = least_N < distance_N
        distance_N = torch.where(closer_N, least_N, distance_N)
        found[closer_N] = batch[which_N[closer_N]]
    return Nearest(distance_N=distance_N, clips_N3FYX=found)


@dataclass(frozen=True, kw_only=True)
class Compared:
    """Samples of scenes never trained on, real clips of the same scenes, and the nearest training clips."""

    scenes: list[Scene]
    samples_N3FYX: Tensor
    of_samples: Nearest
    of_real: Nearest


def compare(
    model: SmallModel, num_prompts: int, num_references: int, seed: int, *,
    settings: Recommended | None = None, world: str = "small",
) -> Compared:  # fmt: skip
    """Of held-out scenes, a sample and a real clip each against training clips drawn anew from the world."""
    settings = settings or model.recommended
    trained, held_out = WORLDS[world].split()
    rng = random.Random(seed)
    scenes = rng.sample(held_out, min(num_prompts, len(held_out)))
    samples = [
        generate(model, scene.caption(), num_frames=CLIP_FRAMES, seed=seed + index, settings=settings)
        for index, scene in enumerate(scenes)
    ]
    sizes: dict[str, Any] = {"num_frames": CLIP_FRAMES, "size": settings.height}
    real = render_clips(scenes, rng=rng, **sizes)

    def references() -> Iterator[Tensor]:
        drawn = random.Random(seed + 1)  # the same ones for both
        for start in range(0, num_references, BATCH):
            count = min(BATCH, num_references - start)
            yield render_clips(drawn.choices(trained, k=count), rng=drawn, **sizes)

    generated = torch.stack(samples)
    return Compared(
        scenes=scenes,
        samples_N3FYX=generated,
        of_samples=nearest(generated, references()),
        of_real=nearest(real, references()),
    )
