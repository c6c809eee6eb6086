"""Bad input: exit code 2, one line that says what was given and what is allowed, nothing left on disk."""

import fcntl
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from vidgen.builtin import BUILTIN_PATH

Run = Callable[..., Any]
Refused = Callable[..., str]
RED = "a red circle"
QUICK = ("--num-frames", 17, "--num-inference-steps", 2, "--no-sheet")


@dataclass(frozen=True)
class Case:
    name: str
    argv: tuple[object, ...]
    says: tuple[str, ...]  # parts of the line
    files: dict[str, str | bytes] = field(default_factory=dict)


def of_flag(name: str, *argv: object, says: tuple[str, ...]) -> Case:
    """A case of `vidgen render` with a good prompt."""
    return Case(name, ("render", RED, *argv), says)


def of_config(name: str, text: str | bytes, *says: str) -> Case:
    return Case(name, ("render", "--config", "job.yaml"), ("job.yaml", *says), {"job.yaml": text})


def of_segments(name: str, text: str | bytes, *says: str) -> Case:
    return Case(name, ("render", "--segments", "s.yaml"), says, {"s.yaml": text})


CASES = (
    # the prompt
    Case("no prompt", ("render",), ("no prompt", "for example")),
    Case("empty prompt", ("render", ""), ("prompt is empty",)),
    Case("blank prompt", ("render", " \t "), ("prompt is empty",)),
    Case("no known word", ("render", "xyzzy qwrt"), ("xyzzy qwrt", "it knows", "red")),
    Case("fillers only", ("render", "a background"), ("'a background'", "it knows")),
    Case("too many words", ("render", "red circle " * 20), ("40 known words", "at most 16")),
    Case("two prompts", ("render", RED, "blue"), ("blue", "unexpected")),
    of_flag("no known word in the negative prompt", "--neg-prompt", "xyzzy", says=("xyzzy", "it knows")),
    Case(
        "prompt and segments",
        ("render", RED, "--segments", "s.yaml"),
        ("both prompt and segments", "one of them"),
        {"s.yaml": "[{prompt: red, num_frames: 17}]"},
    ),
    # numbers
    of_flag("zero frames", "--num-frames", 0, says=("num_frames='0'", "greater than or equal to 1")),
    of_flag("negative frames", "--num-frames", -5, says=("num_frames='-5'", "greater than or equal to 1")),
    of_flag("frames in words", "--num-frames", "many", says=("num_frames='many'", "valid integer")),
    of_flag("half a frame", "--frame_num", "16.5", says=("num_frames='16.5'", "integer")),
    of_flag("a number without end", "--num-frames", "9" * 400, says=("num_frames='999", "less than")),
    of_flag(
        "more frames than the disk holds",
        *("--num-frames", 10**12),
        says=(str(10**12), "of disk", "TiB", "are free"),
    ),
    # attention
    of_flag("no such backend", "--attention-backend", "flish", says=("flish", "native", "auto")),
    of_flag(
        "a backend of other machines",
        *("--attention-backend", "flash", "--device", "cpu"),
        says=("backend=flash", "not on cpu", "able here: native"),
    ),
    of_flag(
        "a backend that knows no layouts",
        *("--attention-backend", "native", "--sparsity", "adaspa"),
        says=("backend=native", "block layouts", "able here: cpu"),
    ),
    of_flag("no such policy", "--sparsity", "adaspe", says=("policy=adaspe", "adaspa", "svg2")),
    of_flag("more than all", *("--sparsity", "adaspa", "--density", 2), says=("density=2", "at most 1")),
    of_flag("no share", *("--sparsity", "adaspa", "--density", "half"), says=("density='half'", "number")),
    of_config(
        "an unknown key of sparsity",
        "prompt: red\nattention: {sparsity: {densty: 1}}",
        "attention.sparsity.densty",
        "did you mean density?",
    ),
    of_config(
        "blocks of nothing", "prompt: red\nattention: {sparsity: {key_block: 0}}", "key_block=0", "at least 1"
    ),
    of_flag("no rank", "--ranks", 0, says=("ranks='0'", "1 to 4096", "auto")),
    of_flag("ranks in words", "--num-gpus", "some", says=("ranks='some'", "1 to 4096", "auto")),
    of_flag("more ranks than layers", "--ranks", 7, says=("ranks=7", "6 layers", "1 to 6")),
    of_flag(
        "an address that is none",
        *("--ranks", 2, "--address", "head-node"),
        says=("address=head-node", "HOST:PORT"),
    ),
    of_flag(
        "a cluster that is not there",
        *("--ranks", 2, "--address", "127.0.0.1:1"),
        says=("address=127.0.0.1:1", "no Ray cluster", "ray start --head"),
    ),
    of_flag("fewer ranks that are more", "--ranks", 2, "--min-ranks", 3, says=("min_ranks=3", "ranks=2")),
    Case(
        "a cut that misses a layer",
        ("render", RED, "--config", "c.yaml"),
        ("layers_per_rank=[2, 3]", "6 layers"),
        {"c.yaml": "parallel: {ranks: 2, layers_per_rank: [2, 3]}"},
    ),
    of_flag("zero height", "--height", 0, says=("height='0'", "greater than or equal to 1")),
    of_flag("height between patches", "--height", 33, says=("height=33", "multiple of 8", "32")),
    of_flag("width between patches", "--width", 7, says=("width=7", "multiple of 8", "try 8")),
    of_flag(
        "larger than the memory",
        *("--size", "100000x100000"),
        says=("100000x100000", "TiB", "memory", "are free", "smaller"),
    ),
    of_flag("zero fps", "--fps", 0, says=("fps='0'", "greater than or equal to 1")),
    of_flag("GIF of too many fps", "--fps", 60, "-o", "x.gif", says=("fps=60", "at most 50")),
    of_flag("zero steps", "--num-inference-steps", 0, says=("num_inference_steps='0'", "equal to 1")),
    of_flag("negative steps", "--sample_steps", -1, says=("num_inference_steps='-1'", "equal to 1")),
    of_flag("too many steps", "--infer-steps", 1001, says=("num_inference_steps='1001'", "1000")),
    of_flag("nan guidance", "--guidance-scale", "nan", says=("guidance_scale='nan'", "finite")),
    of_flag("infinite guidance", "--cfg-scale", "inf", says=("guidance_scale='inf'", "finite")),
    of_flag("negative guidance", "--guidance-scale", -1, says=("guidance_scale='-1'", "equal to 0")),
    of_flag("zero shift", "--shift", 0, says=("shift='0'", "greater than 0")),
    of_flag("shift in words", "--flow-shift", "much", says=("shift='much'", "valid number")),
    of_flag("negative seed", "--seed", -1, says=("seed='-1'", "equal to 0")),
    of_flag("seed too large", "--base_seed", 2**63, says=(f"seed='{2**63}'", "less than")),
    of_flag("seed in words", "--seed", "lucky", says=("seed='lucky'", "valid integer")),
    of_flag("zero threads", "--threads", 0, says=("threads='0'", "equal to 1")),
    of_flag("states never", "--state-every", 0, says=("state_every='0'", "equal to 1")),
    of_flag("upscale 0", "--upscale", 0, says=("output.upscale='0'", "equal to 1")),
    of_flag("upscale 1000", "--upscale", 1000, says=("output.upscale='1000'", "64")),
    of_flag("negative crf", "--crf", -1, says=("output.crf='-1'", "equal to 0")),
    of_flag("crf 52", "--crf", 52, says=("output.crf='52'", "51")),
    of_flag("size of one number", "--size", "832", says=("'832'", "WIDTHxHEIGHT", "832x480")),
    of_flag("size in words", "--size", "large", says=("'large'", "WIDTHxHEIGHT")),
    of_flag("size twice", "--size", "32x32", "--height", 64, says=("--height 64", "one of them")),
    of_flag("two sizes", "--size", "32x32", "--video-size", 32, 32, says=("32x32", "one of them")),
    of_flag("half a video size", "--video-size", 32, says=("--video-size", "2 arguments")),
    # the queue
    of_flag("context over block", "--context-frames", 9, says=("context_frames=9", "0 to 4")),
    of_flag("zero block", "--block-frames", 0, says=("queue.block_frames='0'", "equal to 1")),
    of_flag("zero stride", "--stride", 0, says=("queue.stride='0'", "equal to 1")),
    of_flag("stride over steps", "--stride", 21, says=("stride=21", "1 to 20")),
    of_flag("anchor over block", "--anchor-frames", 5, says=("anchor_frames=5", "0 to 4")),
    of_flag(
        "timetable",
        "--timetable",
        "fast",
        says=("timetable='fast'", "'dualparal'", "'lockstep' or 'pipefusion'"),
    ),
    of_flag("mode", "--context-mode", "both", says=("context_mode='both'", "'recompute' or 'cache'")),
    of_flag("noise", "--noise", "pink", says=("noise='pink'", "'pool' or 'independent'")),
    of_flag("transition", "--transition-blocks", -1, says=("transition_blocks='-1'", "equal to 0")),
    # flags and commands
    of_flag("unknown flag", "--framess", 3, says=("--framess", "--help")),
    of_flag("flag without its value", "--seed", says=("--seed", "argument")),
    Case("unknown command", ("rendr", RED), ("rendr", "--help")),
    # the model
    of_flag("unknown model", "--model", "sora", says=("model=sora", "vidgen models")),
    of_flag("a folder as model", "--model", ".", says=("model=.", "no checkpoint of Wan")),
    Case(
        "a model that is no safetensors",
        ("render", RED, "--ckpt_dir", "m.safetensors"),
        ("m.safetensors", "not a safetensors file", "give a vidgen checkpoint"),
        {"m.safetensors": b"not at all"},
    ),
    # where it goes
    Case(
        "output under a file",
        ("render", RED, "-o", "file/x.mp4"),
        ("output=file/x.mp4", "cannot be written", "Not a directory"),
        {"file": "precious"},
    ),
    of_flag("output in /proc", "-o", "/proc/x.mp4", says=("output=/proc/x.mp4", "cannot be written")),
    of_flag("job in /proc", "--job", "/proc/x", says=("job=/proc/x", "cannot be written")),
    of_flag("latents in /proc", "--save-latents", "/proc/x", says=("save_latents=/proc/x", "cannot be")),
    of_flag("unknown suffix", "-o", "x.avi", says=("x.avi", ".avi is not known", ".mp4, .gif, .webp")),
    of_flag("output without a name", "-o", "", says=("output='.'", "out.mp4")),
    of_flag("name too long", "-o", "x" * 300 + ".mp4", says=("xxx.mp4", "too long")),
    Case(
        "output exists",
        ("render", RED, "--save_file", "x.mp4"),
        ("output=x.mp4", "exists", "--overwrite"),
        {"x.mp4": "precious"},
    ),
    Case(
        "latents exist",
        ("render", RED, "--save-latents", "l.safetensors"),
        ("save_latents=l.safetensors", "exists", "--overwrite"),
        {"l.safetensors": "precious"},
    ),
    Case(
        "a folder with files as output",
        ("render", RED, "-o", "album"),
        ("output=album", "exists", "--overwrite"),
        {"album/holiday.png": "precious"},
    ),
    Case(
        "job folder exists",
        ("render", RED),
        ("job=out.job", "vidgen resume out.job", "--overwrite"),
        {"out.job/job.yaml": "prompt: red"},
    ),
    Case(
        "job folder that is none, with --overwrite",
        ("render", RED, "--job", "home", "--overwrite"),
        ("job=home", "not a job's folder"),
        {"home/thesis.txt": "precious"},
    ),
    # config files
    Case("config missing", ("render", "--config", "no.yaml"), ("no.yaml", "No such file")),
    Case("config is a folder", ("render", "--config", "."), (".: cannot be read", "directory")),
    of_config("config empty", "", "need a mapping", "nothing"),
    of_config("config is a list", "- 1\n- 2\n", "need a mapping", "[1, 2]"),
    of_config("config is broken YAML", "a: [1,\nb: }", "broken YAML", "line"),
    of_config("config is binary", b"\xff\xfe\x00", "not a text file"),
    of_config("zero byte in a path", 'prompt: red\noutput: {path: "a\\0b.mp4"}', "output.path", "zero bytes"),
    of_flag("no text", "--neg-prompt", "blue \udcff", says=("negative_prompt=", "valid UTF-8")),
    of_config("unknown key", "prompt: red\nnum_framse: 3\n", "num_framse", "did you mean num_frames?"),
    of_config("unknown key far from all", "prompt: red\nzzzz: 3\n", "zzzz", "known keys: prompt"),
    of_config("unknown nested key", "prompt: red\nqueue: {strid: 1}\n", "queue.strid", "mean stride?"),
    of_config("unknown segment key", "segments: [{prompt: a, frames: 1}]", "segments.0.", "num_frames"),
    of_config("room that is a word", "prompt: red\noutput: out.mp4\n", "output='out.mp4'", "dictionary"),
    of_config("wrong value in a file", "prompt: red\nfps: fast\n", "fps='fast'", "valid integer"),
    Case("empty prompt in a file", ("render", "--config", "c"), ("prompt is empty",), {"c": "prompt: ''"}),
    # segments
    Case("segments missing", ("render", "--segments", "no.yaml"), ("no.yaml", "No such file")),
    of_segments("segments broken", "[{prompt: red", "s.yaml", "broken YAML"),
    of_segments("no segments", "[]", "s.yaml", "need a list of {prompt, num_frames}", "nothing"),
    of_segments("segments are a mapping", "prompt: red", "s.yaml", "need a list", "dict"),
    of_segments("segments are words", "[red, blue]", "segments.0='red'", "dictionary"),
    of_segments("segment without frames", "[{prompt: red}]", "segments.0.num_frames", "required"),
    of_segments("segment without prompt", "[{num_frames: 17}]", "segments.0.prompt", "required"),
    of_segments("segment of no frames", "[{prompt: red, num_frames: 0}]", "num_frames=0", "equal to 1"),
    of_segments("blank segment", "[{prompt: ' ', num_frames: 17}]", "prompt is empty"),
    of_segments(
        "segment shorter than a block",
        "[{prompt: red, num_frames: 10}, {prompt: blue, num_frames: 3}, {prompt: green, num_frames: 32}]",
        *("segment 2", "3 frames", "16 frames", "at least that long"),
    ),
    # resume
    Case("resume without a job", ("resume",), ("JOB",)),
    Case("resume of nothing", ("resume", "no.job"), ("no.job", "no job here")),
    Case("resume of another folder", ("resume", "."), ("no job here", "folder of a vidgen job")),
    Case("resume of a file", ("resume", "f"), ("f", "no job here"), {"f": ""}),
)


def write(files: dict[str, str | bytes]) -> None:
    for name, content in files.items():
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_bad_input_is_refused_in_one_line_and_leaves_nothing(case: Case, run: Run, refused: Refused):
    write(case.files)
    line = refused(*case.argv)
    assert all(part in line for part in case.says), line


def test_a_safetensors_file_of_something_else_is_no_model(run: Run, refused: Refused, tmp_path: Path):
    save_file({"weight": torch.zeros(2)}, tmp_path / "m.safetensors")
    line = refused("render", RED, "--model", "m.safetensors")
    assert "m.safetensors" in line and "give a vidgen checkpoint" in line


def test_a_checkpoint_that_lacks_a_part_is_no_model(refused: Refused, tmp_path: Path):
    settings = '{"family": "vidgen-small"}'
    save_file({"weight": torch.zeros(2)}, tmp_path / "m.safetensors", metadata={"vidgen": settings})
    assert "m.safetensors" in refused("render", RED, "--model", "m.safetensors")


def test_a_full_disk_is_found_before_the_start(run: Run, refused: Refused, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("vidgen.places.free_disk_bytes", lambda folder: 100)
    line = refused("render", RED)
    assert "65 frames" in line and "100 B are free" in line


def test_little_memory_is_found_before_the_start(run: Run, refused: Refused, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("vidgen.planning.available_memory_bytes", lambda: 1000)
    line = refused("render", RED)
    assert "32x32" in line and "1000 B are free" in line


def test_a_job_in_use_is_not_resumed(run: Run, refused: Refused):
    assert run("render", RED, *QUICK).code == 0
    with Path("out.job/lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        line = refused("resume", "out.job")
    assert "out.job" in line and "in use" in line and "wait" in line


def test_a_job_whose_model_changed_is_not_resumed(run: Run, refused: Refused, tmp_path: Path):
    model = tmp_path / "m.safetensors"
    shutil.copy(BUILTIN_PATH, model)
    assert run("render", RED, "--model", model, *QUICK).code == 0
    Path("out.mp4").unlink()
    data = bytearray(model.read_bytes())
    data[-1] ^= 1
    model.write_bytes(data)
    line = refused("resume", "out.job")
    assert "m.safetensors" in line and "has changed" in line


def test_unknown_words_are_one_line_warnings(run: Run):
    ran = run("render", "a red blob circle", *QUICK)
    assert ran.code == 0
    assert ran.err.startswith("warning: the model does not know 'blob'") and len(ran.err.splitlines()) == 1
