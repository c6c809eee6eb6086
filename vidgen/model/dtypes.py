"""In which numbers a model's weights are stored and its tokens computed."""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from vidgen.model.layers import ImageProjection

# O output channels, I input channels

DType = Literal["fp32", "bf16", "fp16", "fp8"]
# of tokens, and of weights but for fp8, which is a way to store them
DTYPES: dict[DType, torch.dtype] = {
    "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.bfloat16,
}  # fmt: skip
FP8 = torch.float8_e4m3fn
FP8_SCALE = ".scale"  # ends the name of what goes with a weight in FP8
QUANTISED_ROWS = 128  # at a time


class Fp8Linear(nn.Module):
    """A Linear whose weight is stored in FP8, with a scale for each output channel; it computes in x's dtype.

    Not torchao's weight-only FP8, which is as exact and slower, and cannot be given memory after it was made
    on the meta device (torchao 0.18, torch 2.13, 2 CPU cores).
    """

    scale: Tensor

    def __init__(self, like: nn.Linear) -> None:
        super().__init__()
        weight, scale = quantise(like.weight.detach())
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_buffer("scale", scale)
        self.bias = nn.Parameter(like.bias.detach().to(DTYPES["fp8"]), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight.to(x.dtype) * self.scale.to(x.dtype).unsqueeze(1), self.bias)


def quantise(weight_OI: Tensor) -> tuple[Tensor, Tensor]:
    """(the weight in FP8, the fp32 scales [O] that its rows are to be multiplied with).

    A row's largest value becomes FP8's largest. Scales have bf16's digits, so they are not rounded again.
    """
    stored_OI = torch.empty_like(weight_OI, dtype=FP8)
    scale_O = torch.empty(weight_OI.shape[0], dtype=torch.float32, device=weight_OI.device)
    quantise_into(weight_OI, stored_OI, scale_O)
    return stored_OI, scale_O


def quantise_into(weight_OI: Tensor, stored_OI: Tensor, scale_O: Tensor) -> None:
    """`quantise` into memory that is there, a few rows at a time so that little more is needed."""
    largest = torch.finfo(FP8).max
    for start in range(0, weight_OI.shape[0], QUANTISED_ROWS):
        part = slice(start, start + QUANTISED_ROWS)
        rows = weight_OI[part].float()
        scales = (rows.abs().amax(dim=1) / largest).clamp(min=1e-30).bfloat16().float()
        stored_OI[part] = (rows / scales.unsqueeze(1)).clamp_(-largest, largest).to(FP8)
        scale_O[part] = scales


@torch.no_grad()
def cast(model: nn.Module, dtype: DType) -> None:
    """Have a DiT's weights in a dtype: all but norms, modulation tables, noise levels and statistics.

    These stay in fp32, as in diffusers. For fp8, the layers' Linears are stored in it and the rest is bf16.
    """
    for name, module in list(model.named_modules()):
        if name.startswith("noise_level"):
            continue
        if dtype == "fp8" and name.startswith("layers.") and isinstance(module, nn.Linear):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, Fp8Linear(module))
        elif isinstance(module, nn.Linear | nn.Conv2d):
            module.to(DTYPES[dtype])
        elif isinstance(module, ImageProjection) and module.positions is not None:
            module.positions.data = module.positions.data.to(DTYPES[dtype])
