"""FlexAttention of PyTorch, compiled: one compilation (5 to 20 s) per shape, whatever the layout."""

import shutil
import warnings
from functools import lru_cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from vidgen.kernels.attention.backends import Run
from vidgen.kernels.attention.convert import to_block_mask
from vidgen.kernels.attention.layout import BlockLayout
from vidgen.kernels.attention.windows import dense

# B batch, Q queries, K keys, H heads, D head dimension

MAX_SHAPES = 256  # dynamo stops at 8 compilations of a function unless told otherwise
SMALLEST_TILE, USUAL_TILE = 16, 128  # of Triton's kernel, which must divide a layout's blocks


def load() -> Run:
    """FlexAttention, ImportError where nothing can compile it."""
    if torch.cuda.is_available():
        import triton  # noqa: F401  # pyright: ignore[reportUnusedImport]
    else:
        if not torch.backends.cpu.get_cpu_capability().startswith("AVX"):
            raise ImportError("FlexAttention for CPUs needs AVX2 or AVX-512")
        if not any(shutil.which(compiler) for compiler in ("g++", "clang++", "c++")):
            raise ImportError("FlexAttention for CPUs needs a C++ compiler: install g++")
    return _run


def _run(
    query_BQHD: Tensor,
    key_BKHD: Tensor,
    value_BKHD: Tensor,
    layout: BlockLayout | None,
    scale: float,
    lse: bool,
) -> tuple[Tensor, Tensor | None]:
    on_cpu = query_BQHD.device.type == "cpu"
    if on_cpu and lse:
        raise ValueError("backend=flex: returns no log-sum-exp on CPUs; take backend cpu")
    if on_cpu and layout is None:
        # without a mask the CPU kernel takes all keys as one block, and holds all logits at once
        layout = dense(query_BQHD.shape[1], key_BKHD.shape[1])
    if not on_cpu and query_BQHD.shape[-1] < SMALLEST_TILE:
        raise ValueError(
            f"backend=flex: heads of {query_BQHD.shape[-1]} channels: needs {SMALLEST_TILE} on a GPU; take "
            "backend triton"
        )
    options: dict[str, Any] = {"scale": scale}
    if layout is not None:
        options["block_mask"] = _block_mask(layout, query_BQHD.device)
        if not on_cpu:
            options["kernel_options"] = _kernel_tiles(layout)
    if lse:
        options["return_aux"] = AuxRequest(lse=True)
    # detached: on CPUs it refuses tensors with gradients even where none are asked for
    tensors = (tensor.detach().transpose(1, 2) for tensor in (query_BQHD, key_BKHD, value_BKHD))
    with torch._dynamo.config.patch(recompile_limit=MAX_SHAPES):
        result = _compiled()(*tensors, **options)
    if not lse:
        return result.transpose(1, 2), None
    out, aux = result
    return out.transpose(1, 2), aux.lse


@lru_cache
def _compiled() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # it uses what torch 2.13 has deprecated
        import_module("torch._inductor.compile_fx")
    # fullgraph: otherwise, past the limit, it runs uncompiled, with all logits in memory
    return torch.compile(flex_attention, dynamic=False, fullgraph=True)


def _block_mask(layout: BlockLayout, device: torch.device) -> BlockMask:
    key = ("flex", device)
    if key not in layout.prepared:
        layout.prepared[key] = to_block_mask(layout, device, backward=False)
    return layout.prepared[key]


def _kernel_tiles(layout: BlockLayout) -> dict[str, int]:
    """Triton's tiles, for blocks that its usual ones do not divide."""
    if layout.query_block % USUAL_TILE == 0 and layout.key_block % USUAL_TILE == 0:
        return {}
    tiles = {}
    for name, block, largest in (("BLOCK_M", layout.query_block, 128), ("BLOCK_N", layout.key_block, 64)):
        tiles[name] = min(block & -block, largest)  # the largest power of two that divides the block
        if tiles[name] < SMALLEST_TILE:
            raise ValueError(
                f"backend=flex: blocks of {layout.query_block} queries and {layout.key_block} keys: needs "
                f"multiples of {SMALLEST_TILE} on a GPU; take backend triton, or other blocks"
            )
    return tiles
