"""Compiles every Triton kernel for a GPU that need not be there: `python compile_kernels.py CAPABILITY`.

Prints a line per kernel: its name, the bytes of shared memory it needs, its instructions for tensor cores.
Stands in for a device up to the launch, so that what is compiled is what the engine's own calls ask for.
"""

import sys
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import CudaDriver
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from vidgen.kernels import triton_device
from vidgen.kernels.attention import triton_forward, triton_mass
from vidgen.kernels.attention.layout import BlockLayout, from_block_mask, from_rule
from vidgen.kernels.attention.triton_tiles import Tile
from vidgen.kernels.modulate import triton_modulate
from vidgen.kernels.rope import triton_rope

SIZES: dict[str, Any] = {"num_queries": 100, "num_keys": 200, "query_block": 64, "key_block": 64}


class AbsentDevice(CudaDriver):
    """A CUDA device of a compute capability, as far as compiling needs one."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_instead_of_launching() -> None:
    launch = JITFunction.run

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel: Any = launch(self, *args, grid=grid, warmup=True, **kwargs)
        multiplied = sum(kernel.asm["ptx"].count(name) for name in ("wgmma.mma_async", "mma.sync"))
        print(self.__name__, kernel.metadata.shared, multiplied)
        return kernel

    JITFunction.run = run
    triton_device.INTERPRETED = True  # lets tensors of the CPU pass


def layouts() -> list[BlockLayout | None]:
    seen = torch.ones(1, 2, 2, 4, dtype=torch.bool)
    more: dict[str, Any] = {
        "key_lengths_BHC": torch.ones(1, 1, 4, dtype=torch.int32),
        "key_log_weights_BHC": torch.ones(2, 1, 4),
    }
    partial = from_rule(lambda query, key: (query - key).abs() < 40, **SIZES).partial
    return [None, from_block_mask(seen, **SIZES), from_block_mask(seen, **SIZES, partial=partial, **more)]


def main(capability: int) -> None:
    driver.set_active(AbsentDevice(capability))
    compile_instead_of_launching()
    tile = Tile(queries=64, keys=64, num_stages=3)
    for head_dim in (64, 96):
        query, key = (torch.zeros(2, n, 2, head_dim, dtype=torch.bfloat16) for n in (100, 200))
        for layout in layouts():
            triton_forward.run(query, key, key, layout, 1.0, True, tile)
    single = torch.zeros(1, 1, 1, 64)
    triton_forward.run(single, single, single, None, 1.0, False, Tile(queries=16, keys=16))
    triton_mass.block_mass(query, key, torch.zeros(2, 2, 100), query_block=64, key_block=64)
    x, per_frame = torch.zeros(2, 3, 5, 1536, dtype=torch.bfloat16), torch.zeros(1, 3, 1, 1536)
    triton_modulate.norm_modulate(x, per_frame, per_frame, 1e-6)
    triton_modulate.gate_residual_norm_modulate(x, x, per_frame, per_frame, per_frame, 1e-6)
    flat, angles = x.flatten(1, 2), torch.zeros(15, 1, 128)
    for keep_normed in (True, False):
        triton_rope.norm_rope(flat, torch.ones(1536), angles, angles, 12, 1e-6, keep_normed)


if __name__ == "__main__":
    main(int(sys.argv[1]))
