"""A video in memory, as diffusers' users know it, and following a call step by step."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from torch import Tensor

from vidgen.denoise.loop import FinishedBlock, Task, denoise
from vidgen.denoise.solver import History, Solver

OutputType = Literal["np", "pt", "pil", "latent"]
# (engine, step, timestep, {"latents": [1, C, F, Y, X]}) -> other latents by the same name, or nothing
Callback = Callable[[Any, int, float, dict[str, Any]], dict[str, Any] | None]


@dataclass(frozen=True, slots=True)
class Video:
    """What a call gives; `frames` by its output type, with a batch of one."""

    frames: Any


def check_output_type(output_type: str) -> None:
    """ValueError for a type that there is not."""
    if output_type not in get_args(OutputType):
        raise ValueError(f"output_type={output_type!r}: choose np, pt, pil or latent")


def as_output(pixels: Tensor, output_type: OutputType) -> Video:
    """Pixels [1, 3, F, H, W] in [-1, 1] as diffusers gives them; not for latents."""
    video = (pixels.float().cpu() / 2 + 0.5).clamp(0, 1).transpose(1, 2)
    if output_type == "pt":
        return Video(video)
    frames = video.permute(0, 1, 3, 4, 2).numpy()
    if output_type == "np":
        return Video(frames)
    from PIL import Image

    return Video([[Image.fromarray(frame) for frame in (frames[0] * 255).round().astype("uint8")]])


class _Followed:
    """A solver that tells of every step, and takes other latents back."""

    def __init__(self, solver: Solver, tell: Callable[[int, Tensor], Tensor]) -> None:
        self._solver, self._tell = solver, tell

    def step(self, latents: Tensor, velocity: Tensor, step: int, history: History) -> tuple[Tensor, History]:
        """See Solver.step."""
        latents, history = self._solver.step(latents, velocity, step, history)
        return self._tell(step, latents), history


def follow(engine: Any, task: Task, callback: Callback) -> Iterator[FinishedBlock]:
    """Clean blocks of a task, with a call after each step of each block."""

    def tell(step: int, latents: Tensor) -> Tensor:
        timestep = 1000 * task.noise_levels[step]
        changed = callback(engine, step, timestep, {"latents": latents}) or {}
        return changed.get("latents", latents)

    yield from denoise(replace(task, solver=_Followed(task.solver, tell)))
