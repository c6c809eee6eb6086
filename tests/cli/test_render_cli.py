"""Renders through the command line: every way to say a job, every output, and every way to be stopped."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import yaml
from PIL import Image
from safetensors.torch import load_file

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
        *("--guidance", "stacked", "--residual-guidance", "self"),
        *("--global-frames", 2, "--warm-up-steps", 3),
        *("--ranks", 1, "--placement", "spread", "--max-restarts", 1),
        *("--ulysses", 1, "--ring", 1, "--cfg-parallel", 1, "--clip-ranks", 1),
        *("--min-ranks", 2, "--device", "cpu", "--attention-backend", "cpu"),
        *("--sparsity", "adaspa", "--recall", 0.8, "--solver", "unipc", "--dtype", "fp32", "--no-compile"),
        *("--upscale", 2, "--crf", 20, "--save-latents", "l.safetensors", "--no-sheet", "--job", "j"),
    ).code == 0  # fmt: skip
    job = job_of("j").model_dump(mode="json")
    attention = job.pop("attention")
    assert attention["backend"] == "cpu"
    assert (attention["sparsity"]["policy"], attention["sparsity"]["recall"]) == ("adaspa", 0.8)
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
        "guidance_scale_2": None,
        "solver": "unipc",
        "model": "builtin",
        "dtype": "fp32",
        "compile": False,
        "loras": [],
        "tile": None,
        "offload": {"encoders": False, "codec": False},
        "text_cache": None,
        "input": {"image": None, "last_image": None, "video": None, "video_frames": 5},
        "device": "cpu",
        "threads": 1,
        "state_every": 2,
        "queue": {
            "timetable": "dualparal",
            "block_frames": 3,
            "context_frames": 1,
            "stride": 2,
            "context_mode": "cache",
            "anchor_frames": 1,
            "global_frames": 2,
            "warm_up_steps": 3,
            "noise": "independent",
            "transition_blocks": 1,
            "guidance": "stacked",
            "residual_guidance": "self",
            "static_threshold": None,
        },
        "cache": {
            "method": "none",
            "threshold": None,
            "warm_up_steps": None,
            "last_steps": None,
            "max_skips": None,
            "order": None,
            "coefficients": None,
            "calibration": None,
            "magnitudes": None,
            "layers": None,
            "boundary": None,
            "ratio": None,
            "highest": None,
        },
        "speed": None,
        "parallel": {
            "ranks": 1,
            "scheme": "given",
            "hardware": None,
            "layers_per_rank": None,
            "ulysses": 1,
            "ring": 1,
            "guidance": 1,
            "clip": 1,
            "address": None,
            "placement": "spread",
            "max_restarts": 1,
            "min_ranks": 2,
            "heartbeat_timeout_s": 15.0,
            "link_timeout_s": 120.0,
            "links": "auto",
            "queue_blocks": 4,
            "trace": True,
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
    if path.name.startswith("ablate_"):
        from vidgen.ablate.settings import cells_of, read_ablation

        assert len(cells_of(read_ablation(path), path.name)) > 1
        return
    if path.name.startswith("train_"):
        from vidgen.cli_train import read_train_config

        read_train_config(path, {})
        return
    if path.name.startswith("serve"):
        from vidgen.serve.config import load_server_config

        load_server_config(path)
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


# sparse attention


def test_an_approximation_is_named_before_and_measured_after(run: Run):
    flags = ("--sparsity", "adaspa", "--density", 0.5, "--num-inference-steps", 5, "--no-sheet")
    ran = run("render", RED, "--num-frames", 17, *flags)
    assert ran.code == 0
    assert "sparse  adaspa: an approximation" in ran.out
    assert "% of (query, key) pairs seen" in ran.out and "searches in" in ran.out
    settings = job_of("out.job").attention.sparsity
    assert settings.density == 0.5 and settings.blocks == (16, 16) and settings.search_at == (0.2, 0.6)


def test_the_backend_is_kept_with_the_job(run: Run, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("VIDGEN_ATTENTION_BACKEND", "cpu")
    assert run("render", RED, "--num-frames", 5, *QUICK).code == 0
    assert job_of("out.job").attention.backend == "cpu"
