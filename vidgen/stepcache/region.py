"""Which tokens of a step run where only a region does, by how much the model said of each when it last ran.

Source: region-adaptive sampling, RAS (arXiv 2502.10389). Of a token's patch the model's output is as spread
over channels as there is to say; and the longer a token has not run, the more it is wanted. What is not run
stays as the model last said, and is seen by the others as it last was.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from vidgen.stepcache.settings import CacheSettings

GROWTH = 0.1  # of the wish for a token, for each step that left it out

# C latent channels, F latent frames, Y X latent rows and columns, S tokens of a frame


def steps_of_regions(
    settings: CacheSettings, num_steps: int, goes_on: Callable[[int], bool]
) -> tuple[bool, ...]:
    """Of each step of a block, whether only a region runs: by the clock. The settings are resolved.

    The first steps run whole, the last ones, and after `max_skips` in a row one to refresh the rest.
    `goes_on` tells of a step whether what the one before it left fits.
    """
    assert settings.warm_up_steps and settings.max_skips is not None and settings.last_steps is not None
    found, in_a_row = list[bool](), 0
    for step in range(num_steps):
        is_whole = (
            settings.ratio == 1
            or step < settings.warm_up_steps
            or step >= num_steps - settings.last_steps
            or in_a_row >= settings.max_skips
            or not goes_on(step)
        )
        in_a_row = 0 if is_whole else in_a_row + 1
        found.append(not is_whole)
    return tuple(found)


def tokens_that_run(settings: CacheSettings, tokens: int) -> int:
    """How many of a frame's."""
    assert settings.ratio is not None
    return max(1, round(settings.ratio * tokens))


def wish(velocity_1CFYX: Tensor, left_out_FS: Tensor, patch: tuple[int, int]) -> Tensor:
    """How much each token [F, S] is wanted: the spread of what was said of it, more if left out for long."""
    spread_FYX = velocity_1CFYX[0].float().std(dim=0)
    rows, columns = patch
    patches = spread_FYX.unflatten(2, (-1, columns)).unflatten(1, (-1, rows))  # [F, Y/p, p, X/q, q]
    return patches.mean((2, 4)).flatten(1) * torch.exp(GROWTH * left_out_FS)


def choose(settings: CacheSettings, wish_FS: Tensor) -> Tensor:
    """The tokens that run, [F, S] of 0 and 1, as many in every frame.

    Left out are those that are wanted least and, a share `highest` of all left out, those at the other end,
    where there is only noise to say.
    """
    assert settings.highest is not None
    num_tokens = wish_FS.shape[1]
    count = tokens_that_run(settings, num_tokens)
    above = math.floor((num_tokens - count) * settings.highest + 0.5)
    order_FS = wish_FS.argsort(dim=1, descending=True, stable=True)
    return torch.zeros_like(wish_FS).scatter_(1, order_FS[:, above : above + count], 1.0)


def mix(active_FS: Tensor, new_1CFYX: Tensor, old_1CFYX: Tensor, patch: tuple[int, int]) -> Tensor:
    """What the model said: newly of tokens that ran, of the others as it last did."""
    _, _, frames, rows, columns = new_1CFYX.shape
    grid_FYX = active_FS.view(frames, rows // patch[0], columns // patch[1]).bool()
    whole_FYX = grid_FYX.repeat_interleave(patch[0], dim=1).repeat_interleave(patch[1], dim=2)
    return torch.where(whole_FYX, new_1CFYX, old_1CFYX)
