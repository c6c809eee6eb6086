"""Where Triton kernels run: on a CUDA device, or on the CPU by Triton's interpreter (TRITON_INTERPRET=1)."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, TypeVar, cast

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs, next_power_of_2

INTERPRETED: bool = knobs.runtime.interpret  # a kernel is bound to it when it is defined
_TRUNCATES = tl.constexpr(INTERPRETED)
Function = TypeVar("Function", bound=Callable[..., Any])


def require_somewhere() -> None:
    """ImportError where there is neither a CUDA device nor the interpreter."""
    if not INTERPRETED and not torch.cuda.is_available():
        raise ImportError("Triton needs a CUDA device, or TRITON_INTERPRET=1 set before triton is imported")


def require_here(*tensors: Tensor) -> AbstractContextManager[None]:
    """The context that launches on the tensors' device; ValueError where these kernels cannot take them."""
    first = tensors[0]
    if any(tensor.device != first.device for tensor in tensors):
        devices = ", ".join(sorted({str(tensor.device) for tensor in tensors}))
        raise ValueError(f"tensors on {devices}: a kernel needs them on one device")
    if not first.is_cuda and not INTERPRETED:
        raise ValueError(
            f"a tensor on {first.device}: Triton kernels take CUDA tensors; name another backend"
        )
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        raise ValueError("a tensor that requires gradients: Triton kernels have none; name another backend")
    return torch.cuda.device_of(first)


def untraced(function: Function) -> Function:
    """The function, called as it is also from compiled layers: torch's compiler cannot trace its launch."""
    return cast(Function, torch.compiler.disable(function))


def padded(length: int) -> int:
    """The power of two that a range over so many needs, at least 16: what Triton can multiply."""
    return max(16, int(next_power_of_2(length)))


def packed(tensor: Tensor) -> Tensor:
    """The tensor with neighbours of the last dim next to each other; all other strides are as they were."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


@triton.jit
def rounded(values, pointer):
    """fp32 values as a pointer's dtype, to the nearest."""
    if _TRUNCATES and pointer.dtype.element_ty == tl.bfloat16:  # the interpreter cuts bits off (triton 3.7.1)
        bits = values.to(tl.uint32, bitcast=True)
        values = (bits + 0x7FFF + ((bits >> 16) & 1)).to(tl.float32, bitcast=True)
    return values.to(pointer.dtype.element_ty)
