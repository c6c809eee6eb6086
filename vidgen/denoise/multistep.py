"""Solvers of diffusers' schedulers: the same numbers, with the memory in the block's history.

diffusers' scheduler objects remember the block they are stepping. Here one of them is only a calculator:
before each step its memory is rebuilt from the step's number and the history, so that blocks may interleave,
move to other ranks and resume from disk.
"""

import inspect
import warnings
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from vidgen.denoise.schedule import noise_levels
from vidgen.denoise.solver import Euler, History, Solver

SolverName = Literal["euler", "unipc", "dpm++"]
CLASSES: dict[SolverName, str] = {
    "euler": "FlowMatchEulerDiscreteScheduler",
    "unipc": "UniPCMultistepScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
}
_FLOW: dict[str, Any] = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "solver_order": 2}
# Wan's settings, where a scheduler's config says nothing else
DEFAULTS: dict[SolverName, dict[str, Any]] = {
    "euler": {},
    "unipc": _FLOW | {"solver_type": "bh2"},
    "dpm++": _FLOW | {"algorithm_type": "dpmsolver++"},
}
# settings that would make a step depend on more than (latents, velocity, step, history)
_REFUSED: dict[str, Callable[[Any], bool]] = {
    "use_dynamic_shifting": bool,
    "stochastic_sampling": bool,
    "invert_sigmas": bool,
    "predict_x0": lambda value: not value,
    "solver_p": lambda value: value is not None,
    "algorithm_type": lambda value: value != "dpmsolver++",
    "prediction_type": lambda value: value != "flow_prediction",
    "use_flow_sigmas": lambda value: not value,
}


def make_solver(
    name: SolverName | None, num_steps: int, shift: float | None = None, config: dict[str, Any] | None = None
) -> tuple[Solver, list[float]]:
    """(the solver, the num_steps + 1 noise levels that the model sees).

    `config` is a diffusers scheduler_config.json. Its class is the default name (without one: euler) and its
    shift the default shift; another name takes over what both classes know. Without a config, euler is the
    engine's own, on vidgen.denoise.schedule.noise_levels. ValueError for what cannot be a solver here.
    """
    if num_steps < 1 or not (shift is None or shift > 0):
        raise ValueError(f"num_steps={num_steps}, shift={shift}: need at least 1 step and a shift above 0")
    if name is None:
        name = name_of(config) if config else "euler"
    if name not in CLASSES:
        raise ValueError(f"solver {name!r}: choose from {', '.join(get_args(SolverName))}")
    if name == "euler" and config is None:
        levels = noise_levels(num_steps, 1.0 if shift is None else shift)
        return Euler(levels), levels
    settings = scheduler_settings(name, shift, config or {})
    if name == "euler":
        # its timesteps are 1000 * sigmas, so the sigmas are what the model sees, to the last bit
        sigmas = make_scheduler(name, settings, num_steps).sigmas.tolist()
        return Euler(sigmas), sigmas
    solver = SchedulerSolver(name, settings, num_steps)
    _check_finite(solver)
    return solver, solver.noise_levels


def _check_finite(solver: "SchedulerSolver") -> None:
    """ValueError for settings whose formulas break down on flow levels, as UniPC's bh1 does at level 0."""
    latents, history = torch.ones(1, 1), ()
    for step in range(solver.num_steps):
        latents, history = solver.step(latents, latents, step, history)
    if not latents.isfinite().all():
        raise ValueError(
            f"{CLASSES[solver.name]} with {solver.settings}: its steps are not finite on flow levels; set "
            "solver_type and lower_order_final as Wan has them"
        )


def name_of(config: dict[str, Any]) -> SolverName:
    """The solver that a scheduler_config.json asks for."""
    class_name = config.get("_class_name")
    for name, known in CLASSES.items():
        if known == class_name:
            return name
    raise ValueError(
        f"scheduler class {class_name!r}: known are {', '.join(CLASSES.values())}; give a solver by name: "
        f"{', '.join(CLASSES)}"
    )


def scheduler_settings(name: SolverName, shift: float | None, config: dict[str, Any]) -> dict[str, Any]:
    """Arguments of the solver's scheduler class: its defaults for Wan, the config's, then the shift.

    Settings that the class does not know are left out; with a warning if they are of its own config.
    """
    config = {key: value for key, value in config.items() if not key.startswith("_") or key == "_class_name"}
    own = config.pop("_class_name", None) == CLASSES[name]
    known = inspect.signature(_scheduler_class(name).__init__).parameters
    if own and (unknown := config.keys() - known):
        warnings.warn(
            f"settings {', '.join(sorted(unknown))} of {CLASSES[name]} are unknown to this diffusers and "
            "left out",
            stacklevel=3,
        )
    if shift is None:
        shift = next((config[key] for key in ("flow_shift", "shift") if key in config), None)
    settings = DEFAULTS[name] | {key: value for key, value in config.items() if key in known}
    if shift is not None:
        settings["shift" if name == "euler" else "flow_shift"] = shift
    bad = [f"{key}={settings[key]!r}" for key in _REFUSED if key in settings and _REFUSED[key](settings[key])]
    if bad:
        raise ValueError(
            f"{CLASSES[name]} with {', '.join(bad)}: only deterministic solvers of flow models with a shift "
            "that is given work block by block; change these settings or give another solver"
        )
    return settings


def make_scheduler(name: SolverName, settings: dict[str, Any], num_steps: int) -> Any:
    """diffusers' scheduler object, with its levels set."""
    scheduler = _scheduler_class(name)(**settings)
    with warnings.catch_warnings():
        # numpy 2 complains of how diffusers hands it a tensor
        warnings.simplefilter("ignore", DeprecationWarning)
        scheduler.set_timesteps(num_steps)
    return scheduler


def _scheduler_class(name: SolverName) -> Any:
    import diffusers

    return getattr(diffusers, CLASSES[name])


class SchedulerSolver:
    """UniPC or DPM++ steps. Holds nothing of any block, pickles as its settings."""

    def __init__(self, name: SolverName, settings: dict[str, Any], num_steps: int) -> None:
        self.name: SolverName = name
        self.settings, self.num_steps = settings, num_steps
        self._scheduler = make_scheduler(name, settings, num_steps)
        num_train = self._scheduler.config.num_train_timesteps
        self.noise_levels = [t / num_train for t in self._scheduler.timesteps.tolist()] + [0.0]
        self._order: int = self._scheduler.config.solver_order
        self._corrects = name == "unipc"

    def __reduce__(self) -> tuple[type["SchedulerSolver"], tuple[object, ...]]:
        return SchedulerSolver, (self.name, self.settings, self.num_steps)

    def step(self, latents: Tensor, velocity: Tensor, step: int, history: History) -> tuple[Tensor, History]:
        """See Solver.step. The history is of clean latents predicted, oldest first.

        UniPC puts the latents that it corrected last before them. A history that is empty at a later step
        starts anew with a step of first order.
        """
        self._restore(step, history)
        scheduler = self._scheduler
        after = scheduler.step(velocity, scheduler.timesteps[step], latents, return_dict=False)[0]
        predicted = tuple(tensor for tensor in scheduler.model_outputs if tensor is not None)
        if step + 1 == self.num_steps:
            kept: History = ()
        elif self._corrects:
            kept = (scheduler.last_sample, *predicted)
        else:
            kept = predicted[1 - self._order :] if self._order > 1 else ()
        self._restore(0, ())  # hold on to no tensor
        return after, kept

    def _restore(self, step: int, history: History) -> None:
        """Set the scheduler's memory to what it is before this step of the block."""
        scheduler = self._scheduler
        predicted = history[1:] if self._corrects else history
        scheduler._step_index = step
        scheduler.model_outputs = [None] * (self._order - len(predicted)) + list(predicted)
        scheduler.lower_order_nums = len(predicted)
        if self._corrects:
            scheduler.last_sample = history[0] if history else None
            # the order of the predictor's step before, which the corrector takes up
            steps_left = self.num_steps - step + 1
            lowered = scheduler.config.lower_order_final
            scheduler.this_order = min(len(predicted), steps_left if lowered else self._order)
