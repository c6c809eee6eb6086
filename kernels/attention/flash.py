"""flash-attn, the newest of its versions that is installed and that this GPU runs: dense, and 1-D windows."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from vidgen.kernels.attention.backends import Run
from vidgen.kernels.attention.convert import NO_LIMIT, need_window_1d
from vidgen.kernels.attention.layout import BlockLayout

# B batch, Q queries, K keys, H heads, D head dimension


@dataclass(frozen=True, kw_only=True, slots=True)
class Version:
    """How one of them is called."""

    name: str
    module: str
    capabilities: tuple[int, ...]  # major ones of the GPUs that it has kernels for
    no_limit: int | None  # of a window's side
    lse_argument: str


VERSIONS = (
    Version(
        name="flash-attn 4",
        module="flash_attn.cute",
        capabilities=(9, 10, 11),
        no_limit=None,
        lse_argument="return_lse",
    ),
    Version(
        name="flash-attn 3",
        module="flash_attn_interface",
        capabilities=(9,),
        no_limit=NO_LIMIT,
        lse_argument="return_attn_probs",
    ),
    Version(
        name="flash-attn 2",
        module="flash_attn",
        capabilities=(8, 9, 10, 11, 12),
        no_limit=NO_LIMIT,
        lse_argument="return_attn_probs",
    ),
)


def load() -> Run:
    """The newest version, ImportError with the reasons why there is none."""
    capability = torch.cuda.get_device_capability()[0] if torch.cuda.is_available() else None
    reasons = []
    for version in VERSIONS:
        if capability is not None and capability not in version.capabilities:
            reasons.append(f"{version.name}: not for GPUs of capability {capability}")
            continue
        try:
            function = import_module(version.module).flash_attn_func
        except (ImportError, OSError, RuntimeError, AttributeError) as error:  # as broken builds fail
            reasons.append((version.name + ": " + str(error)).partition("\n")[0])
            continue
        return _run_of(version, function)
    raise ImportError("; ".join(reasons))


def _run_of(version: Version, function: Callable[..., Any]) -> Run:
    def run(
        query_BQHD: Tensor,
        key_BKHD: Tensor,
        value_BKHD: Tensor,
        layout: BlockLayout | None,
        scale: float,
        lse: bool,
    ) -> tuple[Tensor, Tensor | None]:
        window = need_window_1d(layout, "flash")
        result = function(
            query_BQHD,
            key_BKHD,
            value_BKHD,
            softmax_scale=scale,
            window_size=tuple(version.no_limit if side == NO_LIMIT else side for side in window),
            **({version.lse_argument: True} if lse else {}),
        )
        out, lse_BHQ = result[:2] if isinstance(result, tuple) else (result, None)  # 4 always gives both
        if not lse:
            return out, None
        assert lse_BHQ is not None
        if layout is not None:  # queries that see no key have +inf there
            lse_BHQ = lse_BHQ.masked_fill(lse_BHQ == math.inf, -math.inf)
        return out, lse_BHQ

    return run
