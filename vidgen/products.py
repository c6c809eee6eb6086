"""What a finished job leaves beside its video: metadata, latents, a contact sheet."""

import json
from itertools import pairwise
from pathlib import Path

import torch
from safetensors.torch import save_file

from vidgen import __version__
from vidgen.config import JobConfig
from vidgen.engine import Engine
from vidgen.journal import Journal
from vidgen.media.reading import open_output
from vidgen.media.segments import replacing
from vidgen.media.sheet import save_sheet
from vidgen.planning import Plan


def metadata(engine: Engine, job: JobConfig) -> str:
    """All that is needed to repeat the render, as JSON."""
    facts = {"vidgen": __version__, "torch": torch.__version__, "model_sha256": engine.sha256()}
    return json.dumps({**facts, "job": job.model_dump(mode="json")})


def join_latents(journal: Journal, target: Path) -> None:
    latents = [journal.load_latents(record.block) for record in journal.written()]
    target.parent.mkdir(parents=True, exist_ok=True)
    with replacing(target) as temporary:
        save_file({"latents": torch.cat(latents, dim=2)}, temporary)


def make_sheet(plan: Plan) -> Path | None:
    """The contact sheet beside the output, each tile over its prompt."""
    job = plan.job
    target = job.output.sheet_path
    if target is None:
        return None
    assert job.num_frames and job.fps
    timetable = plan.task.timetable
    starts = [plan.first_frame(timetable.block(block)) for block in range(timetable.num_blocks)]
    labels: list[str] = []
    for block, (start, stop) in enumerate(pairwise([*starts, job.num_frames])):
        labels += [plan.timeline.blend(block).new] * (stop - start)
    with open_output(job.output.path, job.fps, job.num_frames) as frames:
        return save_sheet(frames, target, labels=labels[: frames.num_frames])
