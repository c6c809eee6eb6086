"""Help, version, doctor, models, train: the commands that render nothing."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vidgen import __version__, doctor

Run = Callable[..., Any]
TINY = """
{size: 32, width: 16, num_layers: 1, num_heads: 2, codec_channels: 8, latent_frames: [2], clip_weights: [1],
 tokens_per_step: 32, compile: false, log_every: 1, num_steps: 5}
"""


def test_version(run: Run):
    assert run("--version").out == f"vidgen {__version__}\n"


def test_help_does_not_wait_for_the_engine():
    code = (
        "import sys; from vidgen.cli import main; assert main(['render', '--help']) == 0; "
        "print([name for name in ('torch', 'numpy', 'av', 'yaml') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("[]\n")
    for name in ("--num-frames", "--frame_num", "--video-length", "--cfg-scale", "--save_file", "--segments"):
        assert name in done.stdout


def test_without_a_command_there_is_help(run: Run):
    ran = run()
    assert ran.code == 0 and "render" in ran.out and "doctor" in ran.out


def test_python_m_vidgen_ends_with_the_code_of_main():
    done = subprocess.run([sys.executable, "-m", "vidgen", "resume", "/proc"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("vidgen: error: /proc: no job here")


def test_doctor_finds_this_machine_well(run: Run):
    ran = run("doctor", "--json")
    report = json.loads(ran.out)
    assert ran.code == 0 and report["ok"]
    names = {(finding["group"], finding["name"]) for finding in report["findings"]}
    assert {("versions", "torch"), ("versions", "av"), ("devices", "cpu"), ("attention", "native")} <= names
    assert {("codecs", "H.264"), ("codecs", "VP9"), ("codecs", "AV1"), ("space", "disk")} <= names
    assert {("space", "memory"), ("models", "builtin")} <= names
    assert all(finding["advice"] for finding in report["findings"] if finding["state"] != "ok")


def test_doctor_ends_with_2_when_something_required_is_missing(run: Run, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(doctor, "CODECS", {"H.264": ("no_such_codec", "h264", True)})
    ran = run("doctor")
    assert ran.code == 2
    assert "MISSING H.264" in ran.out and "no_such_codec" in ran.out and "pip install" in ran.out


def test_models_lists_the_builtin_one_and_its_words(run: Run):
    (model,) = json.loads(run("models", "--json").out)
    assert model["name"] == "builtin" and model["parameters"] > 1e6 and model["bytes"] > 1e6
    assert "red" in model["vocabulary"]["words"] and model["recommended"]["height"] == 32
    assert model["training"]["step"] > 0
    assert "red, green" in run("models").out


def test_train_makes_a_model_that_renders(run: Run):
    Path("tiny.yaml").write_text(TINY)
    ran = run("train", "--config", "tiny.yaml", "--run", "run", "--steps", 2, "--json")
    assert ran.code == 0
    assert [json.loads(line)["step"] for line in ran.out.splitlines()] == [1, 2]
    argv = ("red", "--model", "run/model.safetensors", "--num-frames", 4, "--infer-steps", 2)
    assert run("render", *argv).code == 0


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("nmu_steps: 3", "unknown key nmu_steps; did you mean num_steps?"),
        ("zzzz: 3", "known keys: world"),
        ("num_steps: abc", "num_steps='abc'"),
        ("world: moon", "world='moon': there are small, full"),
        ("", "need a mapping of settings, found nothing"),
        ("[", "broken YAML"),
    ],
)
def test_bad_training_settings_are_refused(text: str, says: str, run: Run):
    Path("train.yaml").write_text(text)
    ran = run("train", "--config", "train.yaml", "--run", "run")
    assert ran.code == 2 and says in ran.err and len(ran.err.splitlines()) == 1
    assert not Path("run").exists()


def test_bench_attention_tells_layers_and_heads_and_draws(run: Run, monkeypatch: pytest.MonkeyPatch):
    from vidgen.bench import attention

    monkeypatch.setattr(attention, "SMALL", {"adaspa": {"policy": "adaspa", "density": 0.5}})
    ran = run("bench", "attention", "--prompts", 1, "--no-speed", "--picture", "p.png", "--json", "b.json")
    assert ran.code == 0 and Path("p.png").stat().st_size > 1000
    assert ran.out.count("density_per_head") == 6 and "recall_per_head" in ran.out
    dense, sparse = json.loads(Path("b.json").read_text())["rows"]
    assert dense["policy"] == "dense" and sparse["density"] < 1
