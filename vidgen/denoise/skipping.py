"""Whether a step cache skips a forward: decided from what is the same on every rank, whatever ran where."""

from typing import TYPE_CHECKING

from vidgen.denoise.forwards import Forward
from vidgen.denoise.state import BlockState, Window
from vidgen.stepcache.cache import Decision
from vidgen.stepcache.kept import NOTHING_KEPT, Kept

if TYPE_CHECKING:
    from vidgen.denoise.loop import Task


def decide(task: "Task", forward: Forward, own: BlockState, window: Window) -> Decision | None:
    """What the task's step cache says of a block's step; None where there is none.

    The prompt's branch speaks for all: they are run or skipped together.
    """
    if task.cache is None:
        return None
    step, frames = forward.step, window.own_frames()
    text_BNT = task.run_texts(task.timetable.block(forward.block), step)[0][:1]
    conditioning = task.conditioning(step, frames.levels, text_BNT)
    signal = task.cache.look(task.model_at(step), frames.latents_BCFYX, conditioning)
    decision = task.cache.decide(
        _usable(task, own.kept, step), step, task.noise_levels, signal, task.branches_at(step)
    )
    if decision.outputs is not None and not _lends_again(task, forward, decision.kept.steps[0]):
        return Decision(decision.kept, signal)
    return decision


def _usable(task: "Task", kept: Kept, step: int) -> Kept:
    """Nothing of what another expert said."""
    is_other = bool(kept.steps) and task.timetable.expert(kept.steps[0]) != task.timetable.expert(step)
    return NOTHING_KEPT if is_other else kept


def _lends_again(task: "Task", forward: Forward, ran: int) -> bool:
    """Whether the block's last step that ran lent all that this one is to lend."""
    return set(forward.lends) <= set(task.timetable.lends(forward.block, ran))
