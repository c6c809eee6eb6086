"""Where kernels are tried: on CUDA where there is one, else on the CPU by Triton's interpreter."""

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest
import torch
from torch import Tensor

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # a CUDA build of torch warns on a machine without a driver
    _ON_CUDA = torch.cuda.is_available()
if not _ON_CUDA:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported, which reads it once


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if _ON_CUDA else "cpu")


@pytest.fixture
def draw(device: torch.device) -> Callable[..., Tensor]:
    """Standard normal tensors on the device, the same in every run of a test and on every machine."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=generator).to(device=device, dtype=dtype)

    return draw


@pytest.fixture
def memory_of_nans() -> Callable[[], AbstractContextManager[None]]:
    """A context in which fresh tensors hold NaN, so that what a kernel leaves out shows."""

    @contextmanager
    def filled() -> Iterator[None]:
        torch.use_deterministic_algorithms(True)
        try:
            assert torch.empty(3).isnan().all()
            yield
        finally:
            torch.use_deterministic_algorithms(False)

    return filled


@pytest.fixture
def at_most_twice() -> Callable[[Tensor, Tensor, Tensor], None]:
    """Asserts FlashAttention's rule: the error is at most twice that of plain torch in the same dtype."""

    def check(fast: Tensor, eager: Tensor, exact: Tensor) -> None:
        assert fast.shape == exact.shape
        error, allowed = ((found.double() - exact.double()).abs().max().item() for found in (fast, eager))
        assert error <= 2 * allowed + 1e-6, f"{error} against {allowed} of plain torch"  # nor is it NaN

    return check
