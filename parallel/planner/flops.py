"""Floating-point operations of a whole render: what there is to do, whoever does it and however fast."""

from vidgen.parallel.planner.schemes import Scheme
from vidgen.parallel.planner.steps import Steps, all_steps, item_counts
from vidgen.parallel.planner.work import (
    Film,
    attention_flops,
    end_flops,
    first_channels,
    linear_flops,
    out_channels,
)
from vidgen.parallel.simulation.workload import Item


def render_flops(
    film: Film, scheme: Scheme, *, ran: float = 1.0, density: float = 1.0, steps: Steps | None = None
) -> float:
    """Of all runs of the model in a render: layers, embedding and projection; not of the codec.

    `ran` is the share of the forwards that no step cache skipped, `density` that of the pairs of queries and
    keys in self-attention that were not left out, both means over the render. Or `steps` say what runs.
    """
    counts = item_counts(scheme.timetable, steps or all_steps(scheme.timetable), film.branches)
    return ran * sum(count * _run_flops(film, scheme, item, density) for item, count in counts.items())


def _run_flops(film: Film, scheme: Scheme, item: Item, density: float) -> float:
    """Of one run of the model for one branch of guidance."""
    dit, per_frame = film.dit, film.tokens_per_frame
    tokens = item.running * per_frame
    pairs = tokens * (item.window + item.context) * per_frame
    if scheme.clips is not None:
        clips = range(scheme.clips.num_clips)
        seen = ((scheme.clips.own(c), scheme.clips.window(c), scheme.clips.globals(c)) for c in clips)
        pairs = sum(len(own) * (len(window) + len(far)) for own, window, far in seen) * per_frame**2
    layer = linear_flops(dit, tokens, film.text_tokens) + density * attention_flops(dit.width, pairs, 1)
    # all tokens are embedded, for where they lie; those of the blocks that ran are projected
    ends = end_flops(dit, item.window * per_frame, first_channels(dit))
    ends += end_flops(dit, item.own * per_frame, out_channels(dit))
    return (dit.num_layers - len(item.part.left_out)) * layer + ends
