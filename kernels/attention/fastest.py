"""The backend that is fastest at a kind of request: measured once, and remembered while the process lives."""

import logging
import time
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from vidgen.kernels.attention.backends import BACKENDS, BY_NAME_ONLY, Need, Request, Run, able
from vidgen.kernels.attention.layout import BlockLayout

# B batch, Q queries, K keys, H heads, D head dimension

READINGS = 3
DENSITY_STEPS = 16  # layouts of about the same density share a choice
Choice = tuple[str, bool]  # a backend, and whether it runs dense although there is a layout

logger = logging.getLogger(__name__)
_chosen: dict[tuple[object, ...], Choice] = {}


def fastest(
    request: Request, query_BQHD: Tensor, key_BKHD: Tensor, value_BKHD: Tensor, layout: BlockLayout | None,
    scale: float,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """What the fastest able backend gives; dense attention races too where a layout may see more."""
    key = _kind(request, query_BQHD, key_BKHD, layout)
    tensors, lse = (query_BQHD, key_BKHD, value_BKHD), Need.LSE in request.needs
    if key not in _chosen:
        racers = _racers(request, layout)
        if not racers:
            raise ValueError(f"no attention backend can do this: {request}")
        runs = {
            choice: partial(_load(choice), *tensors, None if choice[1] else layout, scale, lse)
            for choice in racers
        }
        _chosen[key] = _race(runs, query_BQHD.device)
        logger.info("attention %s: %s is fastest", key, _chosen[key])
    choice = _chosen[key]
    return _load(choice)(*tensors, None if choice[1] else layout, scale, lse)


def chosen() -> dict[tuple[object, ...], Choice]:
    """What has been measured so far."""
    return dict(_chosen)


def forget() -> None:
    """Measure anew from here on."""
    _chosen.clear()


def _kind(request: Request, query: Tensor, key: Tensor, layout: BlockLayout | None) -> tuple[object, ...]:
    density = None if layout is None else round(layout.work * DENSITY_STEPS)
    return (request, tuple(query.shape), key.shape[1], density, layout is not None and layout.may_see_more)


def _racers(request: Request, layout: BlockLayout | None) -> list[Choice]:
    racers = [(backend.name, False) for backend in able(request) if backend.name not in BY_NAME_ONLY]
    if layout is not None and layout.may_see_more:
        lse_only = request.needs & {Need.LSE}
        dense = Request(
            device=request.device, dtype=request.dtype, head_dim=request.head_dim, needs=frozenset(lse_only)
        )
        racers += [(b.name, True) for b in able(dense) if b.name not in BY_NAME_ONLY]
    return racers


def _load(choice: Choice) -> Run:
    return BACKENDS[choice[0]].load()


def _race(runs: Mapping[Choice, Callable[[], object]], device: torch.device) -> Choice:
    """The run of least time, readings taking turns; one that fails is out of the race, and said to be."""
    times: dict[Choice, list[float]] = {choice: [] for choice in runs}
    for _ in range(READINGS + 1):
        for choice in list(times):
            try:
                times[choice].append(_seconds(runs[choice], device))
            except (ValueError, RuntimeError) as error:
                logger.warning("attention backend %s is out: %s", choice[0], str(error).splitlines()[0])
                del times[choice]
    if not times:
        raise ValueError(f"none of {', '.join(name for name, _ in runs)} could do this; see the log")
    return min(times, key=lambda choice: min(times[choice][1:]))  # the first compiles, or fills caches


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started
