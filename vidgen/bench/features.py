"""What a DiT computes for each block and branch of guidance, held against the same one or a few steps before.

Hooks look at the layers while the denoising loop runs as always: the videos are the same to the last bit. Of
each live block and branch, the layers' residuals of one step and the outputs of three are kept.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vidgen.bench.attention_mass import AttentionMass
from vidgen.denoise.forwards import Forward
from vidgen.denoise.loop import LoopState, Task, run_tick
from vidgen.model.dit import DiT
from vidgen.stepcache.kept import forecast
from vidgen.stepcache.methods import relative_change

# B batch, C latent channels, F latent frames, Y X latent rows and columns, S tokens per frame, D width

BRANCHES = ("prompt", "no prompt")
ORDERS = (0, 1, 2)
FEATURES = ("output", "modulated_input", "first_residual", "last_output", "stack_residual")
CURVES = (
    *(f"{feature}_{figure}" for feature in FEATURES for figure in ("cosine", "change")),
    "stack_residual_ratio",
    *(f"forecast_error_{order}" for order in ORDERS),
)
LAYERS = ("residual_change", "output_cosine")


def cosine(one: Tensor, other: Tensor) -> float:
    """Of the angle between two features, each taken as one vector; 1 for equal ones, zeros too."""
    if torch.equal(one, other):
        return 1.0
    one, other = one.float().flatten(), other.float().flatten()
    return float(torch.nn.functional.cosine_similarity(one, other, dim=0))


def change(now: Tensor, then: Tensor) -> float:
    """Relative L1 change, as TeaCache has it (arXiv 2411.19108); 0 for equal ones, zeros too."""
    return 0.0 if torch.equal(now, then) else relative_change(now, then)


def magnitude_ratio(now_FSD: Tensor, then_FSD: Tensor) -> float:
    """Mean over tokens of a residual's length over that of the one before: MagCache's gamma (2506.09045)."""
    if torch.equal(now_FSD, then_FSD):
        return 1.0
    return float((now_FSD.float().norm(dim=-1) / then_FSD.float().norm(dim=-1)).mean())


@dataclass
class Series:
    """Figures of one block and branch, NaN where there is nothing to compare with.

    `curves` are arrays [num_steps], `layers` [num_layers, num_steps]; the names are CURVES and LAYERS.
    """

    branch: str
    noise_levels: tuple[float, ...]
    num_layers: int
    curves: dict[str, NDArray[np.float64]] = field(init=False)
    layers: dict[str, NDArray[np.float64]] = field(init=False)
    kept: dict[str, Tensor] = field(default_factory=dict)  # features of the step before
    outputs: tuple[Tensor, ...] = ()  # of the last steps, newest first
    embedded_FSD: Tensor | None = None  # what the first layer got in this step

    def __post_init__(self) -> None:
        num_steps = len(self.noise_levels)
        self.curves = {name: np.full(num_steps, np.nan) for name in CURVES}
        self.layers = {name: np.full((self.num_layers, num_steps), np.nan) for name in LAYERS}

    def see_input(self, step: int, modulated_FSD: Tensor) -> None:
        """What the first layer's self-attention gets, which begins a step: TeaCache's signal."""
        self._compare("modulated_input", step, modulated_FSD, self.kept.get("modulated input"))
        self.kept["modulated input"] = modulated_FSD.clone()

    def see_layer(self, layer: int, step: int, before_FSD: Tensor, after_FSD: Tensor) -> None:
        """A layer's input and output tokens; layers come in order."""
        residual = after_FSD - before_FSD
        self.layers["output_cosine"][layer, step] = cosine(after_FSD, before_FSD)
        then = self.kept.get(f"residual {layer}")
        if then is not None:
            self.layers["residual_change"][layer, step] = change(residual, then)
        if layer == 0:
            self.embedded_FSD = before_FSD
            self._compare("first_residual", step, residual, then)
        self.kept[f"residual {layer}"] = residual
        if layer + 1 == self.num_layers:
            assert self.embedded_FSD is not None
            self._see_stack(step, after_FSD, after_FSD - self.embedded_FSD)
            self.embedded_FSD = None

    def see_output(self, step: int, velocity_CFYX: Tensor) -> None:
        """The model's output, which ends a step."""
        before = self.outputs
        self._compare("output", step, velocity_CFYX, before[0] if before else None)
        at = tuple(self.noise_levels[step - 1 - back] for back in range(len(before)))
        for order in ORDERS[: len(before)]:
            guess = forecast(before, at, self.noise_levels[step], order)
            self.curves[f"forecast_error_{order}"][step] = change(guess, velocity_CFYX)
        self.outputs = (velocity_CFYX.clone(), *before)[: len(ORDERS)]  # it may be a view, or be written to

    def forget(self) -> None:
        """No step is compared with one before this moment."""
        self.kept, self.outputs = {}, ()

    def _see_stack(self, step: int, last_FSD: Tensor, residual_FSD: Tensor) -> None:
        self._compare("last_output", step, last_FSD, self.kept.get("last output"))
        then = self.kept.get("stack residual")
        self._compare("stack_residual", step, residual_FSD, then)
        if then is not None:
            self.curves["stack_residual_ratio"][step] = magnitude_ratio(residual_FSD, then)
        self.kept |= {"last output": last_FSD.clone(), "stack residual": residual_FSD}

    def _compare(self, feature: str, step: int, now: Tensor, then: Tensor | None) -> None:
        if then is not None:
            self.curves[f"{feature}_cosine"][step] = cosine(now, then)
            self.curves[f"{feature}_change"][step] = change(now, then)


class Watcher:
    """Runs a task and looks at its models' layers: a Series per block and branch, and attention's mass.

    ValueError for a task with a step cache, which would leave steps out.
    """

    def __init__(self, task: Task, mass: AttentionMass | None = None) -> None:
        if task.cache is not None:
            raise ValueError(
                f"cache={task.cache.settings.method}: skips steps; leave it out, to see all of them"
            )
        self.task, self.mass = task, mass
        self.series: dict[tuple[int, int], Series] = {}  # by block and branch
        self._forward: Forward | None = None
        self._first_frame = self._first_branch = self._next_branch = 0

    def run(self) -> list[Series]:
        """Figures of every block and branch of the whole video."""
        timetable, state = self.task.timetable, LoopState()
        with ExitStack() as hooks:
            for model in self.task.models:
                hooks.enter_context(self._hooks(model))
            while state.next_tick < timetable.num_ticks:
                forwards = iter(timetable.forwards(state.next_tick))
                run_tick(self.task, state, partial(self._begin, forwards))
        return list(self.series.values())

    @contextmanager
    def _hooks(self, model: DiT) -> Iterator[None]:
        run = model.forward_and_lend

        def watched(latents_BCFYX: Tensor, *inputs: Any, first_frame: int = 0, **options: Any) -> Any:
            self._first_frame, self._first_branch = first_frame, self._next_branch
            self._next_branch += latents_BCFYX.shape[0]
            velocity_BCFYX, lent = run(latents_BCFYX, *inputs, first_frame=first_frame, **options)
            self._see_output(velocity_BCFYX)
            return velocity_BCFYX, lent

        vars(model)["forward_and_lend"] = watched  # of this model alone, and the class's own again after
        try:
            with ExitStack() as hooks:
                attention = model.layers[0].get_submodule("self_attention")
                hooks.callback(attention.register_forward_pre_hook(self._see_input).remove)
                for index, layer in enumerate(model.layers):
                    hooks.callback(layer.register_forward_hook(partial(self._see_layer, index)).remove)
                    if self.mass is not None:
                        hooks.callback(self.mass.hook(index, layer))
                yield
        finally:
            del vars(model)["forward_and_lend"]

    def _begin(self, forwards: Iterator[Forward]) -> None:
        self._forward, self._next_branch = next(forwards), 0

    def _see_input(self, _: Any, inputs: tuple[Tensor, ...]) -> None:
        for series, step, part in self._parts(inputs[0][:, self._first_frame :], 1):
            if step == self.task.timetable.switch_step:
                series.forget()  # another expert's features have another meaning
            series.see_input(step, part)

    def _see_layer(self, layer: int, _: Any, inputs: tuple[Tensor, ...], made: tuple[Tensor, Any]) -> None:
        before, after = (tokens[:, self._first_frame :] for tokens in (inputs[0], made[0]))
        befores = [part for _, _, part in self._parts(before, 1)]
        for (series, step, part), part_before in zip(self._parts(after, 1), befores, strict=True):
            series.see_layer(layer, step, part_before, part)

    def _see_output(self, velocity_BCFYX: Tensor) -> None:
        for series, step, part in self._parts(velocity_BCFYX, 2):
            series.see_output(step, part)
            if step + 1 == self.task.timetable.num_steps:
                series.forget()

    def _parts(self, own: Tensor, frame_dim: int) -> Iterator[tuple[Series, int, Tensor]]:
        """(series, step, its part without the batch) of a tensor [B, ...] of a window's own frames."""
        assert self._forward is not None
        steps = self._forward.parts
        frames = [self.task.timetable.block(block).num_frames for block, _ in steps]
        for (block, step), part in zip(steps, own.split(frames, dim=frame_dim), strict=True):
            for row, feature in enumerate(part):
                yield self._series(block, self._first_branch + row), step, feature

    def _series(self, block: int, branch: int) -> Series:
        if (block, branch) not in self.series:
            levels = tuple(self.task.noise_levels[: self.task.timetable.num_steps])
            num_layers = self.task.model.config.num_layers
            self.series[block, branch] = Series(BRANCHES[branch], levels, num_layers)
        return self.series[block, branch]
