"""How natural a set of clips is in time, and how true and varied in space, each told apart from the other.

The idea is that of STREAM (Kim, Kim and Yoo, arXiv 2403.09669): of features of frames, the spectrum over time
says how things move, and the mean over time says how they look. They take the features of a pretrained
network; here they are fixed and simple, so that no weights are needed. So "look" means colours, contrast and
sharpness, and "motion" means how fast regions change: neither knows an object from a blot, and a figure
compares sets of the same kind of scenes only. Clips are [B, 3, F, Y, X] in [-1, 1].
"""

import math

import torch
from torch import Tensor
from torch.nn import functional

# B clips, R reference clips, F frames, K bands of frequencies, N features

GRID = 4  # cells a side whose brightness is followed over time
FLOOR = (1 / 255) ** 2  # power below which nothing is seen: half a grey level
NEIGHBOURS = 5


def temporal_score(clips: Tensor, references: Tensor) -> float:
    """How alike the sets' clips change over time, 0 to 1; two sets of one kind come near 1.

    1 - the Kolmogorov-Smirnov distance between the sets, of the power in each octave of temporal frequencies
    of the colours of 4x4 cells, mean over octaves. (STREAM-T compares histograms of the spectrum's skewness.)
    It tells frozen, shuffled, flickering, stuttering and too quick or slow clips, and is blind to blur and to
    how things look. It cannot tell direction or what moves. Chance alone takes some 0.15 off for 32 clips,
    0.1 for 64.
    """
    a_BK, b_RK = motion_spectrum(clips), motion_spectrum(references)
    if a_BK.shape[1] != b_RK.shape[1]:
        raise ValueError(
            f"clips of {clips.shape[2]} frames, references of {references.shape[2]}: need the same"
        )
    distances = [_ks_distance(a, b) for a, b in zip(a_BK.unbind(1), b_RK.unbind(1), strict=True)]
    return 1 - sum(distances) / len(distances)


def spatial_scores(clips: Tensor, references: Tensor, neighbours: int = NEIGHBOURS) -> tuple[float, float]:
    """(fidelity, diversity) of how clips look, 0 to 1 each, whatever the order of their frames.

    A reference's neighbourhood reaches to its own fifth nearest other reference. Fidelity: in how many
    neighbourhoods a clip lies, of five, mean over clips; diversity: the share of neighbourhoods that hold a
    clip (density, here at most 1 a clip, and coverage, Naeem et al., arXiv 2002.09797; STREAM-F and STREAM-D
    are precision and recall, which one odd reference can fool). Fidelity tells blur, noise and wrong
    colours; diversity a set that shows few things, and falls with bad fidelity too. They cannot tell shapes,
    and are blind to time. A set of its own kind has some 0.7 and 0.95.
    """
    if min(len(clips), len(references)) <= neighbours:
        raise ValueError(f"{len(clips)} clips, {len(references)} references: need {neighbours + 1} of each")
    a_BN, b_RN = look(clips), look(references)
    deviation, mean = torch.std_mean(b_RN, dim=0)
    a_BN, b_RN = ((features - mean) / deviation.clamp_min(1e-3) for features in (a_BN, b_RN))
    reach_R = torch.cdist(b_RN, b_RN).sort(1).values[:, neighbours]
    is_near_BR = torch.cdist(a_BN, b_RN) <= reach_R
    fidelity = is_near_BR.float().sum(1).div(neighbours).clamp_max(1).mean().item()
    return fidelity, is_near_BR.any(0).float().mean().item()


def motion_spectrum(clips: Tensor) -> Tensor:
    """[B, K] log power of the clips' changes in octaves of frequency, slowest first."""
    _check(clips, 4)
    cells = functional.adaptive_avg_pool3d(clips.detach().float(), (clips.shape[2], GRID, GRID))
    signal = cells.transpose(1, 2).flatten(2)  # [B, F, 3 * cells]
    signal = signal - signal.mean(1, keepdim=True)
    # without a window the ends of a steady motion leak into all frequencies
    window = torch.hann_window(signal.shape[1], periodic=False, device=signal.device)
    power_BF = torch.fft.rfft(signal * window.view(1, -1, 1), dim=1).abs().square().mean(2)
    power_BF = power_BF / window.square().sum()
    edges = [1]
    while edges[-1] < power_BF.shape[1]:
        edges.append(min(2 * edges[-1], power_BF.shape[1]))
    octaves = [power_BF[:, low:high].sum(1) for low, high in zip(edges, edges[1:], strict=False)]
    return (torch.stack(octaves, 1) + FLOOR).log()


def look(clips: Tensor) -> Tensor:
    """[B, N] mean over time of each frame's colours, their deviations, and the power in octaves of detail."""
    _check(clips, 1)
    frames = clips.detach().float().transpose(1, 2)
    deviation, mean = torch.std_mean(frames.flatten(3), dim=3)
    octaves = _detail_octaves(frames)
    falls = octaves.diff(dim=2)  # how sharp edges are, whatever their contrast
    return torch.cat([mean, deviation, octaves[:, :, :1], falls], dim=2).mean(1)


def _detail_octaves(frames: Tensor) -> Tensor:
    """[B, F, octaves] log power of what each halving of the resolution takes away, coarse first."""
    octaves, rest = [], frames.flatten(0, 1)
    while min(rest.shape[-2:]) >= 2 and len(octaves) < 4:
        half = functional.avg_pool2d(rest, 2)
        even = rest[..., : half.shape[-2] * 2, : half.shape[-1] * 2]
        octaves.append((even - functional.interpolate(half, scale_factor=2)).square().mean((1, 2, 3)))
        rest = half
    if not octaves:
        raise ValueError(f"frames of {tuple(frames.shape[-2:])} pixels: need 2 a side")
    stacked = (torch.stack(octaves[::-1], 1) + FLOOR).log()
    return stacked.unflatten(0, frames.shape[:2])


def _ks_distance(a: Tensor, b: Tensor) -> float:
    """The largest gap between the two sets' shares below a value, over all values; 0 to 1."""
    every = torch.cat([a, b])
    below = [torch.searchsorted(part.sort().values, every, right=True) / len(part) for part in (a, b)]
    return (below[0] - below[1]).abs().max().item()


def _check(clips: Tensor, num_frames: int) -> None:
    if clips.ndim != 5 or clips.shape[1] != 3 or clips.shape[2] < num_frames or not math.prod(clips.shape):
        raise ValueError(f"clips of shape {tuple(clips.shape)}: need [B, 3, F >= {num_frames}, Y, X]")
