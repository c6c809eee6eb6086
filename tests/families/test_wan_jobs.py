"""Jobs on Wan checkpoints: any number of ranks, both formats, stopped anywhere, from pictures and clips."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from vidgen.config import JobConfig, parse_job
from vidgen.engine import Engine
from vidgen.families.family import as_pixels
from vidgen.inspection import inspect_model
from vidgen.media.reading import open_output
from vidgen.render import render, resume
from vidgen.run import Interrupted

BASE: dict[str, Any] = {
    "prompt": "a red cat runs", "width": 32, "height": 32, "num_frames": 33, "num_inference_steps": 3,
    "dtype": "fp32", "threads": 1, "state_every": 1,
    "queue": {"timetable": "dualparal", "block_frames": 2, "context_frames": 1},
}  # fmt: skip


def job(model: Path, output: Path, **settings: Any) -> JobConfig:
    placed = {"model": str(model), "output": {"path": output, "sheet": False}}
    return parse_job({**BASE, **placed, **settings})


def latents(output: Path) -> list[torch.Tensor]:
    files = sorted((output.with_suffix(".job") / "latents").iterdir())
    return [load_file(file)["latents"] for file in files]


def assert_same_job(one: Path, other: Path) -> None:
    pairs = zip(latents(one), latents(other), strict=True)
    assert all(torch.equal(*pair) for pair in pairs)
    segments = [sorted((path.with_suffix(".job") / "segments").iterdir()) for path in (one, other)]
    assert [file.read_bytes() for file in segments[0]] == [file.read_bytes() for file in segments[1]]


@pytest.fixture(scope="module")
def whole(folder: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The output of a job that nothing happened to, by kind."""
    made: dict[str, Path] = {}

    def whole(kind: str) -> Path:
        if kind not in made:
            output = tmp_path_factory.mktemp(kind) / "whole.mp4"
            render(job(folder(kind), output, **settings_of(kind, output.parent)))
            made[kind] = output
        return made[kind]

    return whole


def settings_of(kind: str, place: Path) -> dict[str, Any]:
    if kind == "ti2v":
        return {"num_frames": 17, "input": {"image": write_picture(place / "p.png")}}
    if kind == "i2v":
        return {"input": {"image": write_picture(place / "p.png")}}
    return {}


def write_picture(path: Path) -> Path:
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(pixels.repeat(8, axis=0).repeat(8, axis=1)).save(path)
    return path


@pytest.mark.parametrize("kind", ["t2v", "a14b-t2v", "i2v"])
def test_two_ranks_give_what_one_gives(kind: str, folder: Any, whole: Any, tmp_path: Path):
    expected = whole(kind)
    found = tmp_path / "ranks.mp4"
    render(job(folder(kind), found, parallel={"ranks": 2}, **settings_of(kind, tmp_path)))
    assert_same_job(found, expected)
    assert sum(p.std().item() for p in latents(found)) > 0.1


@pytest.mark.parametrize("kind", ["t2v", "i2v", "ti2v"])
def test_a_stopped_job_goes_on_to_the_same_frames_without_its_picture(
    kind: str, folder: Any, whole: Any, tmp_path: Path
):
    """Solver history, encoded texts and pictures, and the codec's warm-up all come back."""
    output, ticks = tmp_path / "v.mp4", iter(range(100))
    with pytest.raises(Interrupted):
        render(job(folder(kind), output, **settings_of(kind, tmp_path)), should_stop=lambda: next(ticks) == 3)
    (tmp_path / "p.png").unlink(missing_ok=True)
    resume(output.with_suffix(".job"))
    assert_same_job(output, whole(kind))


def test_a_job_goes_on_on_ranks_with_the_solvers_history(folder: Any, whole: Any, tmp_path: Path):
    output, ticks = tmp_path / "v.mp4", iter(range(100))
    with pytest.raises(Interrupted):
        render(job(folder("t2v"), output), should_stop=lambda: next(ticks) == 4)
    resume(output.with_suffix(".job"), parallel={"ranks": 2})
    assert_same_job(output, whole("t2v"))


@pytest.mark.parametrize("kind", ["t2v", "a14b-i2v"])
def test_wans_own_names_give_the_same(kind: Any, folder: Any, native: Any, picture: Any):
    given: dict[str, Any] = {"width": 32, "height": 32, "num_frames": 9, "num_inference_steps": 3, "seed": 5}
    if kind == "a14b-i2v":
        given["image"] = picture(32, 32)
    outputs = [
        Engine.from_pretrained(root, dtype="fp32")(
            "a red cat", output_type="pt", guidance_scale=4.0, shift=5.0, solver="unipc", **given
        ).frames
        for root in (folder(kind), native(kind))
    ]
    assert outputs[0].std() > 0.01
    assert torch.equal(*outputs)


def test_a_clip_goes_on_from_its_last_frames(folder: Any, tmp_path: Path):
    """Into the second block, and whatever frame rate the clip had."""
    clip, output = tmp_path / "clip.mp4", tmp_path / "v.mp4"
    sizes = {"width": 64, "height": 64, "num_frames": 17}
    render(job(folder("ti2v"), clip, **sizes))
    render(job(folder("ti2v"), output, input={"video": clip, "video_frames": 9}, seed=3, **sizes))
    with open_output(clip, 24) as frames:
        known = as_pixels(frames.frames(range(8, 17)))
    codec = Engine.from_pretrained(folder("ti2v"), dtype="fp32", with_dit=False).family.codec()
    found = torch.cat(latents(output), dim=2)
    assert torch.equal(found[:, :, :3], codec.encode(known))
    assert found[:, :, 3:].std() > 0.1


def test_a_prompt_seen_before_needs_no_text_encoder(
    folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def absent(*_: object) -> None:
        raise AssertionError("loaded")

    render(job(folder("t2v"), tmp_path / "a.mp4", text_cache=tmp_path / "texts"))
    monkeypatch.setattr("vidgen.conditioning.umt5.load_text_encoder", absent)
    render(job(folder("t2v"), tmp_path / "b.mp4", text_cache=tmp_path / "texts"))
    assert_same_job(tmp_path / "a.mp4", tmp_path / "b.mp4")
    with pytest.raises(AssertionError, match="loaded"):
        render(job(folder("t2v"), tmp_path / "c.mp4"))


def test_a_changed_checkpoint_is_noticed(folder: Any, tmp_path: Path):
    root = shutil.copytree(folder("t2v"), tmp_path / "model")
    output, ticks = tmp_path / "v.mp4", iter(range(100))
    with pytest.raises(Interrupted):
        render(job(root, output), should_stop=lambda: next(ticks) == 2)
    file = root / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, file)
    with pytest.raises(ValueError, match="has changed since; start the job anew"):
        resume(output.with_suffix(".job"))


def test_a_lora_changes_the_video_and_its_absence_is_one_line(folder: Any, tmp_path: Path):
    lora, name = tmp_path / "style.safetensors", "transformer.blocks.0.attn1.to_q"
    save_file(
        {f"{name}.lora_A.weight": torch.randn(2, 24), f"{name}.lora_B.weight": torch.randn(24, 2)}, lora
    )
    render(job(folder("t2v"), tmp_path / "a.mp4", loras=[f"{lora}:0.0"]))
    render(job(folder("t2v"), tmp_path / "b.mp4", loras=[str(lora)]))
    render(job(folder("t2v"), tmp_path / "c.mp4"))
    a, b, c = (latents(tmp_path / f"{name}.mp4") for name in "abc")
    assert all(torch.equal(*pair) for pair in zip(a, c, strict=True))
    assert not any(torch.equal(*pair) for pair in zip(b, c, strict=True))
    with pytest.raises(ValueError, match=r"none\.safetensors") as caught:
        render(job(folder("t2v"), tmp_path / "d.mp4", loras=[str(tmp_path / "none.safetensors")]))
    assert "\n" not in str(caught.value) and not (tmp_path / "d.job").exists()


@pytest.mark.parametrize("kind", ["t2v", "ti2v"])
def test_what_planning_asks_of_the_codec_needs_no_weights(kind: Any, folder: Any, tmp_path: Path):
    root = shutil.copytree(folder(kind), tmp_path / "model")
    whole = Engine.from_pretrained(folder(kind), with_dit=False).family.codec()
    (root / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    family = Engine.from_pretrained(root, with_dit=False).family
    assert family.warm_up_frames == whole.warm_up_frames > 0
    assert family.decode_bytes(64, 64) > 64 * 64 * 3 * 4


def test_a_rank_is_told_the_memory_of_its_own_layers(folder: Any):
    settings = {**BASE, "model": str(folder("t2v"))}
    one = inspect_model(parse_job(settings))
    three = inspect_model(parse_job({**settings, "parallel": {"ranks": 3}}))
    assert sum(rank["layers"] for rank in three["ranks"]) == one["ranks"][0]["layers"] == 3
    assert sum(rank["weight_bytes"] for rank in three["ranks"]) == one["ranks"][0]["weight_bytes"]
    assert max(rank["work_bytes"] for rank in three["ranks"]) < one["ranks"][0]["work_bytes"]
