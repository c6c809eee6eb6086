"""What does not go together in a task: one line each, before anything runs."""

from typing import TYPE_CHECKING

from vidgen.denoise.lockstep import Clips
from vidgen.denoise.timetable import Timetable
from vidgen.stepcache.settings import CacheSettings

if TYPE_CHECKING:
    from vidgen.denoise.loop import Task


def check_task(task: "Task") -> None:
    """ValueError for parts that do not fit one another."""
    timetable = task.timetable
    if len(task.noise_levels) != timetable.num_steps + 1:
        raise ValueError(
            f"{len(task.noise_levels)} noise levels for {timetable.num_steps} steps: need one more "
            "level than steps"
        )
    if (task.second_model is None) != (timetable.switch_step is None):
        raise ValueError("a second model and the step from which it is used belong together")
    if task.still is not None and timetable.stride < timetable.num_steps:
        raise ValueError(
            f"static_threshold={task.still.threshold:g}: needs the block before to be finished when a "
            "block begins; take timetable=autoregressive, or leave static_threshold out"
        )
    if task.runs_per_forward < task.num_branches and task.branches_at(-1) < task.num_branches:
        raise ValueError(
            "guidance=stacked: residual_guidance=onetime runs a second branch at a block's first step "
            "only, which makes no batch; leave guidance out"
        )
    settings = CacheSettings() if task.cache is None else task.cache.settings
    check_scheme(timetable, task.clips, settings, is_sparse=task.sparsity is not None)
    _check_clips(task)
    _check_region(task)


def check_scheme(timetable: Timetable, clips: Clips | None, cache: CacheSettings, *, is_sparse: bool) -> None:
    """ValueError for a step cache or sparse attention that a timetable knows nothing of."""
    if cache.method != "none":
        for name, is_used in {"buffer": timetable.joint, "pipefusion": timetable.is_patched}.items():
            if is_used:
                raise ValueError(f"timetable={name}: knows no step cache; leave cache out")
        if clips is not None and not cache.skips_forwards:
            raise ValueError(
                f"cache={cache.method} with timetable=lockstep: knows no clips; take cache=taylor, or "
                "another timetable"
            )
    dense_only = {
        "buffer": timetable.joint,
        "pipefusion": timetable.is_patched,
        "lockstep": clips is not None,
    }
    for name, is_used in dense_only.items():
        if is_used and is_sparse:
            raise ValueError(f"timetable={name}: knows no sparse attention; leave sparsity out")


def _check_region(task: "Task") -> None:
    """What cannot be where tokens are left out: their attention is plain."""
    if task.cache is None or not task.cache.settings.skips_tokens:
        return
    if task.sparsity is not None:
        raise ValueError("cache=region with sparsity: its attention is dense; leave one of both out")
    if any(model.config.window is not None for model in task.models):
        raise ValueError("cache=region: this model's attention has a window; take another cache")


def _check_clips(task: "Task") -> None:
    timetable, clips = task.timetable, task.clips
    if clips is None:
        return
    assert timetable.num_blocks == 1 and timetable.num_frames == clips.num_frames, "one block of all frames"
    if any(model.config.window is not None for model in task.models):
        raise ValueError(
            "timetable=lockstep: this model's attention has a window already; take another timetable"
        )
