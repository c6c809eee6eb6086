"""Faults found once by using the command line; none may come back."""

import fcntl
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

Run = Callable[..., Any]
Refused = Callable[..., str]
RED = "a red circle"
QUICK = ("--num-frames", 17, "--num-inference-steps", 2, "--no-sheet")


def test_a_refused_output_leaves_no_parent_folders(run: Run, refused: Refused):
    refused("render", RED, "-o", "new/folder/x.avi")


def test_a_picture_where_the_sheet_would_go_is_not_overwritten(run: Run, refused: Refused):
    Path("out.png").write_text("precious")
    assert "out.png" in refused("render", RED, "--num-frames", 17, "--infer-steps", 2)


def test_latents_and_video_need_names_of_their_own(run: Run, refused: Refused):
    argv = ("render", RED, *QUICK, "-o", "x.mp4", "--save-latents", "x.mp4")
    assert "x.mp4" in refused(*argv)


def test_overwrite_spares_a_job_in_use(run: Run, refused: Refused):
    assert run("render", RED, *QUICK).code == 0
    with Path("out.job/lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "in use" in refused("render", RED, *QUICK, "--overwrite")


@pytest.mark.parametrize("settings", ["{", "[]"])
def test_a_checkpoint_with_broken_settings_is_refused(
    settings: str, run: Run, refused: Refused, tmp_path: Path
):
    save_file({"weight": torch.zeros(2)}, tmp_path / "m.safetensors", metadata={"vidgen": settings})
    assert "m.safetensors" in refused("render", RED, "--model", "m.safetensors")


def test_a_picture_too_large_for_h264_is_refused_in_words(refused: Refused):
    line = refused("render", RED, "--num-frames", 1, "--size", "264x264", "--upscale", 64)
    assert "16896" in line and "avcodec_open2" not in line


def test_an_empty_folder_can_become_the_job(run: Run):
    Path("j").mkdir()
    assert run("render", RED, *QUICK, "--job", "j").code == 0


def test_a_narrow_video_gets_its_sheet(run: Run):
    argv = ("--width", 16, "--num-frames", 5, "--infer-steps", 2)
    assert run("render", RED, *argv).code == 0 and Path("out.png").exists()
