"""A stage's own part of the model, and nothing else: the only code that takes a model apart.

The model is built on the meta device and stripped; only what is left is given memory and read from
the checkpoint.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from vidgen.model.dit import DiT, DiTConfig
from vidgen.model.weights import Weights
from vidgen.parallel.topology import Stage

# what only an end of the row needs, by the names of DiT
FIRST_ONLY = ("patch_in", "text_in", "image_in", "noise_level", "noise_modulation", "variance")
LAST_ONLY = ("head_modulation", "patch_out")


@dataclass(frozen=True, slots=True)
class Placed:
    """A stage's model and what it took."""

    model: DiT
    num_parameters: int
    bytes_read: int


def place(
    weights: Weights, config: DiTConfig, stage: Stage, device: torch.device, *, compile: bool = False
) -> Placed:
    """The stage's part of a model on the device.

    ValueError when the checkpoint lacks one of its tensors or has it in another shape.
    """
    model = strip(config, stage).to_empty(device=device)
    bytes_read = 0

    def read(names: dict[str, Tensor]) -> None:
        nonlocal bytes_read
        bytes_read += weights.read(names)

    fill(model, stage, read)
    if compile:
        model.compile_layers()
    return Placed(model, sum(p.numel() for p in model.parameters()), bytes_read)


def strip(config: DiTConfig, stage: Stage) -> DiT:
    """A model on the meta device that has the stage's layers, numbered from 0, and its ends."""
    with torch.device("meta"):
        model = DiT(config)
    model.layers = nn.ModuleList(model.layers[index] for index in stage.layers)
    absent = (*(() if stage.is_first else FIRST_ONLY), *(() if stage.is_last else LAST_ONLY))
    for name in absent:
        if hasattr(model, name):
            delattr(model, name)
    return model.eval().requires_grad_(False)


def random_model(config: DiTConfig, num_layers: int, device: torch.device | str) -> DiT:
    """The model with so many layers of random weights: for what is timed and not looked at."""
    model = strip(replace(config, num_layers=num_layers), Stage(0, 1, range(num_layers)))
    model = model.to_empty(device=device)
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.randn(tensor.shape, device=device) * 0.02)
    return model


def fill(model: DiT, stage: Stage, read: Callable[[dict[str, Tensor]], None]) -> None:
    """Have `read` fill the stage's tensors, given by the names that they have in the whole model."""
    read({whole_name(name, stage): tensor for name, tensor in model.state_dict().items()})


def whole_name(name: str, stage: Stage) -> str:
    """What a tensor of a stage is called in the whole model."""
    return re.sub(r"^layers\.(\d+)\.", lambda found: f"layers.{int(found[1]) + stage.layers.start}.", name)
