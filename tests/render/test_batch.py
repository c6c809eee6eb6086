"""Many jobs, some at a time: each video is what it is alone, and nothing finished is made again."""

from pathlib import Path
from typing import Any

import pytest

from vidgen.batch import Outcome, read_batch, run_batch

PROMPTS = [
    "a red circle moving left over a gray background",
    "a blue square moving up over a white background",
]
BASE = {"num_frames": 9, "num_inference_steps": 2, "output": {"sheet": False}}


def prompts(folder: Path, lines: list[str]) -> Path:
    path = folder / "prompts.txt"
    path.write_text("\n".join(lines) + "\n\n", encoding="utf-8")
    return path


def segments(folder: Path, name: str) -> list[bytes]:
    return [path.read_bytes() for path in sorted((folder / f"{name}.job" / "segments").iterdir())]


def test_any_number_of_replicas_makes_the_same_videos(tmp_path: Path):
    file = prompts(tmp_path, PROMPTS)
    for replicas in (1, 2):
        seen: list[Outcome] = []
        folder = tmp_path / str(replicas)
        assert run_batch(read_batch(file, BASE, folder), replicas, ended=seen.append) == []
        assert sorted(outcome.entry.name for outcome in seen) == ["0000", "0001"]
        assert {outcome.code for outcome in seen} == {0}
    for name in ("0000", "0001"):
        assert segments(tmp_path / "1", name) == segments(tmp_path / "2", name)
    assert segments(tmp_path / "1", "0000") != segments(tmp_path / "1", "0001")
    again: list[Outcome] = []
    assert run_batch(read_batch(file, BASE, tmp_path / "1"), 2, ended=again.append) == []
    assert again == [], "what is finished is left as it is"


def test_stopped_it_leaves_jobs_that_the_same_call_goes_on_with(tmp_path: Path):
    file = prompts(tmp_path, PROMPTS)
    base: dict[str, Any] = {**BASE, "num_frames": 129, "num_inference_steps": 8}
    entries = read_batch(file, base, tmp_path / "a")

    def has_begun() -> bool:
        return any((entry.job_folder / "segments" / "000001.m4s").exists() for entry in entries)

    left = run_batch(entries, 1, should_stop=has_begun)
    assert len(left) == 2 and has_begun()
    assert run_batch(entries, 2) == []
    assert run_batch(read_batch(file, base, tmp_path / "b"), 2) == []
    for name in ("0000", "0001"):
        assert segments(tmp_path / "a", name) == segments(tmp_path / "b", name)


def test_a_job_that_fails_leaves_the_others_untouched(tmp_path: Path):
    file = tmp_path / "jobs.yaml"
    file.write_text(
        f"- {{name: good, prompt: {PROMPTS[0]}}}\n- {{name: bad, prompt: {PROMPTS[1]}, height: 13}}\n"
    )
    seen: dict[str, Outcome] = {}
    left = run_batch(
        read_batch(file, BASE, tmp_path), 2, ended=lambda outcome: seen.update({outcome.entry.name: outcome})
    )
    assert [entry.name for entry in left] == ["bad"] and seen["good"].code == 0
    assert seen["bad"].code == 2 and "height=13" in seen["bad"].message
    assert (tmp_path / "good.mp4").exists() and not (tmp_path / "bad.mp4").exists()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "holds no job"), ("- a\n", "list of mappings"), ("- {prompt: x, nmu_frames: 3}\n", "num_frames"),
        ("- {prompt: x, name: ../y}\n", "plain file name"), ("- {name: a}\n", "no prompt"),
        ("- {prompt: x, name: a}\n- {prompt: y, name: a}\n", "two jobs are named a"),
    ],
)  # fmt: skip
def test_a_bad_file_is_one_line_that_says_what(text: str, said: str, tmp_path: Path):
    file = tmp_path / "jobs.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=said) as error:
        read_batch(file, {}, tmp_path)
    assert "\n" not in str(error.value)
