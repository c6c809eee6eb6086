"""How quick this machine is at the moment: others on it, and its clock, change that within minutes."""

import statistics
import time

import torch
from torch.nn import functional

WIDTH, TOKENS, ROUNDS, READINGS = 256, 256, 4, 5


@torch.inference_mode()
def pace_s() -> float:
    """Seconds that a fixed piece of work of a layer's kind takes now, the median of some readings.

    Some 0.1 s in all. Seconds of renders are divided by it before they are compared.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(TOKENS, WIDTH, generator=generator)
    up = torch.randn(4 * WIDTH, WIDTH, generator=generator) / 64
    down = torch.randn(WIDTH, 4 * WIDTH, generator=generator) / 64
    readings = []
    for _ in range(READINGS):
        y, before = x, time.perf_counter()
        for _ in range(ROUNDS):
            normal = functional.layer_norm(y, (WIDTH,))
            y = y + functional.relu(normal @ up.T) @ down.T
        readings.append(time.perf_counter() - before)
    return statistics.median(readings)
