"""What a checkpoint is, and what a render with it would take of each rank."""

from dataclasses import replace
from typing import Any

import torch

from vidgen.config import JobConfig
from vidgen.engine import Engine
from vidgen.limits import memory_bytes
from vidgen.parallel.place import strip
from vidgen.parallel.topology import balanced, by_hand, check_num_ranks
from vidgen.planning import make_timetable, resolve_job


def inspect_model(job: JobConfig) -> dict[str, Any]:
    """Family, parts and their parameters, and per rank the bytes of weights and of work, as plain data.

    ValueError in one line for a checkpoint that is not whole, or a job that cannot be done with it.
    """
    engine = Engine.from_pretrained(job.model, dtype=job.dtype, loras=job.loras, with_dit=False)
    family, config = engine.family, engine.config
    job = resolve_job(family, job, engine.sparsity)
    assert job.num_frames and job.height and job.width
    timetable = make_timetable(job, family.sizes.num_latent_frames(job.num_frames))
    ranks = 1 if job.parallel.ranks == "auto" else job.parallel.ranks
    check_num_ranks(ranks, config.num_layers)
    cut = job.parallel.layers_per_rank
    topology = by_hand(cut, config.num_layers) if cut else balanced(config.num_layers, ranks)
    strides = (family.sizes.temporal_stride, family.sizes.spatial_stride)
    rows, columns = (
        size // strides[1] // patch for size, patch in zip((job.height, job.width), config.patch, strict=True)
    )
    frames = min(timetable.block_frames, timetable.num_frames) + timetable.context_frames
    facts = family.facts()
    return {
        "model": family.name,
        **facts,
        "settings": _settings(job),
        "decode_bytes": family.decode_bytes(job.height, job.width),
        "tokens": frames * rows * columns,
        "forwards": timetable.num_forwards,
        "ranks": [
            {
                "rank": stage.index,
                "layers": len(stage.layers),
                "weight_bytes": sum(_bytes(strip(dit.config, stage)) for dit in family.dits),
                "work_bytes": memory_bytes(
                    job, replace(config, num_layers=len(stage.layers)), timetable, strides, 0
                ),
            }
            for stage in topology.stages()
        ],
    }


def _settings(job: JobConfig) -> dict[str, Any]:
    """The settings that people look for."""
    names = (
        "width", "height", "num_frames", "fps", "num_inference_steps", "guidance_scale", "guidance_scale_2",
        "shift", "dtype",
    )  # fmt: skip
    shown = {name: getattr(job, name) for name in names}
    shown |= {"timetable": job.queue.timetable}
    if job.queue.timetable != "full":
        shown |= {"block_frames": job.queue.block_frames, "context_frames": job.queue.context_frames}
    return {name: value for name, value in shown.items() if value is not None}


def _bytes(module: torch.nn.Module) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in module.state_dict().values())
