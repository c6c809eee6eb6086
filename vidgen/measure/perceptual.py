"""LPIPS, where a machine has it: never a dependency."""

from functools import cache
from typing import Any

import torch
from torch import Tensor

FRAMES_AT_ONCE = 16
SMALLEST = 32  # pixels a side that its network can take


@torch.inference_mode()
def lpips(video: Tensor, reference: Tensor) -> float:
    """Learned perceptual distance of videos [3, F, Y, X] in [-1, 1], mean over frames; 0 is equal, 1 is far.

    Zhang, Isola, Efros, Shechtman and Wang, arXiv 1801.03924, on AlexNet. It tells loss of texture and
    structure that PSNR forgives, and forgives small shifts that PSNR does not. It judges frame by frame, so
    it cannot tell flicker or motion; it was learned on photographs of some 64 pixels. ValueError in one line
    where the package or its weights are not there.
    """
    if video.shape != reference.shape or video.ndim != 4 or min(video.shape[-2:]) < SMALLEST:
        raise ValueError(
            f"video of {tuple(video.shape)}, reference of {tuple(reference.shape)}: need one shape "
            f"[3, F, Y, X] of {SMALLEST} pixels a side or more"
        )
    network = _network()
    total = 0.0
    pairs = (part.detach().cpu().float().transpose(0, 1) for part in (video, reference))
    for frames, others in zip(*(part.split(FRAMES_AT_ONCE) for part in pairs), strict=True):
        total += network(frames, others).sum().item()
    return total / video.shape[1]


def has_lpips() -> bool:
    """Whether this machine has the package and its weights."""
    try:
        _network()
    except ValueError:
        return False
    return True


@cache
def _network() -> Any:
    try:
        import lpips as package  # pyright: ignore[reportMissingImports]

        return package.LPIPS(net="alex", verbose=False).eval()
    except ImportError as error:
        raise ValueError("LPIPS needs a package that is not installed: pip install lpips") from error
    except OSError as error:  # it loads AlexNet's weights from the network when it is first used
        raise ValueError(f"LPIPS: the weights of AlexNet cannot be loaded ({error}); leave it out") from error
