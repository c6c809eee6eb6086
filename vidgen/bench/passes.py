"""The middle of several profiles of one machine: it has slow minutes, and quick ones."""

import statistics
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

from vidgen.bench.output_rates import rate
from vidgen.parallel.planner.hardware import Hardware, LinkRate, Rate


def middle(profiles: Sequence[Hardware]) -> Hardware:
    """Every figure the median of the profiles', at the sizes that all have; the rest is the first one's."""
    names = [field.name for field in fields(Hardware)]
    found = {name: _middle([getattr(profile, name) for profile in profiles]) for name in names}
    return replace(profiles[0], **found)


def _middle(values: Sequence[Any]) -> Any:
    first = values[0]
    if isinstance(first, Rate):
        sizes = [size for size in first.sizes if all(size in value.sizes for value in values)]
        return rate([(size, statistics.median(value.seconds_of(size) for value in values)) for size in sizes])
    if isinstance(first, LinkRate):
        return LinkRate(*(statistics.median(getattr(v, name) for v in values) for name in first.__slots__))
    if isinstance(first, dict):
        return {key: _middle([value[key] for value in values]) for key in first}
    if isinstance(first, tuple):
        return tuple(
            (count, statistics.median(v[i][1] for v in values)) for i, (count, _) in enumerate(first)
        )
    return statistics.median(values) if isinstance(first, float) else first
