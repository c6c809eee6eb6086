"""What a job will take of this machine, estimated before anything is made."""

import os
import re
from math import ceil
from pathlib import Path

from vidgen.config import JobConfig
from vidgen.denoise.guidance import num_branches
from vidgen.denoise.timetable import Timetable
from vidgen.model.dit import DiTConfig
from vidgen.types import ContextMode, ResidualGuidance

FLOAT_BYTES = 4
HIDDEN_COPIES = 24  # tensors of the width of the model alive in a layer, found by measuring peaks
PIXEL_COPIES = 6
VIDEO_BYTES_PER_PIXEL = 0.15  # H.264 at crf 16 of busy pictures, segments and the final file together


def memory_bytes(
    job: JobConfig, dit: DiTConfig, timetable: Timetable, strides: tuple[int, int], weight_bytes: int
) -> int:
    """Peak bytes of a single-process render, from shapes alone; about right, rather over than under.

    `strides` are pixel frames per latent frame and pixels per latent row.
    """
    assert job.height and job.width
    rows, columns = job.height // strides[1], job.width // strides[1]
    tokens = rows * columns // (dit.patch[0] * dit.patch[1])
    context, own = timetable.context_frames, min(timetable.block_frames, timetable.num_frames)
    recompute = timetable.mode == ContextMode.RECOMPUTE
    live = min(timetable.num_steps // timetable.stride + 1, timetable.num_blocks)
    if timetable.is_patched:
        live = timetable.num_blocks
    at_once = min(live * own, timetable.num_frames) if timetable.joint or timetable.is_patched else own
    frames = at_once + (context if recompute else 0)
    keys = at_once + 2 * context + timetable.anchor_frames
    hidden = tokens * (frames * (HIDDEN_COPIES * dit.width + 2 * dit.ffn_width) + keys * 4 * dit.width)
    at_work = min(ceil(timetable.num_steps / timetable.stride), timetable.num_blocks)
    lenders = 2 * context * (at_work > 1) + timetable.anchor_frames * (timetable.num_blocks > 2)
    if not recompute and timetable.num_blocks > 1:  # of the last tick, which hold until this one has ended
        lenders += 2 * at_work * context
    residual = job.queue.residual_guidance
    branches = num_branches(job.guidance_scale or 1.0) if residual == ResidualGuidance.NONE else 1
    is_onetime = residual == ResidualGuidance.ONETIME
    lenders += context if is_onetime else 0  # a block at its first step has the second branch too
    # a forward's own keys and values are collected over all layers, if anybody reads some of them
    collected = own + (context if recompute else 0) if lenders else 0
    if timetable.is_patched:  # of this tick, of the tick before, and together as one patch sees them
        lenders, collected = 3 * timetable.num_frames, timetable.num_frames
    lent = (lenders * branches + collected) * dit.num_layers * 2 * tokens * dit.width
    if job.attention.sparsity.policy != "none" and job.attention.sparsity.restores:
        lent += live * branches * dit.num_layers * frames * tokens * (dit.width + 2 * dit.num_heads)
    if job.cache.skips_forwards:  # K,V lent last
        lent += live * branches * context * dit.num_layers * 2 * tokens * dit.width
    if job.cache.skips_forwards or job.cache.skips_tokens:  # outputs
        lent += live * branches * (1 + (job.cache.order or 0)) * own * dit.latent_channels * rows * columns
    if job.cache.skips_layers:  # changes of all tokens, and of lending blocks their keys and values
        copies = 3 if context or timetable.anchor_frames else 1
        lent += live * branches * dit.num_layers * frames * tokens * copies * dit.width
    if job.cache.skips_tokens:  # keys and values of whole windows, the last tokens
        lent += 2 * live * branches * (2 * dit.num_layers * frames + own) * tokens * dit.width  # old and new
    latents = (live * (2 if is_onetime else 1) + 3) * own * dit.latent_channels * rows * columns
    pixels = own * strides[0] * job.height * job.width * 3
    floats = hidden + lent + latents + pixels * PIXEL_COPIES
    return weight_bytes + FLOAT_BYTES * floats + 2 * pixels * job.output.upscale**2


def disk_bytes(job: JobConfig, latent_channels: int, strides: tuple[int, int]) -> int:
    """Bytes that a job's folder and output will take, about."""
    assert job.num_frames and job.height and job.width
    latents = (
        job.num_frames / strides[0] * latent_channels * (job.height // strides[1]) * (job.width // strides[1])
    )
    pixels = job.num_frames * job.height * job.width * job.output.upscale**2
    return round(latents * FLOAT_BYTES + pixels * VIDEO_BYTES_PER_PIXEL)


def available_memory_bytes() -> int:
    """Memory that a new process may take without swapping."""
    try:
        found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    except OSError:
        found = None
    if found:
        return int(found[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def free_disk_bytes(folder: Path) -> int:
    """Free space where a folder is, or would be made."""
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize


def readable(num_bytes: float) -> str:
    """1.5 GiB and the like."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if num_bytes < 1024 or unit == "TiB":
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    raise AssertionError
