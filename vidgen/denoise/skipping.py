"""Whether a step cache skips a forward, or some layers or tokens of it: the same on every rank."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TYPE_CHECKING

from torch import Tensor

from vidgen.denoise.forwards import Forward
from vidgen.denoise.state import BlockState, Window
from vidgen.denoise.timetable import Timetable
from vidgen.stepcache.cache import Decision, StepCache
from vidgen.stepcache.delta import layers_left_out
from vidgen.stepcache.kept import NOTHING_KEPT, Kept
from vidgen.stepcache.region import choose, steps_of_regions, tokens_that_run, wish
from vidgen.stepcache.settings import CacheSettings

if TYPE_CHECKING:
    from vidgen.denoise.loop import Task


def decide(task: "Task", forward: Forward, own: BlockState, window: Window) -> Decision | None:
    """What the task's step cache says of a block's step; None where there is none that skips forwards.

    The prompt's branch speaks for all: they are run or skipped together.
    """
    if task.cache is None or task.cache.settings.skips_layers:
        return None
    if task.cache.settings.skips_tokens:
        return Decision(own.kept, None, active_FS=_active(task, task.cache, forward, own.kept))
    step, signal = forward.step, None
    if not task.cache.settings.is_foreseen:  # else nothing is looked at
        frames = window.own_frames()
        text_BNT = task.run_texts(task.timetable.block(forward.block), step)[0][:1]
        conditioning = task.conditioning(step, frames.levels, text_BNT)
        signal = task.cache.look(task.model_at(step), frames.latents_BCFYX, conditioning)
    return decided(task.cache, task.timetable, task.noise_levels, forward.block, step, own.kept, signal,
                    task.branches_at(step))  # fmt: skip


def decided(
    cache: StepCache, timetable: Timetable, levels: Sequence[float], block: int, step: int, kept: Kept,
    signal: Tensor | None, branches: int,
) -> Decision:  # fmt: skip
    """What a cache that skips forwards says of a step."""
    if kept.steps and timetable.expert(kept.steps[0]) != timetable.expert(step):
        kept = NOTHING_KEPT  # nothing of what another expert said
    decision = cache.decide(kept, step, levels, signal, branches)
    # the block's last step that ran must have lent all that this one is to lend
    if decision.outputs is not None and not _lends_again(timetable, block, kept.steps[0], step):
        return Decision(kept, signal)
    return decision


def _lends_again(timetable: Timetable, block: int, ran: int, step: int) -> bool:
    return set(timetable.lends(block, step)) <= set(timetable.lends(block, ran))


def _active(task: "Task", cache: StepCache, forward: Forward, kept: Kept) -> Tensor | None:
    """The tokens that are run, [F, S] of zeros and ones; None: all."""
    regions = regions_of(task)
    assert regions is not None
    if not regions.only_some(forward.block, forward.step):
        return None
    said, patch = kept.outputs[0][0], task.model.config.patch
    frames, rows, columns = task.model.token_grid(said.shape)
    left_out_FS = kept.signals[0] if kept.signals else said.new_zeros(frames, rows * columns)
    return choose(cache.settings, wish(said, left_out_FS, patch))


def skips_forwards(task: "Task") -> bool:
    """Whether the task has a step cache that skips all of a forward or nothing."""
    return task.cache is not None and task.cache.settings.skips_forwards


def skipping_layers(task: "Task") -> Callable[[int], tuple[range, ...]] | None:
    """What tells of a block which layers each of its steps leaves out; None: no step leaves out any."""
    cache, timetable = task.cache, task.timetable
    if cache is None or not cache.settings.skips_layers:
        return None
    branches = _branches(task)
    return partial(layers_of_steps, cache.settings, timetable, task.model.config.num_layers, branches)


@dataclass(frozen=True, slots=True)
class Regions:
    """At which steps only some tokens of a block are run, and how many: known from the clock alone."""

    settings: CacheSettings
    timetable: Timetable
    branches: tuple[int, ...]  # of guidance, at each step

    def only_some(self, block: int, step: int) -> bool:
        """Of a step of a block; False beyond the last one."""
        steps = regions_of_steps(self.settings, self.timetable, self.branches, block)
        return step < len(steps) and steps[step]

    def count(self, tokens: int) -> int:
        """Of a frame's tokens, that are run then."""
        return tokens_that_run(self.settings, tokens)


def regions_of(task: "Task") -> Regions | None:
    """For a task whose step cache leaves out tokens."""
    cache, timetable = task.cache, task.timetable
    if cache is None or not cache.settings.skips_tokens:
        return None
    return Regions(cache.settings, timetable, _branches(task))


def _branches(task: "Task") -> tuple[int, ...]:
    return tuple(task.branches_at(step) for step in range(task.timetable.num_steps))


def share_skipped(task: "Task", forward: Forward, decision: Decision | None) -> float:
    """How much of a forward is skipped: 0 to 1."""
    if decision is not None and decision.active_FS is not None:
        return 1 - float(decision.active_FS.mean())
    left_out = skipping_layers(task)
    if left_out is not None:
        return len(left_out(forward.block)[forward.step]) / task.model.config.num_layers
    return int(decision is not None and decision.outputs is not None)


@lru_cache(maxsize=512)
def layers_of_steps(
    settings: CacheSettings, timetable: Timetable, num_layers: int, branches: tuple[int, ...], block: int
) -> tuple[range, ...]:
    """The layers that each step of a block leaves out, with so many branches of guidance at each."""
    windows = [_window(timetable, block, step) for step in range(timetable.num_steps)]

    def goes_on(ran: int, step: int) -> bool:
        is_same = (
            timetable.expert(ran) == timetable.expert(step)
            and branches[ran] == branches[step]
            and windows[ran] == windows[step]
        )
        return is_same and _lends_again(timetable, block, ran, step)

    return layers_left_out(settings, num_layers, timetable.num_steps, goes_on)


@lru_cache(maxsize=512)
def regions_of_steps(
    settings: CacheSettings, timetable: Timetable, branches: tuple[int, ...], block: int
) -> tuple[bool, ...]:
    """Of each step of a block, whether only some tokens run, with so many branches of guidance at each."""
    windows = [_window(timetable, block, step) for step in range(timetable.num_steps)]

    def goes_on(step: int) -> bool:
        return (
            timetable.expert(step - 1) == timetable.expert(step)
            and branches[step - 1] == branches[step]
            and windows[step - 1] == windows[step]
        )

    return steps_of_regions(settings, timetable.num_steps, goes_on)


def _window(timetable: Timetable, block: int, step: int) -> tuple[int, int, int] | None:
    """The frames before a block's own ones in its window: (of which block, from, to)."""
    forwards = timetable.forwards(timetable.admission_tick(block) + step)
    read = next(forward for forward in forwards if forward.block == block).before_latents
    return None if read is None else (read.block, read.start, read.stop)
