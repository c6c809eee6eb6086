"""Laws of the solvers: a scheduler of diffusers run plainly, whatever happens between a block's steps."""

import math
import pickle
import warnings
import weakref
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from vidgen.denoise.multistep import CLASSES, SchedulerSolver, SolverName, make_scheduler, make_solver
from vidgen.denoise.schedule import noise_levels
from vidgen.denoise.solver import Euler, History, Solver

SHAPE = (1, 4, 3, 6, 5)
STEPS = (1, 2, 3, 5, 20)
SHIFT = 5.0
WAN: dict[str, Any] = {  # the published scheduler_config.json, as far as it matters
    "_class_name": "UniPCMultistepScheduler", "_diffusers_version": "0.33.0.dev0", "disable_corrector": [],
    "final_sigmas_type": "zero", "flow_shift": 3.0, "lower_order_final": True, "num_train_timesteps": 1000,
    "predict_x0": True, "prediction_type": "flow_prediction", "solver_order": 2, "solver_p": None,
    "solver_type": "bh2", "timestep_spacing": "linspace", "use_flow_sigmas": True, "use_karras_sigmas": False,
}  # fmt: skip
FLOW_MATCH: dict[str, Any] = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
DPM: dict[str, Any] = {
    "_class_name": "DPMSolverMultistepScheduler", "prediction_type": "flow_prediction",
    "use_flow_sigmas": True, "flow_shift": 3.0, "solver_order": 2,
}  # fmt: skip
CASES: dict[str, tuple[SolverName, dict[str, Any]]] = {
    "unipc": ("unipc", WAN),
    "unipc-third-order": ("unipc", WAN | {"solver_order": 3}),
    "unipc-first-order": ("unipc", WAN | {"solver_order": 1}),
    "unipc-not-to-the-end": ("unipc", WAN | {"final_sigmas_type": "sigma_min", "solver_order": 3}),
    "unipc-corrected-late": ("unipc", WAN | {"disable_corrector": [0, 1]}),
    "unipc-karras": ("unipc", WAN | {"use_karras_sigmas": True}),
    "dpm++": ("dpm++", DPM),
    "dpm++-third-order": ("dpm++", DPM | {"solver_order": 3}),
    "dpm++-first-order": ("dpm++", DPM | {"solver_order": 1}),
    "dpm++-heun": ("dpm++", DPM | {"solver_type": "heun", "euler_at_final": True}),
    "euler": ("euler", FLOW_MATCH),
    "euler-karras": ("euler", FLOW_MATCH | {"use_karras_sigmas": True}),
}
each_case = pytest.mark.parametrize(("name", "config"), CASES.values(), ids=CASES)


def start(seed: int = 0) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


def velocity(latents: Tensor, step: int) -> Tensor:
    """A model: not linear, and another one at each step."""
    return torch.sin(2 * latents + step) + 0.3 * latents


def scheduler(config: dict[str, Any], num_steps: int) -> Any:
    import diffusers

    return timed(getattr(diffusers, config["_class_name"]).from_config(config), num_steps)


def timed(made: Any, num_steps: int) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # numpy's, of diffusers' own call
        made.set_timesteps(num_steps)
    return made


def plainly(made: Any, latents: Tensor, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Latents after each step of the pipeline's own loop."""
    made.set_begin_index(0)
    versions = []
    for step, timestep in enumerate(made.timesteps):
        latents = made.step(velocity(latents, step).to(dtype), timestep, latents, return_dict=False)[0]
        versions.append(latents)
    return versions


def ours(solver: Solver, num_steps: int, latents: Tensor, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    versions, history = [], ()
    for step in range(num_steps):
        latents, history = solver.step(latents, velocity(latents, step).to(dtype), step, history)
        versions.append(latents)
    assert history == ()
    return versions


def same(some: list[Tensor], others: list[Tensor]) -> bool:
    equal = [torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(some, others, strict=True)]
    return all(equal) and all(bool(tensor.isfinite().all()) for tensor in some)


@each_case
@pytest.mark.parametrize("num_steps", STEPS)
def test_a_block_is_stepped_as_by_the_scheduler_bit_for_bit(
    name: SolverName, config: dict[str, Any], num_steps: int
):
    solver, _ = make_solver(None, num_steps, SHIFT, config)
    shift = "shift" if name == "euler" else "flow_shift"
    expected = plainly(scheduler(config | {shift: SHIFT}, num_steps), start())
    assert same(ours(solver, num_steps, start()), expected)


@each_case
@pytest.mark.parametrize("num_steps", STEPS)
def test_interleaved_blocks_do_not_touch_each_other(name: SolverName, config: dict[str, Any], num_steps: int):
    solver, _ = make_solver(name, num_steps, SHIFT, config)
    alone = [ours(solver, num_steps, start(seed))[-1] for seed in range(3)]
    blocks: dict[int, tuple[Tensor, History]] = {seed: (start(seed), ()) for seed in range(3)}
    for tick in range(num_steps + 2):
        for seed, (latents, history) in blocks.items():
            step = tick - seed
            if 0 <= step < num_steps:
                blocks[seed] = solver.step(latents, velocity(latents, step), step, history)
    assert same([blocks[seed][0] for seed in range(3)], alone)


@each_case
@pytest.mark.parametrize("num_steps", STEPS)
def test_a_history_kept_on_disk_continues_on_another_solver(
    name: SolverName, config: dict[str, Any], num_steps: int, tmp_path: Path
):
    solver, _ = make_solver(name, num_steps, SHIFT, config)
    expected = ours(solver, num_steps, start())[-1]
    latents, history = start(), ()
    for step in range(num_steps):
        after, kept = solver.step(latents, velocity(latents, step), step, history)
        names = {f"history/{i}": tensor for i, tensor in enumerate(kept)}
        save_file({"block": after} | names, tmp_path / "state.safetensors")
        saved = load_file(tmp_path / "state.safetensors")
        latents, history = saved["block"], tuple(saved[name] for name in names)
        solver = pickle.loads(pickle.dumps(make_solver(name, num_steps, SHIFT, config)[0]))
    assert torch.equal(latents, expected)


@each_case
def test_a_pickled_solver_holds_no_block_and_gives_the_same(name: SolverName, config: dict[str, Any]):
    solver, _ = make_solver(name, 5, SHIFT, config)
    expected = ours(solver, 5, start())
    solver.step(start(1), start(2), 0, ())
    data = pickle.dumps(solver)
    assert len(data) < 2000
    assert same(ours(pickle.loads(data), 5, start()), expected)


@each_case
def test_a_block_that_begins_at_a_later_step_begins_as_the_scheduler_does(
    name: SolverName, config: dict[str, Any]
):
    solver, _ = make_solver(name, 6, None, config)
    made = scheduler(config, 6)
    made.set_begin_index(2)
    ours = theirs = start()
    history: History = ()
    for step in range(2, 6):
        ours, history = solver.step(ours, velocity(ours, step), step, history)
        theirs = made.step(velocity(theirs, step), made.timesteps[step], theirs, return_dict=False)[0]
        assert torch.equal(ours, theirs)


@each_case
def test_a_solver_keeps_no_tensor_between_steps(name: SolverName, config: dict[str, Any]):
    solver, _ = make_solver(name, 5, SHIFT, config)
    latents, history = start(), ()
    for step in range(3):
        latents, history = solver.step(latents, velocity(latents, step), step, history)
    alive = [weakref.ref(tensor) for tensor in (latents, *history)]
    del latents, history
    assert not any(tensor() is not None for tensor in alive)


@pytest.mark.parametrize("name", ["unipc", "dpm++"])
def test_bfloat16_velocities_are_stepped_as_by_the_scheduler(name: SolverName):
    config = {"unipc": WAN, "dpm++": DPM}[name]
    solver, _ = make_solver(name, 6, None, config)
    expected = plainly(scheduler(config, 6), start(), torch.bfloat16)
    assert expected[-1].dtype == torch.float32
    assert same(ours(solver, 6, start(), torch.bfloat16), expected)


@each_case
@pytest.mark.parametrize("num_steps", (1, 2, 4, 20, 50))
def test_the_model_sees_the_schedulers_timesteps(name: SolverName, config: dict[str, Any], num_steps: int):
    _, levels = make_solver(name, num_steps, None, config)
    assert len(levels) == num_steps + 1
    assert levels[-1] == 0
    assert all(earlier >= later for earlier, later in pairwise(levels))
    seen = torch.tensor(levels[:-1], dtype=torch.float32) * 1000  # the noise embedding's arithmetic
    timesteps = scheduler(config, num_steps).timesteps
    if name == "euler":
        assert torch.equal(seen, timesteps)
    torch.testing.assert_close(seen, timesteps.float(), atol=0, rtol=2**-23)


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0, 12.0])
def test_the_engines_euler_on_flow_match_levels_is_the_flow_match_scheduler(shift: float):
    made = scheduler(FLOW_MATCH | {"shift": shift}, 20)
    solver, levels = make_solver("euler", 20, shift, FLOW_MATCH)
    assert isinstance(solver, Euler)
    assert levels == solver.noise_levels == made.sigmas.tolist()
    assert levels[0] == 1
    assert same(ours(solver, 20, start()), plainly(made, start()))


@pytest.mark.parametrize("shift", [None, 1.0, 5.0])
@pytest.mark.parametrize("name", ["euler", None])
def test_without_a_config_euler_is_the_engines_own(name: SolverName | None, shift: float | None):
    solver, levels = make_solver(name, 8, shift)
    assert isinstance(solver, Euler)
    assert levels == solver.noise_levels == noise_levels(8, 1.0 if shift is None else shift)


@pytest.mark.parametrize("name", ["unipc", "dpm++"])
def test_without_a_config_the_settings_are_wans(name: SolverName):
    config = {"unipc": WAN, "dpm++": DPM}[name] | {"flow_shift": SHIFT}
    solver, levels = make_solver(name, 6, SHIFT)
    assert same(ours(solver, 6, start()), plainly(scheduler(config, 6), start()))
    assert levels == make_solver(name, 6, SHIFT, config)[1]


def test_the_configs_shift_holds_unless_another_is_given():
    _, own = make_solver(None, 6, None, WAN)
    assert own == make_solver(None, 6, 3.0, WAN)[1] != make_solver(None, 6, 5.0, WAN)[1]


@pytest.mark.parametrize("name", get_args(SolverName))
@pytest.mark.parametrize("config", [WAN, DPM, FLOW_MATCH], ids=["unipc", "dpm++", "euler"])
def test_another_solver_takes_over_the_config_as_from_config_does(name: SolverName, config: dict[str, Any]):
    import diffusers

    solver, _ = make_solver(name, 6, None, config)
    shift = config.get("flow_shift", config.get("shift"))
    flow: dict[str, Any] = {
        "flow_shift": shift,
        "prediction_type": "flow_prediction",
        "use_flow_sigmas": True,
    }
    made = getattr(diffusers, CLASSES[name]).from_config(
        {key: value for key, value in config.items() if key[0] != "_"},
        **({"shift": shift} if name == "euler" else flow),
    )
    assert same(ours(solver, 6, start()), plainly(timed(made, 6), start()))


@pytest.mark.parametrize("name", ["unipc", "dpm++"])
def test_errors_fall_as_those_of_second_order(name: SolverName):
    """On dx/dt = sin x, from the scheduler's first level to 0."""
    noise, errors = 3 * start().tanh(), []
    for num_steps in (10, 20, 40):
        solver, _ = make_solver(name, num_steps, 1.0)
        assert isinstance(solver, SchedulerSolver)
        first = float(make_scheduler(name, solver.settings, num_steps).sigmas[0])
        latents, history = noise, ()
        for step in range(num_steps):
            latents, history = solver.step(latents, latents.sin(), step, history)
        errors.append(float((latents - 2 * torch.atan(torch.tan(noise / 2) * math.exp(-first))).abs().max()))
    assert errors[1] < errors[0] / 2.5
    assert errors[2] < errors[1] / 2.5


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (WAN | {"_class_name": "DDIMScheduler"}, "'DDIMScheduler': known are .* euler, unipc, dpm"),
        ({"flow_shift": 3.0}, "class None: known are"),
        (WAN | {"prediction_type": "epsilon"}, "prediction_type='epsilon': only deterministic"),
        (WAN | {"use_flow_sigmas": False}, "use_flow_sigmas=False"),
        (WAN | {"predict_x0": False}, "predict_x0=False"),
        (DPM | {"algorithm_type": "sde-dpmsolver++"}, "algorithm_type='sde-dpmsolver"),
        (FLOW_MATCH | {"stochastic_sampling": True}, "stochastic_sampling=True"),
        (FLOW_MATCH | {"use_dynamic_shifting": True}, "use_dynamic_shifting=True"),
        (WAN | {"solver_type": "bh1"}, "not finite"),
        (WAN | {"lower_order_final": False}, "not finite"),
    ],
)
def test_a_config_that_cannot_be_a_solver_is_one_clear_error(config: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message) as error:
        make_solver(None, 4, None, config)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("num_steps", "shift"), [(0, 1.0), (-1, None), (4, 0.0), (4, float("nan"))])
@pytest.mark.parametrize("name", get_args(SolverName))
def test_bad_steps_and_shifts_are_errors(name: SolverName, num_steps: int, shift: float | None):
    with pytest.raises(ValueError, match="need at least 1 step"):
        make_solver(name, num_steps, shift, WAN)


def test_an_unknown_solver_is_an_error_that_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"'heun': choose from euler, unipc, dpm\+\+"):
        make_solver("heun", 4)  # type: ignore[arg-type]


def test_settings_that_this_diffusers_does_not_know_are_warned_of():
    with pytest.warns(UserWarning, match="settings newer of UniPC"):
        solver, _ = make_solver(None, 4, None, WAN | {"newer": 1})
    assert same(ours(solver, 4, start()), ours(make_solver(None, 4, None, WAN)[0], 4, start()))
