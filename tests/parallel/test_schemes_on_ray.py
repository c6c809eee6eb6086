"""Every axis and timetable on real ranks, and the planner's choice among them: the videos are the loop's."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from vidgen.choosing import choose
from vidgen.engine import Engine
from vidgen.execute import choose_device
from vidgen.parallel.planner.hardware import load_hardware
from vidgen.planning import resolve_job
from vidgen.render import render

QUEUE = {"block_frames": 2, "context_frames": 1}
CASES: dict[str, tuple[dict[str, Any], dict[str, int]]] = {
    "ulysses x stages": ({**QUEUE, "context_mode": "cache"}, {"ranks": 4, "ulysses": 2}),
    "ring": ({"timetable": "full"}, {"ranks": 2, "ring": 2}),
    "clips x guidance": ({**QUEUE, "timetable": "lockstep"}, {"ranks": 4, "clip": 2, "guidance": 2}),
    "patches": ({**QUEUE, "timetable": "pipefusion"}, {"ranks": 2}),
    "buffer": ({**QUEUE, "timetable": "buffer"}, {"ranks": 2}),
}


def latents(folder: Path) -> list[torch.Tensor]:
    files = sorted((folder / "latents").iterdir())
    return [tensor for file in files for tensor in load_file(file).values()]


@pytest.mark.parametrize(("queue", "parallel"), CASES.values(), ids=CASES)
def test_ranks_that_share_a_forward_leave_the_latents_of_one_process(
    queue: dict[str, Any], parallel: dict[str, int], tmp_path: Path, local_ray: None, jobs: Any
):
    ranks = parallel["ranks"]
    done = render(jobs.job(tmp_path / "a.mp4", ranks, queue=queue, parallel=parallel))
    render(jobs.job(tmp_path / "b.mp4", 1, queue=queue))
    for one, other in zip(latents(tmp_path / "a.job"), latents(tmp_path / "b.job"), strict=True):
        assert (one - other).abs().max() <= 1e-5 * other.abs().max()
    assert done.evidence is not None
    (attempt,) = done.evidence["attempts"]
    lanes = {axis: size for axis, size in attempt["lanes"].items() if size > 1}
    assert lanes == {axis: size for axis, size in parallel.items() if axis != "ranks"}
    assert bool(attempt["bytes_between_lanes"]) == bool(lanes)


def test_with_scheme_auto_ranks_share_the_work_as_the_planner_chooses_and_the_video_stays(
    tmp_path: Path, local_ray: None, jobs: Any
):
    job = jobs.job(tmp_path / "a.mp4", 2, queue=QUEUE, parallel={"scheme": "auto", "hardware": "cpu"})
    done = render(job)
    engine = Engine.from_pretrained("builtin", with_dit=False)
    resolved = resolve_job(engine.family, job, engine.sparsity)
    choice = choose(engine.family, resolved, 2, load_hardware("cpu"))
    assert done.evidence is not None and choose_device("cpu") == "cpu"
    (attempt,) = done.evidence["attempts"]
    assert {**attempt["lanes"], "stages": len(attempt["layers_per_rank"])} == choice.axes
    render(jobs.job(tmp_path / "b.mp4", 1, queue=QUEUE))
    for one, other in zip(latents(tmp_path / "a.job"), latents(tmp_path / "b.job"), strict=True):
        assert (one - other).abs().max() <= 1e-5 * other.abs().max()


@pytest.mark.parametrize(
    ("parallel", "queue", "said"),
    [
        ({"ranks": 3, "ulysses": 2}, QUEUE, "ranks=3: ulysses=2 need a multiple of 2; try 2"),
        ({"ranks": 16, "ulysses": 2}, QUEUE, "ranks=16: in 2 lanes are 8 stages"),
        ({"ranks": 2, "clip": 2}, QUEUE, "clip=2: clips are those of timetable=lockstep"),
        ({"ranks": 2, "guidance": 2}, {**QUEUE, "guidance": "stacked"}, "guidance=2: needs two branches"),
        ({"ranks": 2, "scheme": "auto", "ring": 2}, QUEUE, "scheme=auto chooses ring"),
    ],
    ids=str,
)
def test_lanes_that_cannot_be_are_refused_in_one_line_and_nothing_is_left(
    parallel: dict[str, Any], queue: dict[str, Any], said: str, tmp_path: Path, local_ray: None, jobs: Any
):
    with pytest.raises(ValueError, match=said) as error:
        render(jobs.job(tmp_path / "a.mp4", parallel["ranks"], queue=queue, parallel=parallel))
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())
