"""A small random DiT, tasks around it, and the plain specification that the loop must equal."""

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from vidgen.denoise.loop import FinishedBlock, LoopState, Task, denoise
from vidgen.denoise.noise import NoiseSource
from vidgen.denoise.schedule import noise_levels
from vidgen.denoise.solver import Euler
from vidgen.denoise.timetable import Timetable
from vidgen.model.dit import DiT, DiTConfig
from vidgen.types import Block

# head width 12: frame, row and column turn 4 channels each; 2 x 3 tokens a frame
FRAME_SHAPE = (3, 4, 6)
SIZES: dict[str, Any] = {
    "latent_channels": 3, "width": 24, "num_layers": 2, "num_heads": 2, "ffn_width": 40, "text_width": 7,
    "num_frequencies": 16, "rope_theta": 100.0,
}  # fmt: skip
NUM_WORDS = 5


@torch.no_grad()
def redraw(model: DiT, seed: int = 0) -> DiT:
    """All parameters anew, since a fresh model's output layer is zero: norm weights around 1, the rest 0."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        mean = 1.0 if "norm.weight" in name else 0.0
        parameter.copy_(mean + 0.25 * torch.randn(parameter.shape, generator=generator))
    if model.config.linear_skip:
        model.variance.copy_(torch.linspace(0.2, 2.0, len(model.variance)))
    return model.eval().requires_grad_(False)


def random_text(*name: object) -> Tensor:
    """[1, N, T], the same for the same name."""
    seed = sum(ord(letter) * 31**place for place, letter in enumerate(repr(name))) % 2**31
    return torch.randn(1, NUM_WORDS, SIZES["text_width"], generator=torch.Generator().manual_seed(seed))


def make_task(
    timetable: Timetable, *, model: DiT, guidance_scale: float = 1.0, seed: int = 5, shift: float = 2.0
) -> Task:
    """A task in which every block has a prompt of its own."""
    levels = noise_levels(timetable.num_steps, shift)
    source = NoiseSource(
        seed,
        frame_shape=FRAME_SHAPE,
        block_frames=timetable.block_frames,
        context_frames=timetable.context_frames,
    )

    def noise(block: Block) -> Tensor:
        return source.block(block.index, block.num_frames)

    def texts(block: Block) -> tuple[Tensor, Tensor]:
        return random_text("positive", block.index), random_text("negative")

    return Task(
        model=model, timetable=timetable, noise_levels=levels, solver=Euler(levels),
        guidance_scale=guidance_scale, noise=noise, texts=texts,
    )  # fmt: skip


@pytest.fixture(scope="session")
def dit() -> Callable[..., DiT]:
    """Small random models by the settings in which they differ from SIZES."""
    made: dict[tuple[tuple[str, Any], ...], DiT] = {}

    def dit(**settings: Any) -> DiT:
        key = tuple(sorted(settings.items()))
        if key not in made:
            made[key] = redraw(DiT(DiTConfig(**SIZES | settings)))
        return made[key]

    return dit


@pytest.fixture
def task(dit: Callable[..., DiT]) -> Callable[..., Task]:
    def task(timetable: Timetable, *, model: Any = None, **options: Any) -> Task:
        return make_task(timetable, model=dit() if model is None else model, **options)

    return task


@pytest.fixture
def latents() -> Callable[..., list[Tensor]]:
    def latents(task: Task, state: LoopState | None = None) -> list[Tensor]:
        """Clean latents of the blocks that `denoise` still yields, checked to come in order and once each."""
        finished: Sequence[FinishedBlock] = list(denoise(task, state))
        indices = [block.block.index for block in finished]
        assert indices == list(range(task.timetable.num_blocks - len(indices), task.timetable.num_blocks))
        return [block.latents_BCFYX for block in finished]

    return latents


@pytest.fixture(scope="session")
def plain() -> ModuleType:
    """plain_specification.py; with importlib import mode a test folder is not on the path."""
    path = Path(__file__).with_name("plain_specification.py")
    spec = importlib.util.spec_from_file_location("plain_specification", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
