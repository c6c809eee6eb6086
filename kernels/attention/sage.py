"""SageAttention: dense, with logits from int8. Lossy, so taken by name only."""

from importlib import import_module

from torch import Tensor

from vidgen.kernels.attention.backends import Run
from vidgen.kernels.attention.layout import BlockLayout

# B batch, Q queries, K keys, H heads, D head dimension


def load() -> Run:
    """Its choice of kernel for this GPU, ImportError where it is not installed."""
    sageattn = import_module("sageattention").sageattn

    def run(
        query_BQHD: Tensor,
        key_BKHD: Tensor,
        value_BKHD: Tensor,
        layout: BlockLayout | None,
        scale: float,
        lse: bool,
    ) -> tuple[Tensor, Tensor | None]:
        if layout is not None or lse:
            raise ValueError(
                "backend=sage: does dense attention without log-sum-exps; take backend triton for the rest"
            )
        tensors = query_BQHD, key_BKHD, value_BKHD
        return sageattn(*tensors, tensor_layout="NHD", is_causal=False, sm_scale=scale), None

    return run
