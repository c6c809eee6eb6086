"""Which layers a step leaves out, adding what they changed when they last ran: known from the clock alone.

Source: Delta-DiT (arXiv 2406.01125). Early steps, which draw outlines, leave out layers at the rear; late
ones, which draw detail, those at the front. Of a layer its change is kept, not its output, so that what is
new in the tokens goes on through it.
"""

from collections.abc import Callable

from vidgen.stepcache.settings import CacheSettings

NO_LAYERS = range(0)


def layers_left_out(
    settings: CacheSettings, num_layers: int, num_steps: int, goes_on: Callable[[int, int], bool]
) -> tuple[range, ...]:
    """Of each step of a block; none where all run. The settings are resolved.

    `goes_on` tells of (a step at which all ran, a later one) whether the changes of the one fit the other.
    """
    assert settings.warm_up_steps and settings.max_skips is not None and settings.last_steps is not None
    found, ran = list[range](), 0
    for step in range(num_steps):
        wanted = _candidates(settings, num_layers, step / num_steps)
        is_whole = (
            step < settings.warm_up_steps
            or step >= num_steps - settings.last_steps
            or step - ran > settings.max_skips
            or wanted != _candidates(settings, num_layers, ran / num_steps)
            or not goes_on(ran, step)
        )
        ran = step if is_whole else ran
        found.append(NO_LAYERS if is_whole else wanted)
    return tuple(found)


def _candidates(settings: CacheSettings, num_layers: int, progress: float) -> range:
    """The layers that a step may leave out, so far from noise to video in [0, 1)."""
    assert settings.layers is not None and settings.boundary is not None
    count = max(1, round(settings.layers * num_layers)) if settings.layers else 0
    return range(num_layers - count, num_layers) if progress < settings.boundary else range(count)
