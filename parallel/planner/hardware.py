"""What a machine can do: rates that the planner's cost model needs, read from a profile.

A profile is a YAML file. Those in parallel/planner/profiles come from public specifications;
`vidgen bench calibrate` writes one from measurements of the machine at hand.
"""

import math
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

PROFILES = Path(__file__).parent / "profiles"


@dataclass(frozen=True, slots=True)
class Rate:
    """Seconds that work of some sizes takes; sizes and seconds both grow."""

    sizes: tuple[float, ...]
    seconds: tuple[float, ...]

    def __post_init__(self) -> None:
        for values in (self.sizes, self.seconds):
            is_rising = all(low < high for low, high in zip(values, values[1:], strict=False))
            if not values or values[0] <= 0 or not is_rising or not math.isfinite(values[-1]):
                raise ValueError("need numbers above 0, each larger than the one before")
        if len(self.sizes) != len(self.seconds):
            raise ValueError(f"{len(self.sizes)} sizes and {len(self.seconds)} times: need as many")

    def seconds_of(self, size: float) -> float:
        """Straight lines between the points; before the first one its time, after the last at its rate."""
        if size <= 0:
            return 0.0
        if size <= self.sizes[0]:
            return self.seconds[0]
        above = bisect_right(self.sizes, size)
        if above == len(self.sizes):
            return self.seconds[-1] * size / self.sizes[-1]
        low, high = above - 1, above
        share = (size - self.sizes[low]) / (self.sizes[high] - self.sizes[low])
        return self.seconds[low] + share * (self.seconds[high] - self.seconds[low])


@dataclass(frozen=True, slots=True)
class LinkRate:
    """What a message between two ranks takes."""

    latency_s: float
    bytes_per_s: float

    def __post_init__(self) -> None:
        for name in ("latency_s", "bytes_per_s"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0 and (value or name == "latency_s")):
                raise ValueError(f"{name}={value}: need a number above 0")

    def seconds_of(self, num_bytes: float) -> float:
        """Of a message of so many bytes; none at all takes no time."""
        return self.latency_s + num_bytes / self.bytes_per_s if num_bytes else 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Hardware:
    """A machine, or many of one kind. Work is in FLOPs of matrix products, or in pixels of video."""

    name: str
    source: str  # where the figures come from
    measured: bool
    memory_bytes: int  # of a rank; of all ranks of a node where they share it
    shares_memory: bool
    ranks_per_node: int
    process_bytes: int  # what a rank holds beside its part of the model and the video
    layers: Mapping[str, Rate]  # by dtype: a layer without its self-attention
    attention: Mapping[str, Rate]  # by dtype
    joining: Rate  # of a layer, where it reads keys and values of other blocks: numbers of all its keys
    ends: Rate  # embedding or projection: FLOPs
    solver: Rate  # making a forward's window and taking its step: elements of its latents
    item_s: float  # of a rank's time for a forward, whatever its size: messages, books
    link: LinkRate  # from stage to stage of a node
    exchange: LinkRate  # between ranks of a node that wait for each other
    between_nodes: LinkRate  # both, across nodes
    decode: Rate  # pixels of a block, where ranks have a decoder of their own
    decode_alone: Rate  # the same in a render of one process
    write: Rate  # pixels of a block: encoding and committing it
    busy: tuple[tuple[float, float], ...] = ()  # (ranks at work, how much slower each is): shared cores

    def layer_rate(self, dtype: str) -> Rate:
        """ValueError for a dtype that the profile has no rate for."""
        return _of_dtype(self.layers, dtype, self.name)

    def attention_rate(self, dtype: str) -> Rate:
        """ValueError for a dtype that the profile has no rate for."""
        return _of_dtype(self.attention, dtype, self.name)

    def slowdown(self, num_busy: float) -> float:
        """How much slower a rank is while so many are at work."""
        if not self.busy or num_busy <= self.busy[0][0]:
            return 1.0
        counts, factors = zip(*self.busy, strict=True)
        above = bisect_right(counts, num_busy)
        if above == len(counts):
            return factors[-1] * num_busy / counts[-1]
        share = (num_busy - counts[above - 1]) / (counts[above] - counts[above - 1])
        return factors[above - 1] + share * (factors[above] - factors[above - 1])

    def collective(self, num_ranks: int) -> LinkRate:
        """Between ranks that may lie on several nodes."""
        return self.exchange if num_ranks <= self.ranks_per_node else self.between_nodes

    def hop(self, num_ranks: int) -> LinkRate:
        """From stage to stage, of a render on so many ranks: the slowest sets the pace."""
        return self.link if num_ranks <= self.ranks_per_node else self.between_nodes


def profile_names() -> list[str]:
    """Profiles that come with the package."""
    return sorted(path.stem for path in PROFILES.glob("*.yaml"))


def profile_of(device: str) -> str:
    """The name of the profile for a device of this machine. ValueError for a GPU that there is none for."""
    if device == "cpu":
        return "cpu"
    import torch

    gpu = torch.cuda.get_device_name().lower()
    known = next((name for name in profile_names() if name in gpu), None)
    if known is None:
        raise ValueError(
            f"hardware: no profile for {gpu}; measure one with `vidgen bench calibrate -o FILE`, give FILE"
        )
    return known


def load_hardware(name: str) -> Hardware:
    """The profile of that name, or in that file. ValueError in one line for neither, or a broken one."""
    import yaml

    path = PROFILES / f"{name}.yaml" if name in profile_names() else Path(name)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(
            f"hardware={name}: no such profile or file; take {', '.join(profile_names())}, or a file made by "
            "`vidgen bench calibrate -o FILE`"
        ) from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"hardware={name}: not a YAML file; make one: vidgen bench calibrate") from error
    return parse_hardware(values, str(name))


def parse_hardware(values: Any, source: str) -> Hardware:
    """A profile from plain data. ValueError in one line that names the key, what was given and why not.

    A rate is {overhead_s, per_s}, or a list of [size, seconds]; by dtype where rates differ by it.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"hardware={source}: need a mapping of rates; make one: vidgen bench calibrate")
    needed = {field.name: field for field in fields(Hardware)}
    for key in values:
        if key not in needed:
            raise ValueError(f"hardware={source}: unknown key {key}; known: {', '.join(needed)}")
    missing = sorted(needed.keys() - values.keys() - {"busy"})
    if missing:
        raise ValueError(
            f"hardware={source}: {missing[0]} is missing; make a profile: vidgen bench calibrate"
        )
    read: dict[str, Any] = {}
    for key, value in values.items():
        try:
            read[key] = _READERS[key](value)
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise ValueError(f"hardware={source}: {key}={_short(value)}: {error}") from error
    return Hardware(**read)


def dump_hardware(hardware: Hardware) -> dict[str, Any]:
    """Plain data that `parse_hardware` takes."""

    def plain(value: Any) -> Any:
        if isinstance(value, Rate):
            return [[float(x), float(y)] for x, y in zip(value.sizes, value.seconds, strict=True)]
        if isinstance(value, LinkRate):
            return {"latency_s": value.latency_s, "bytes_per_s": value.bytes_per_s}
        if isinstance(value, Mapping):
            return {key: plain(inner) for key, inner in value.items()}
        return [list(pair) for pair in value] if isinstance(value, tuple) else value

    return {field.name: plain(getattr(hardware, field.name)) for field in fields(hardware)}


LARGE = 1e18  # FLOPs or pixels; past any piece of work


def _rate(value: Any) -> Rate:
    if isinstance(value, Mapping):
        overhead, per_s = _number(value["overhead_s"]), _number(value["per_s"], above=0)
        least = max(overhead * per_s, 1.0) / 1000  # below it only the overhead counts
        sizes = (least, LARGE)
        return Rate(sizes, tuple(overhead + size / per_s for size in sizes))
    pairs = [(_number(size), _number(seconds)) for size, seconds in value]
    return Rate(tuple(size for size, _ in pairs), tuple(seconds for _, seconds in pairs))


def _link(value: Any) -> LinkRate:
    return LinkRate(_number(value["latency_s"]), _number(value["bytes_per_s"], above=0))


def _by_dtype(value: Any) -> dict[str, Rate]:
    return {str(dtype): _rate(rate) for dtype, rate in value.items()}


def _busy(value: Any) -> tuple[tuple[float, float], ...]:
    pairs = tuple((_number(count, above=0), _number(factor, above=0)) for count, factor in value)
    if any(low[0] >= high[0] or low[1] > high[1] for low, high in zip(pairs, pairs[1:], strict=False)):
        raise ValueError("need rising numbers of ranks, and factors that do not fall")
    return pairs


def _number(value: Any, above: float | None = None) -> float:
    """A finite number that is not negative. YAML reads 1e9 as text, so text is taken."""
    number = float(value)
    if isinstance(value, bool) or not math.isfinite(number) or number < 0 or number == above:
        raise ValueError(f"{value!r} is not a number {'above' if above == 0 else 'from'} 0")
    return number


def _count(value: Any) -> int:
    number = _number(value, above=0)
    if number != int(number):
        raise ValueError("need a whole number")
    return int(number)


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("need true or false")
    return value


def _of_dtype(rates: Mapping[str, Rate], dtype: str, name: str) -> Rate:
    if dtype not in rates:
        raise ValueError(f"hardware={name}: has no rates of dtype={dtype}; it has {', '.join(rates)}")
    return rates[dtype]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


_READERS: dict[str, Any] = {
    "name": str,
    "source": str,
    "measured": _flag,
    "memory_bytes": _count,
    "shares_memory": _flag,
    "ranks_per_node": _count,
    "process_bytes": lambda value: int(_number(value)),
    "layers": _by_dtype,
    "attention": _by_dtype,
    "joining": _rate,
    "ends": _rate,
    "solver": _rate,
    "item_s": _number,
    "link": _link,
    "exchange": _link,
    "between_nodes": _link,
    "decode": _rate,
    "decode_alone": _rate,
    "write": _rate,
    "busy": _busy,
}
