"""What a step cache leaves out at each step, as far as that can be said before anything is rendered."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vidgen.denoise.skipping import decided, layers_of_steps, regions_of_steps
from vidgen.denoise.timetable import Timetable
from vidgen.stepcache.cache import StepCache
from vidgen.stepcache.delta import NO_LAYERS
from vidgen.stepcache.kept import NOTHING_KEPT
from vidgen.stepcache.region import tokens_that_run


@dataclass(frozen=True, slots=True)
class Foreseen:
    """Of each step of a block in the middle of a video."""

    skipped: tuple[bool, ...]
    left_out: tuple[range, ...]  # layers
    tokens: tuple[float, ...]  # share of a frame's, that run
    is_known: bool = True  # False: more is skipped, but which steps hangs on what is rendered


def foresee(
    cache: StepCache | None,
    timetable: Timetable,
    *,
    levels: Sequence[float],
    num_layers: int,
    branches: int,
    tokens_per_frame: int,
) -> Foreseen:
    """What a cache that the timetable knows leaves out, by the rules of the loop itself.

    `levels` are the noise levels of all steps, and the last one's end.
    """
    num_steps = timetable.num_steps
    skipped, left_out, tokens = (False,) * num_steps, (NO_LAYERS,) * num_steps, (1.0,) * num_steps
    if cache is None:
        return Foreseen(skipped, left_out, tokens)
    settings, block, at_each = cache.settings, timetable.num_blocks // 2, (branches,) * num_steps
    if settings.skips_layers:
        left_out = layers_of_steps(settings, timetable, num_layers, at_each, block)
    elif settings.skips_tokens:
        share = tokens_that_run(settings, tokens_per_frame) / tokens_per_frame
        only_some = regions_of_steps(settings, timetable, at_each, block)
        tokens = tuple(share if some else 1.0 for some in only_some)
    elif not settings.is_foreseen:
        return Foreseen(skipped, left_out, tokens, is_known=False)
    else:
        skipped = _skipped(cache, timetable, levels, block)
    return Foreseen(skipped, left_out, tokens)


def _skipped(cache: StepCache, timetable: Timetable, levels: Sequence[float], block: int) -> tuple[bool, ...]:
    """The loop's own decisions, on outputs of no meaning: these methods do not look at them."""
    kept, found = NOTHING_KEPT, list[bool]()
    for step in range(timetable.num_steps):
        decision = decided(cache, timetable, levels, block, step, kept, None, 1)
        found.append(decision.outputs is not None)
        kept = cache.after(decision, step, decision.outputs or (torch.zeros(1),))
    return tuple(found)
