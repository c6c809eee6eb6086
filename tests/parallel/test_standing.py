"""Ranks that outlive a render, and prompts changed while they work: the files are those of one process."""

import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from vidgen.live import Live, Wish
from vidgen.parallel import standing
from vidgen.parallel.gang import GangFailed
from vidgen.parallel.standing import Gangs
from vidgen.render import render

QUEUE = {"block_frames": 2, "context_frames": 1}
ANOTHER = "a green triangle staying still over a black background"


@pytest.fixture
def gangs(local_ray: None) -> Iterator[Gangs]:
    made = Gangs(keeps=True)
    yield made
    made.close()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, jobs: Any) -> dict[str, bytes]:
    """What one process makes."""
    folder = tmp_path_factory.mktemp("whole")
    render(jobs.job(folder / "v.mp4", 1, queue=QUEUE))
    return jobs.files(folder / "v.job")


def ranks_of(done: Any) -> list[dict[str, Any]]:
    (attempt,) = done.evidence["attempts"]
    return attempt["ranks"]


def test_the_next_render_finds_the_same_processes_and_reads_no_weights(
    tmp_path: Path, gangs: Gangs, whole: Any, jobs: Any
):
    live = Live(gangs=gangs)
    first = render(jobs.job(tmp_path / "a.mp4", 2, queue=QUEUE), live=live)
    assert gangs.is_kept and len(gangs.ages_s()) == 3
    second = render(jobs.job(tmp_path / "b.mp4", 2, queue=QUEUE), live=live)
    assert [rank["pid"] for rank in ranks_of(first)] == [rank["pid"] for rank in ranks_of(second)]
    assert all(rank["bytes_read"] > 0 for rank in ranks_of(first))
    assert [rank["bytes_read"] for rank in ranks_of(second)] == [0, 0]
    assert jobs.files(tmp_path / "a.job") == jobs.files(tmp_path / "b.job") == whole
    third = render(jobs.job(tmp_path / "c.mp4", 3, queue=QUEUE), live=live)
    assert jobs.files(tmp_path / "c.job") == whole, "another number of ranks is another gang"
    assert not {rank["pid"] for rank in ranks_of(third)} & {rank["pid"] for rank in ranks_of(second)}


def test_a_render_that_is_given_up_leaves_ranks_that_can_work(
    tmp_path: Path, gangs: Gangs, whole: Any, jobs: Any, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(standing, "LET_GO_S", 60.0)  # a busy machine is no fault
    checks = 0

    class Enough(Exception):
        pass

    def check() -> None:
        nonlocal checks
        checks += 1
        if checks > 3:
            raise Enough

    segments = [{"prompt": ANOTHER, "num_frames": 2001}]
    with pytest.raises(Enough):
        render(
            jobs.job(tmp_path / "a.mp4", 2, queue=QUEUE, segments=segments),
            live=Live(gangs=gangs, check=check),
        )
    assert gangs.is_kept
    assert gangs._kept is not None
    pids = [member.where.pid for member in gangs._kept.ranks if member.where is not None]
    done = render(jobs.job(tmp_path / "b.mp4", 2, queue=QUEUE), live=Live(gangs=gangs))
    assert [rank["pid"] for rank in ranks_of(done)] == pids
    assert jobs.files(tmp_path / "b.job") == whole


def test_a_rank_that_dies_at_rest_is_noticed_and_the_next_render_has_others(
    tmp_path: Path, gangs: Gangs, whole: Any, jobs: Any
):
    first = render(jobs.job(tmp_path / "a.mp4", 2, queue=QUEUE), live=Live(gangs=gangs))
    gangs.ping()
    os.kill(ranks_of(first)[1]["pid"], signal.SIGKILL)
    deadline = time.monotonic() + 30
    with pytest.raises(GangFailed, match="rank 1"):
        while time.monotonic() < deadline:
            gangs.ping()
    assert not gangs.is_kept and gangs.ages_s() == ()
    render(jobs.job(tmp_path / "b.mp4", 2, queue=QUEUE), live=Live(gangs=gangs))
    assert jobs.files(tmp_path / "b.job") == whole


class Wishing:
    """Wishes for another prompt once a block is there, and remembers what came of it."""

    def __init__(self, after_blocks: int) -> None:
        self.after_blocks, self.num_blocks, self.has_wished = after_blocks, 0, False
        self.applied: list[tuple[int, int]] = []
        self.refused: list[str] = []

    def live(self, **options: Any) -> Live:
        return Live(
            wishes=self._wishes,
            applied=lambda wish, block, frame: self.applied.append((block, frame)),
            refused=lambda wish, why: self.refused.append(why),
            committed=lambda block: setattr(self, "num_blocks", self.num_blocks + 1),
            **options,
        )

    def _wishes(self) -> list[Wish]:
        if self.has_wished or self.num_blocks < self.after_blocks:
            return []
        self.has_wished = True
        return [Wish(id="w", prompt=ANOTHER, transition_blocks=1)]


def segments_of(first: str, first_frame: int, num_frames: int) -> list[dict[str, Any]]:
    return [
        {"prompt": first, "num_frames": first_frame},
        {"prompt": ANOTHER, "num_frames": num_frames - first_frame},
    ]


@pytest.mark.parametrize("parallel", [{}, {"guidance": 2}], ids=str)
def test_a_prompt_changed_on_ranks_gives_the_files_of_one_that_was_to_change(
    parallel: dict[str, int], tmp_path: Path, gangs: Gangs, jobs: Any
):
    prompt, num_frames = "a blue square moving up over a white background", 241
    settings: dict[str, Any] = {
        "segments": [{"prompt": prompt, "num_frames": num_frames}],
        "queue": QUEUE | {"transition_blocks": 0},
    }
    wishing = Wishing(after_blocks=1)
    job = jobs.job(tmp_path / "a.mp4", 2, parallel=parallel, **settings)
    render(job, live=wishing.live(gangs=gangs))
    ((block, frame),) = wishing.applied
    assert 0 < block < 31 and not wishing.refused
    expected = jobs.job(
        tmp_path / "b.mp4",
        1,
        segments=segments_of(prompt, frame, num_frames),
        queue=QUEUE | {"transition_blocks": 1},
    )
    render(expected)
    assert jobs.files(tmp_path / "a.job") == jobs.files(tmp_path / "b.job")


def test_a_changed_prompt_survives_ranks_that_die(tmp_path: Path, gangs: Gangs, jobs: Any):
    prompt, num_frames = "a blue square moving up over a white background", 161
    wishing = Wishing(after_blocks=1)
    killed: list[int] = []

    def kill_a_rank() -> None:
        gang = gangs._at_work
        if wishing.applied and not killed and gang is not None:
            killed.append(gang.pids()[1])
            os.kill(killed[0], signal.SIGKILL)

    job = jobs.job(
        tmp_path / "a.mp4", 2, segments=[{"prompt": prompt, "num_frames": num_frames}], queue=QUEUE
    )
    live = replace(wishing.live(gangs=gangs), check=kill_a_rank)
    render(job, live=live)
    ((_, frame),) = wishing.applied
    assert killed
    expected = jobs.job(
        tmp_path / "b.mp4", 1, segments=segments_of(prompt, frame, num_frames),
        queue=QUEUE | {"transition_blocks": 1},
    )  # fmt: skip
    render(expected)
    assert jobs.files(tmp_path / "a.job") == jobs.files(tmp_path / "b.job")


def test_a_wish_that_comes_too_late_is_refused_on_ranks(tmp_path: Path, gangs: Gangs, jobs: Any):
    wishing = Wishing(after_blocks=1)
    job = jobs.job(tmp_path / "a.mp4", 2, segments=[{"prompt": ANOTHER, "num_frames": 9}], queue=QUEUE)
    render(job, live=wishing.live(gangs=gangs))
    assert wishing.applied == [] and wishing.refused == ["the last block is being made already"]
