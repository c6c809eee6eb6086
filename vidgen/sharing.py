"""How a job's ranks share its work, and which ways there are not."""

from collections.abc import Iterable

from vidgen.config import JobConfig, ParallelConfig
from vidgen.denoise.checks import check_scheme
from vidgen.denoise.loop import Task
from vidgen.parallel.planner.schemes import Scheme
from vidgen.parallel.topology import AXES, Axis, Lanes, by_hand, check_num_ranks
from vidgen.sparsity.policy import Policy
from vidgen.sparsity.settings import SparsitySettings
from vidgen.stepcache.settings import CacheSettings
from vidgen.types import GuidanceMode


def lanes_of(parallel: ParallelConfig) -> Lanes:
    """How the job's ranks share tokens, heads, branches and frames."""
    return Lanes(**{axis: getattr(parallel, axis) for axis in AXES})


def check_parallel(parallel: ParallelConfig, num_layers: int) -> None:
    """ValueError in one line for ranks that this model cannot be cut over."""
    cut, num_lanes = parallel.layers_per_rank, lanes_of(parallel).num_lanes
    if parallel.ranks == "auto" or parallel.scheme == "auto":
        return
    num_stages, rest = divmod(parallel.ranks, num_lanes)
    if rest or not num_stages:
        wanted = " x ".join(
            f"{axis}={getattr(parallel, axis)}" for axis in AXES if getattr(parallel, axis) > 1
        )
        nearest = max(1, num_stages) * num_lanes
        raise ValueError(f"ranks={parallel.ranks}: {wanted} need a multiple of {num_lanes}; try {nearest}")
    if cut is not None:
        by_hand(cut, num_layers)
        if num_stages != len(cut):
            raise ValueError(
                f"layers_per_rank={list(cut)} is a cut for {len(cut)} stages, and ranks={parallel.ranks}"
                + (f" are {num_stages} in each of {num_lanes} lanes" if num_lanes > 1 else "")
                + ": make them agree"
            )
    try:
        check_num_ranks(num_stages, num_layers)
    except ValueError as error:
        if num_lanes == 1:
            raise
        raise ValueError(
            f"ranks={parallel.ranks}: in {num_lanes} lanes are {num_stages} stages, and the model has "
            f"{num_layers} layers, of which each needs one; take at most {num_layers * num_lanes}"
        ) from error


def closed_axes(cache: CacheSettings, sparsity: SparsitySettings, guidance: GuidanceMode) -> frozenset[Axis]:
    """The axes that `check_lanes` refuses to a task of these settings."""
    by_sparsity = frozenset[Axis]() if sparsity.policy == "none" else _closed_by_sparsity(sparsity)
    by_guidance = frozenset[Axis](["guidance"] if guidance == GuidanceMode.STACKED else [])
    return _closed_by_cache(cache) | by_sparsity | by_guidance


def _closed_by_cache(cache: CacheSettings) -> frozenset[Axis]:
    """A cache that leaves out a part of a step keeps whole frames."""
    return frozenset(("ring", "ulysses") if cache.skips_layers or cache.skips_tokens else ())


def _closed_by_sparsity(sparse: SparsitySettings | Policy) -> frozenset[Axis]:
    """A policy sees whole rows of scores; ranks that share heads have these only if they are all alike."""
    return frozenset(("ring",) if sparse.heads_are_alike else ("ring", "ulysses"))


def check_scheme_of(job: JobConfig, scheme: Scheme) -> None:
    """ValueError for a scheme that the job's step cache or sparse attention does not know."""
    is_sparse = job.attention.sparsity.policy != "none"
    check_scheme(scheme.timetable, scheme.clips, job.cache, is_sparse=is_sparse)


def known_to(job: JobConfig, found: Iterable[Scheme]) -> list[Scheme]:
    """Those schemes that the job's step cache and sparse attention know. ValueError where they know none."""
    known, refusal = list[Scheme](), None
    for scheme in found:
        try:
            check_scheme_of(job, scheme)
        except ValueError as error:
            refusal = refusal or error
        else:
            known.append(scheme)
    if refusal is not None and not known:
        raise refusal
    return known


def check_lanes(task: Task, lanes: Lanes) -> None:
    """ValueError in one line for lanes that this task cannot be shared among."""
    if lanes.guidance > 2:
        raise ValueError(f"guidance={lanes.guidance}: there are two branches to share; take 1 or 2")
    if lanes.guidance == 2:
        branches = {task.branches_at(step) for step in range(task.timetable.num_steps)}
        if branches != {2} or task.guidance_mode == GuidanceMode.STACKED:
            raise ValueError(
                "guidance=2: needs two branches of guidance at every step, one by one; leave it out with "
                "guidance_scale=1, residual_guidance or guidance=stacked"
            )
    if lanes.clip > 1 and task.clips is None:
        raise ValueError(f"clip={lanes.clip}: clips are those of timetable=lockstep; leave it out")
    if task.clips is not None and lanes.clip > task.clips.num_clips:
        raise ValueError(
            f"clip={lanes.clip}: the video has {task.clips.num_clips} clips of {task.clips.clip_frames} "
            f"latent frames; take clip=1 to {task.clips.num_clips}, or a smaller block_frames"
        )
    used = {axis for axis in AXES if getattr(lanes, axis) > 1}
    if task.cache is not None and used & _closed_by_cache(task.cache.settings):
        raise ValueError(
            f"cache={task.cache.settings.method} with ulysses={lanes.ulysses}, ring={lanes.ring}: keeps "
            "whole frames; take layers on more ranks instead, or cache=taylor"
        )
    sparse = None if task.sparsity is None else task.sparsity.policy
    if sparse is not None and (refused := used & _closed_by_sparsity(sparse)):
        axis = min(refused)
        raise ValueError(
            f"{axis}={getattr(lanes, axis)} with sparsity={sparse.name}: ulysses knows radial, local and "
            "sliding_tile with restore=false and one window for all heads, ring no sparsity; leave one of "
            "them out"
        )
