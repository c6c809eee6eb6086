"""The kernels there are, what each can do, and which one a request gets.

A backend that cannot do what is asked is an error that names what can: nothing is ignored, and none is taken
in place of another. Packages are looked for when they are first asked for.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from importlib import import_module

import torch
from torch import Tensor

from vidgen.kernels.attention.layout import BlockLayout

# B batch, Q queries, K keys, H heads, D head dimension

Run = Callable[[Tensor, Tensor, Tensor, BlockLayout | None, float, bool], tuple[Tensor, Tensor | None]]
HALF_AND_SINGLE = frozenset({torch.float32, torch.float16, torch.bfloat16})


class Need(StrEnum):
    """What a request may need beyond dense attention."""

    BLOCKS = "block layouts"
    PARTIAL = "partial blocks"
    PER_HEAD = "a layout per head"
    LENGTHS = "key lengths per block"
    WEIGHTS = "log-weights per key block"
    WINDOW_1D = "one-dimensional windows"  # instead of BLOCKS: layouts that are one
    LSE = "log-sum-exps"
    GRADIENTS = "gradients"


EVERY_LAYOUT = frozenset({Need.BLOCKS, Need.PARTIAL, Need.PER_HEAD, Need.LENGTHS, Need.WEIGHTS})


@dataclass(frozen=True, kw_only=True, slots=True)
class Backend:
    """A kernel. `load` gives its `Run`, or raises ImportError with the reason why it is not there."""

    name: str
    does: frozenset[Need]
    devices: frozenset[str]
    dtypes: frozenset[torch.dtype]
    load: Callable[[], Run]
    does_not_on_cpu: frozenset[Need] = frozenset()
    max_head_dim: int = 1 << 16
    head_dim_multiple: int = 1
    block_multiple: int = 1  # of a layout's query and key blocks


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """What decides whether a backend can do it."""

    device: str
    dtype: torch.dtype
    head_dim: int
    needs: frozenset[Need]
    blocks: tuple[int, int] = (1, 1)

    @classmethod
    def of(
        cls, query: Tensor, layout: BlockLayout | None, return_lse: bool, needs_gradient: bool = False
    ) -> "Request":
        """Of tensors [B, Q, H, D]."""
        needs = ({Need.LSE} if return_lse else set()) | ({Need.GRADIENTS} if needs_gradient else set())
        if layout is not None:
            needs |= needs_of(layout)
        return cls(
            device=query.device.type,
            dtype=query.dtype,
            head_dim=query.shape[-1],
            needs=frozenset(needs),
            blocks=(1, 1) if layout is None else (layout.query_block, layout.key_block),
        )


def needs_of(layout: BlockLayout) -> frozenset[Need]:
    """What a layout needs of a backend."""
    needs = {Need.BLOCKS}
    lists = [layout.full] if layout.partial is None else [layout.full, layout.partial.lists]
    if any(part.counts_BHR.shape[:2] != (1, 1) for part in lists):
        needs.add(Need.PER_HEAD)
    if layout.partial is not None:
        needs.add(Need.PARTIAL)
    if layout.key_lengths_BHC is not None:
        needs.add(Need.LENGTHS)
    if layout.key_log_weights_BHC is not None:
        needs.add(Need.WEIGHTS)
    return frozenset(needs)


def why_not(backend: Backend, request: Request) -> str | None:
    """Why a backend cannot do a request; None when it can."""
    if request.device not in backend.devices:
        return f"runs on {', '.join(sorted(backend.devices))}, not on {request.device}"
    if request.dtype not in backend.dtypes:
        return f"does not do {str(request.dtype).removeprefix('torch.')}"
    if request.head_dim > backend.max_head_dim or request.head_dim % backend.head_dim_multiple:
        return (
            f"head dimension {request.head_dim}: does multiples of {backend.head_dim_multiple} up to "
            f"{backend.max_head_dim}"
        )
    lacking = backend.does_not_on_cpu if request.device == "cpu" else frozenset()
    missing = request.needs - (backend.does - lacking)
    if Need.WINDOW_1D in backend.does:  # whether a layout is such a window is for the kernel to see
        missing -= {Need.BLOCKS, Need.PARTIAL}
    if missing:
        return f"does not do {', '.join(sorted(missing))}"
    if Need.BLOCKS in request.needs and any(block % backend.block_multiple for block in request.blocks):
        return f"does blocks that are multiples of {backend.block_multiple}, not {request.blocks}"
    return absent(backend.name)


@lru_cache
def absent(name: str) -> str | None:
    """Why a backend is not on this machine; None when it is."""
    try:
        BACKENDS[name].load()
    except (ImportError, OSError, RuntimeError, AttributeError) as error:  # as broken builds fail
        return f"is not there: {error}".splitlines()[0]
    return None


def able(request: Request) -> list[Backend]:
    """The backends that can do a request, those first that are preferred."""
    return [backend for backend in BACKENDS.values() if why_not(backend, request) is None]


def _in(module: str, name: str) -> Callable[[], Run]:
    """A Run in a module of this folder, imported when it is asked for."""

    def load() -> Run:
        return getattr(import_module(f"vidgen.kernels.attention.{module}"), name)

    return load


def _loaded_by(module: str, name: str) -> Callable[[], Run]:
    """A Run that a function in a module of this folder returns, once it has found the package."""

    def load() -> Run:
        return getattr(import_module(f"vidgen.kernels.attention.{module}"), name)()

    return load


CUDA = frozenset({"cuda"})
CPU = frozenset({"cpu"})
HALF = frozenset({torch.float16, torch.bfloat16})

# In the order of preference where nothing is measured. `reference` and `masked` are taken by name only.
BACKENDS: dict[str, Backend] = {
    backend.name: backend
    for backend in (
        Backend(
            name="native",
            does=frozenset({Need.LSE, Need.GRADIENTS}),
            devices=CPU | CUDA,
            dtypes=HALF_AND_SINGLE | {torch.float64},
            load=_in("native", "run"),
        ),
        Backend(
            name="triton",
            does=EVERY_LAYOUT | {Need.LSE},
            devices=CUDA,
            dtypes=HALF_AND_SINGLE,
            load=_loaded_by("triton_forward", "load"),
            max_head_dim=256,
            block_multiple=16,
        ),
        Backend(
            name="cpu",
            does=EVERY_LAYOUT | {Need.LSE, Need.GRADIENTS},
            devices=CPU,
            dtypes=HALF_AND_SINGLE,
            load=_in("cpu", "run"),
        ),
        Backend(
            name="flex",
            does=EVERY_LAYOUT - {Need.WEIGHTS} | {Need.LSE},
            devices=CPU | CUDA,
            dtypes=HALF_AND_SINGLE,
            load=_loaded_by("flex", "load"),
            does_not_on_cpu=frozenset({Need.LSE}),  # torch 2.13
        ),
        Backend(
            name="flash",
            does=frozenset({Need.WINDOW_1D, Need.LSE}),
            devices=CUDA,
            dtypes=HALF,
            load=_loaded_by("flash", "load"),
            max_head_dim=256,
            head_dim_multiple=8,
        ),
        Backend(
            name="xformers",
            does=frozenset({Need.WINDOW_1D, Need.LSE}),
            devices=CUDA,
            dtypes=HALF_AND_SINGLE,
            load=_loaded_by("xformers", "load"),
            max_head_dim=256,
            head_dim_multiple=8,
        ),
        Backend(
            name="sage",
            does=frozenset(),
            devices=CUDA,
            dtypes=HALF,
            load=_loaded_by("sage", "load"),
            max_head_dim=128,
            head_dim_multiple=8,
        ),
        Backend(
            name="reference",
            does=EVERY_LAYOUT | {Need.LSE, Need.GRADIENTS},
            devices=CPU | CUDA,
            dtypes=HALF_AND_SINGLE | {torch.float64},
            load=_in("reference", "run"),
        ),
    )
}
BY_NAME_ONLY = frozenset({"reference", "sage"})  # slow; lossy
