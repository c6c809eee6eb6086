"""Numbers so small that a CPU takes several times as long over them, taken for zero instead.

The tanh of GELU makes them of inputs around 12 and -12: they cost nearly half of the time of the built-in
model's layers on an Intel Xeon. What they stand for is below the last bit of anything that they are added to.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

_DENORMAL = torch.tensor(1e-40)


@contextmanager
def flushing_denormals(device: torch.device) -> Iterator[None]:
    """Within, denormal numbers are zero in this thread's work on a CPU.

    In threads that it starts as well, and not in those of a pool that is there already.
    """
    # torch can set it, and not say whether it is set
    if device.type != "cpu" or is_flushing() or not torch.set_flush_denormal(True):
        yield
        return
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


def is_flushing() -> bool:
    """Whether this thread takes denormal numbers for zero."""
    return not (_DENORMAL * 1.0).item()
