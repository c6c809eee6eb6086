"""What a layer and the two ends of the model cost on a device, measured before the layers are cut."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from vidgen.denoise.loop import Task
from vidgen.model.context import Context, LayerKeyValues
from vidgen.parallel.place import random_model
from vidgen.types import ContextMode

WARM_UPS, READINGS = 3, 7


@dataclass(frozen=True, slots=True)
class Costs:
    """Seconds per run of the model."""

    layer: float
    first: float  # embedding
    last: float  # projection


@torch.inference_mode()
def measure_costs(task: Task, device: torch.device) -> Costs:
    """Costs at the shapes of a block in the middle of the queue, with one layer of random weights."""
    timetable = task.timetable
    model = random_model(task.model.config, 1, device)
    own, context = timetable.block(0).num_frames, timetable.context_frames
    recompute = timetable.mode == ContextMode.RECOMPUTE
    noise = task.noise(timetable.block(0)).to(device)
    frames = own + (context if recompute else 0)
    text = torch.zeros(task.run_texts(timetable.block(0))[0].shape, device=device)  # the task's is on meta
    latents = noise[:, :, :1].repeat(text.shape[0], 1, frames, 1, 1)
    channels = task.given.channels(0, frames, latents)
    if channels is not None:
        latents = torch.cat([latents, channels.expand(text.shape[0], -1, -1, -1, -1)], dim=1)
    image = task.given.image_BMI
    if image is not None:
        image = image.to(device).expand(text.shape[0], -1, -1)
    levels = torch.full((text.shape[0], frames), 0.5, device=device)
    grid = model.token_grid(latents.shape)
    tokens, shared = model.embed(latents), model.condition(levels, text, image)
    _, lent = model.run_layers(tokens, shared, grid, Context())

    def part(frames: int) -> LayerKeyValues:
        return tuple(kv.frames(0, frames) for kv in lent) if frames else ()

    around = Context(before=() if recompute else part(context), after=part(context))
    return Costs(
        layer=_seconds(lambda: model.run_layers(tokens, shared, grid, around), device),
        first=_seconds(lambda: model.embed(latents), device),
        last=_seconds(lambda: model.project(tokens[:, -own:], shared.noise_BFD[:, -own:], grid), device),
    )


def _seconds(action: Callable[[], object], device: torch.device) -> float:
    """The median of several readings."""

    def once() -> float:
        start = time.perf_counter()
        action()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    for _ in range(WARM_UPS):
        once()
    return statistics.median(once() for _ in range(READINGS))
