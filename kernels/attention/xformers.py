"""Memory-efficient attention of xformers, or of mslk, where its kernels have gone: dense, and 1-D windows."""

from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from vidgen.kernels.attention.backends import Run
from vidgen.kernels.attention.convert import NO_LIMIT, need_window_1d
from vidgen.kernels.attention.layout import BlockLayout

# B batch, Q queries, K keys, H heads, D head dimension

MODULES = ("xformers.ops.fmha", "mslk.attention.fmha")
NEEDED = ("memory_efficient_attention", "memory_efficient_attention_forward_requires_grad")


def load() -> Run:
    """What either package gives, ImportError with the reasons why neither does."""
    fmha, bias = _fmha()

    def run(
        query_BQHD: Tensor,
        key_BKHD: Tensor,
        value_BKHD: Tensor,
        layout: BlockLayout | None,
        scale: float,
        lse: bool,
    ) -> tuple[Tensor, Tensor | None]:
        tensors = query_BQHD, key_BKHD, value_BKHD
        left, right = need_window_1d(layout, "xformers")
        options: dict[str, Any] = {"scale": scale}
        if (left, right) != (NO_LIMIT, NO_LIMIT):
            if query_BQHD.dtype == torch.float32:
                raise ValueError(
                    "backend=xformers: does windows in float16 and bfloat16; take backend triton"
                )
            far = query_BQHD.shape[1] + key_BKHD.shape[1]
            options["attn_bias"] = bias(
                window_left=far if left == NO_LIMIT else left,
                window_right=far if right == NO_LIMIT else right,
            )
        if not lse:
            return fmha.memory_efficient_attention(*tensors, **options), None
        out, lse_BHQ = fmha.memory_efficient_attention_forward_requires_grad(*tensors, **options)
        return out, lse_BHQ[..., : query_BQHD.shape[1]]  # some of its kernels pad it to a multiple of 32

    return run


def _fmha() -> tuple[Any, Any]:
    """(The module of the functions, the class of windows) of the first package that has both."""
    reasons = []
    for name in MODULES:
        try:
            module = import_module(name)
            missing = [function for function in NEEDED if not hasattr(module, function)]
            if missing:
                reasons.append(f"{name} has no {', '.join(missing)}")
                continue
            return module, import_module(f"{name}.attn_bias").LocalAttentionFromBottomRightMask
        except (ImportError, OSError, RuntimeError, AttributeError) as error:  # as broken builds fail
            reasons.append((name + ": " + str(error)).partition("\n")[0])
    raise ImportError("; ".join(reasons))
