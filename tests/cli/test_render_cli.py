"""Renders through the command line: every way to say a job, every output, and every way to be stopped."""

import errno
import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import yaml
from PIL import Image
from safetensors.torch import load_file

from vidgen import render as rendering
from vidgen.config import parse_job, read_yaml
from vidgen.engine import Engine
from vidgen.media.source import VideoSource

Run = Callable[..., Any]
RED = "a red circle moving left over a gray background"
QUICK = ("--num-inference-steps", 2, "--no-sheet")
CONFIGS = sorted((Path(__file__).resolve().parents[2] / "configs").glob("*.yaml"))


def frames_of(path: str | Path) -> np.ndarray:
    with VideoSource(path) as source:
        return np.stack(list(source))


def job_of(folder: str | Path) -> Any:
    """The resolved job that a render left."""
    return parse_job(read_yaml(Path(folder, "job.yaml")))


def events(out: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.splitlines()]


# ways to say a job


def test_canonical_flags_reach_the_job(run: Run):
    assert run(
        *("render", RED, "--num-frames", 17, "--height", 24, "--width", 40, "--fps", 8),
        *("--num-inference-steps", 3, "--guidance-scale", 1.5, "--shift", 3, "--seed", 7, "--threads", 1),
        *("--negative-prompt", "blue", "--model", "builtin", "--state-every", 2, "--timetable", "dualparal"),
        *("--block-frames", 3, "--context-frames", 1, "--stride", 2, "--context-mode", "cache"),
        *("--anchor-frames", 1, "--noise", "independent", "--transition-blocks", 1, "--output", "v.mp4"),
        *("--upscale", 2, "--crf", 20, "--save-latents", "l.safetensors", "--no-sheet", "--job", "j"),
    ).code == 0  # fmt: skip
    job = job_of("j").model_dump(mode="json")
    assert job == {
        "prompt": RED,
        "segments": [],
        "negative_prompt": "blue",
        "num_frames": 17,
        "height": 24,
        "width": 40,
        "fps": 8,
        "num_inference_steps": 3,
        "guidance_scale": 1.5,
        "shift": 3.0,
        "seed": 7,
        "model": "builtin",
        "threads": 1,
        "state_every": 2,
        "queue": {
            "timetable": "dualparal",
            "block_frames": 3,
            "context_frames": 1,
            "stride": 2,
            "context_mode": "cache",
            "anchor_frames": 1,
            "noise": "independent",
            "transition_blocks": 1,
        },
        "output": {"path": "v.mp4", "upscale": 2, "crf": 20, "save_latents": "l.safetensors", "sheet": False},
    }
    assert frames_of("v.mp4").shape == (17, 48, 80, 3)
    assert load_file("l.safetensors")["latents"].shape == (1, 128, 5, 3, 5)


@pytest.mark.parametrize(
    "argv",
    [
        *[["--frame_num", 5, "--sample_steps", 2, "--sample_guide_scale", 2, "--sample_shift", 3]],
        *[["--video-length", 5, "--infer-steps", 2, "--cfg-scale", 2, "--flow-shift", 3]],
        *[["--num_frames", 5, "--num_inference_steps", 2, "--guidance_scale", 2, "--shift", 3]],
    ],
    ids=["Wan", "Hunyuan", "diffusers' underscores"],
)
@pytest.mark.parametrize("rest", [["--base_seed", 3, "--save_file"], ["--seed", 3, "--save-path"]])
@pytest.mark.parametrize("size", [["--size", "32*40"], ["--size", "32x40"], ["--video-size", 40, 32]])
def test_flags_of_other_tools_mean_the_same(argv: list[Any], rest: list[Any], size: list[Any], run: Run):
    names = ["--neg-prompt", "blue", "--ckpt_dir", "builtin"]
    assert run("render", RED, *argv, *size, *names, *rest, "v.mp4").code == 0
    job = job_of("v.job")
    assert (job.num_frames, job.num_inference_steps, job.guidance_scale, job.shift) == (5, 2, 2.0, 3.0)
    assert (job.width, job.height, job.seed, job.negative_prompt) == (32, 40, 3, "blue")


def test_flags_win_over_the_file_and_the_file_over_defaults(run: Run):
    config = {"prompt": "blue", "num_frames": 9, "fps": 8, "seed": 1, "queue": {"stride": 2, "noise": "pool"}}
    Path("c.yaml").write_text(yaml.safe_dump(config))
    argv = ("--config", "c.yaml", "--seed", 2, "--noise", "independent", "--infer-steps", 2, "--no-sheet")
    assert run("render", *argv).code == 0
    job = job_of("out.job")
    assert (job.prompt, job.num_frames, job.fps, job.seed) == ("blue", 9, 8, 2)
    assert (job.queue.stride, job.queue.noise, job.guidance_scale) == (2, "independent", 3.0)


def test_a_prompt_replaces_the_segments_of_the_file_and_the_other_way_round(run: Run):
    Path("segments.yaml").write_text("[{prompt: red, num_frames: 16}, {prompt: blue, num_frames: 17}]")
    Path("with_segments.yaml").write_text("segments: [{prompt: green, num_frames: 9}]")
    Path("with_prompt.yaml").write_text("{prompt: green, num_frames: 9}")
    assert run("render", RED, "--config", "with_segments.yaml", "--num-frames", 5, *QUICK).code == 0
    job = job_of("out.job")
    assert (job.prompt, job.segments, job.num_frames) == (RED, (), 5)
    argv = ("--config", "with_prompt.yaml", "--segments", "segments.yaml", "-o", "two.mp4")
    assert run("render", *argv, *QUICK).code == 0
    job = job_of("two.job")
    assert (job.prompt, [s.prompt for s in job.segments], job.num_frames) == (None, ["red", "blue"], 33)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_can_be_planned(path: Path):
    values = read_yaml(path)
    if path.name.startswith("train_"):
        from vidgen.cli_train import read_train_config

        read_train_config(path, {})
        return
    job = parse_job(values, str(path))
    plan = Engine.from_pretrained(job.model).plan(job)
    assert plan.task.timetable.num_ticks > 0


def test_the_demo_renders(run: Run):
    demo = CONFIGS[0].parent / "demo.yaml"
    assert run("render", "--config", demo, "--infer-steps", 2, "--guidance-scale", 1).code == 0
    assert frames_of("out/demo.mp4").shape == (257, 256, 256, 3)
    assert Path("out/demo.png").exists()


# what comes out


def test_one_frame_is_a_video(run: Run):
    assert run("render", RED, "--num-frames", 1, *QUICK).code == 0
    assert frames_of("out.mp4").shape == (1, 32, 32, 3)


@pytest.mark.parametrize("name", ["v.gif", "v.webp"])
def test_animations(name: str, run: Run):
    assert run("render", RED, "--num-frames", 6, *QUICK, "-o", name).code == 0
    with Image.open(name) as image:
        assert image.size == (32, 32) and getattr(image, "n_frames", 1) > 1


@pytest.mark.xfail(reason="media.source: decord refuses widths like 8, 16, 24, 48, 72", strict=True)
def test_a_narrow_video_gets_its_sheet(run: Run):
    argv = ("--width", 16, "--num-frames", 5, "--infer-steps", 2)
    assert run("render", RED, *argv).code == 0 and Path("out.png").exists()


def test_a_folder_gets_pictures(run: Run):
    assert run("render", RED, "--num-frames", 6, *QUICK, "-o", "pictures/").code == 0
    assert sorted(p.name for p in Path("pictures").iterdir()) == [f"frame_{i:06d}.png" for i in range(6)]


def test_a_video_says_all_that_repeats_it(run: Run):
    assert run("render", RED, "--num-frames", 20, *QUICK, "--seed", 5, "--stride", 2).code == 0
    with av.open("out.mp4") as file:
        comment = json.loads(file.metadata["comment"])
    Path("again.yaml").write_text(yaml.safe_dump(comment["job"]))
    assert run("render", "--config", "again.yaml", "-o", "again.mp4").code == 0
    assert np.array_equal(frames_of("again.mp4"), frames_of("out.mp4"))


# what is said


def test_json_is_events_on_stdout_and_text_on_stderr(run: Run):
    ran = run("render", RED, "--num-frames", 33, "--infer-steps", 3, "--json")
    assert ran.code == 0
    first, *ticks, last = events(ran.out)
    assert (first["event"], first["num_blocks"], first["num_ticks"]) == ("started", 3, 5)
    assert first["job"]["seed"] == 0 and first["folder"] == "out.job"
    assert [tick["ticks_done"] for tick in ticks] == [1, 2, 3, 4, 5]
    assert all(tick["event"] == "progress" and tick["eta_s"] >= 0 for tick in ticks)
    assert (last["event"], last["output"], last["sheet"]) == ("finished", "out.mp4", "out.png")
    assert last["num_frames"] == 33 and last["seconds"] > last["first_frame_s"] > 0
    assert abs(last["seconds_per_frame"] - last["seconds"] / 33) < 1e-3
    assert "finished in" in ran.err and "out.mp4" in ran.err


def test_away_from_a_terminal_progress_is_plain_lines(run: Run):
    ran = run("render", RED, "--num-frames", 33, *QUICK, "--seed", 11)
    assert ran.code == 0 and not ran.err
    assert "\x1b" not in ran.out and "\r" not in ran.out
    for fact in (
        "seed 11",
        "33 of 32x32",
        "model   builtin",
        "3 blocks",
        "out.job",
        "out.mp4",
        "s per frame",
    ):
        assert fact in ran.out
    assert len([line for line in ran.out.splitlines() if line.startswith("frames ") and "left" in line]) == 2


def test_a_reader_who_leaves_does_not_stop_the_render(tmp_path: Path):
    with started(tmp_path, "--num-frames", 65, *QUICK) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.wait(60) == 0
    assert len(frames_of(tmp_path / "out.mp4")) == 65


# being stopped


@contextmanager
def started(folder: Path, *argv: object) -> Iterator[subprocess.Popen[str]]:
    """`vidgen render --json` as a process of its own; killed if the test leaves it running."""
    command = [sys.executable, "-m", "vidgen", "render", RED, "--json", *map(str, argv)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=folder, stdout=pipe, stderr=pipe, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    path = tmp_path_factory.mktemp("uninterrupted") / "whole.mp4"
    job = {"prompt": RED, "num_frames": 129, "num_inference_steps": 4, "output": {"path": path}}
    rendering.render(parse_job(job))
    return frames_of(path)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_after_the_tick_and_resume_gives_the_same_frames(
    number: signal.Signals, uninterrupted: np.ndarray, run: Run, tmp_path: Path
):
    with started(tmp_path, "--num-frames", 129, "--infer-steps", 4) as process:
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(2)]  # started, and the first tick
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    last = events("".join(lines) + out)[-1]
    assert last == {"event": "interrupted", "folder": "out.job"}
    assert "vidgen resume out.job" in err and "Traceback" not in err
    assert not Path("out.mp4").exists()
    ran = run("resume", "out.job", "--json")
    assert ran.code == 0
    assert events(ran.out)[1]["ticks_done"] > 1, "it began anew"
    assert np.array_equal(frames_of("out.mp4"), uninterrupted)


def test_the_second_signal_ends_it_at_once(tmp_path: Path):
    # ticks of more than a second, so that the first signal's tick is not over when the second comes
    size = ("--size", "128x128", "--timetable", "full", "--num-frames", 64, "--infer-steps", 4)
    with started(tmp_path, *size) as process:
        assert process.stdout is not None and process.stderr is not None
        while json.loads(process.stdout.readline())["event"] != "progress":
            pass
        process.send_signal(signal.SIGINT)
        while "once more" not in process.stderr.readline():
            pass
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "vidgen resume" not in err and "Traceback" not in err
    assert (tmp_path / "out.job/job.yaml").exists()


def test_a_disk_that_fills_up_costs_nothing_that_is_finished(
    uninterrupted: np.ndarray, run: Run, monkeypatch: pytest.MonkeyPatch
):
    commit, calls = rendering._commit, []

    def commit_twice(*parts: Any) -> None:
        calls.append(parts)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, "No space left on device", "out.job/latents")
        commit(*parts)

    monkeypatch.setattr(rendering, "_commit", commit_twice)
    ran = run("render", RED, "--num-frames", 129, "--infer-steps", 4)
    assert ran.code == 3
    assert len(ran.err.splitlines()) == 1 and ran.err.startswith("vidgen: error: ")
    for part in ("No space left", "32 of 129 frames are kept", "vidgen resume out.job"):
        assert part in ran.err
    assert run("resume", "out.job").code == 0
    assert np.array_equal(frames_of("out.mp4"), uninterrupted)


def test_a_fault_of_the_engine_shows_its_trace_and_keeps_the_job(run: Run, monkeypatch: pytest.MonkeyPatch):
    def fail(*_: object) -> None:
        raise KeyError("fault")

    monkeypatch.setattr(rendering, "_make_sheet", fail)
    ran = run("render", RED, "--num-frames", 5, "--infer-steps", 2)
    assert ran.code == 3 and "Traceback" in ran.err
    assert "KeyError: 'fault'; 5 of 5 frames are kept" in ran.err.splitlines()[-1]


def test_resume_of_a_finished_job_says_so(run: Run):
    assert run("render", RED, "--num-frames", 9, *QUICK).code == 0
    before = Path("out.mp4").stat().st_mtime_ns
    ran = run("resume", "out.job")
    assert ran.code == 0 and "already finished: out.mp4" in ran.out
    assert run("resume", "out.job", "--json").out.startswith('{"event": "finished"')
    assert Path("out.mp4").stat().st_mtime_ns == before


def test_resume_makes_a_lost_output_again(run: Run):
    assert run("render", RED, "--num-frames", 20, *QUICK).code == 0
    data = Path("out.mp4").read_bytes()
    Path("out.mp4").unlink()
    assert run("resume", "out.job").code == 0
    assert Path("out.mp4").read_bytes() == data


def test_overwrite_starts_anew(run: Run):
    assert run("render", RED, "--num-frames", 9, *QUICK).code == 0
    assert run("render", RED, "--num-frames", 5, *QUICK, "--overwrite").code == 0
    assert len(frames_of("out.mp4")) == 5
