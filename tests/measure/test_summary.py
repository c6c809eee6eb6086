"""One front for all figures of a video file: they are those of its frames, however they come, and errors are
a line."""

import json
import math
import random
import sys
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from vidgen.cli import main
from vidgen.measure import perceptual
from vidgen.measure.fidelity import boundary_jump, psnr, ssim
from vidgen.measure.steadiness import motion_smoothness
from vidgen.measure.summary import measure_video, shrink
from vidgen.media.sink import open_sink
from vidgen.world import Scene, render_clips

SCENE = Scene(colour="red", shape="square", motion="left", background="navy")


@pytest.fixture(scope="module")
def clip() -> Tensor:
    return render_clips([SCENE], num_frames=100, size=32, rng=random.Random(0))[0]


def damaged(clip: Tensor) -> Tensor:
    noise = torch.randn(clip.shape, generator=torch.Generator().manual_seed(0))
    return (clip + 0.05 * noise).clamp(-1, 1)


@pytest.mark.parametrize("at_once", [100, 16, 7])
def test_parts_are_measured_as_the_whole(clip, at_once):
    other = damaged(clip)
    found = measure_video(other.split(at_once, 1), clip.split(at_once, 1), block_frames=16, scene=SCENE)
    assert found["psnr"] == pytest.approx(psnr(other, clip), abs=1e-4)
    assert found["ssim"] == pytest.approx(ssim(other, clip), abs=1e-6)
    assert found["motion_smoothness"] == pytest.approx(motion_smoothness(other))
    assert found["boundary_jump"] == pytest.approx(boundary_jump(other, list(range(16, 100, 16))))
    assert found["frames"] == 100 and found["adherence"]["all"] == "7/7"
    assert 0 <= found["temporal_score"] <= 1 and 0 <= found["spatial_fidelity"] <= 1


def test_equal_videos_are_infinitely_near(clip):
    found = measure_video([clip], [clip])
    assert found["psnr"] == math.inf and found["ssim"] == pytest.approx(1) and found["temporal_score"] == 1


def test_figures_that_a_video_is_too_short_for_are_left_out(clip):
    assert set(measure_video([clip[:, :1]])) == {"frames", "sharpness"}
    assert "look_drift" not in measure_video([clip[:, :3]])
    short = measure_video([clip[:, :90]], [clip[:, :90]])
    assert "psnr" in short and "temporal_score" not in short
    with pytest.raises(ValueError, match="0 frames"):
        measure_video([])


def test_large_frames_are_shrunk_and_small_ones_left():
    assert shrink(torch.zeros(3, 2, 480, 832)).shape == (3, 2, 68, 118)
    assert shrink(torch.zeros(3, 2, 32, 48)).shape == (3, 2, 32, 48)


def write(path: Path, clip: Tensor) -> Path:
    pictures = ((clip + 1) * 127.5).round().byte().permute(1, 2, 3, 0).contiguous().numpy()
    side = clip.shape[-1]
    sink = open_sink(path, path.parent / f"{path.stem}.job", side, side, Fraction(16), {})
    sink.write(pictures, first_frame=0, block=0)
    return sink.finish()


def test_the_command_measures_real_files(clip, tmp_path, capfd):
    good, bad = write(tmp_path / "good.mp4", clip), write(tmp_path / "bad.mp4", damaged(clip))
    alone = ["--json", "--block-frames", "16", "--prompt", SCENE.caption()]
    assert main(["measure", "video", str(good), "--against", str(bad), *alone]) == 0
    found = json.loads(capfd.readouterr().out)
    assert found["frames"] == 100 and found["adherence"]["all"] == "7/7"
    assert 20 < found["psnr"] < 40 and 0.3 < found["ssim"] < 1 and 0.8 < found["boundary_jump"] < 1.3
    assert main(["measure", "video", str(good), "--against", str(good)]) == 0
    lines = dict(line.split("  ", 1) for line in capfd.readouterr().out.splitlines())
    assert lines["psnr"] == "inf" and float(lines["ssim"]) == 1


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["no.mp4"], "cannot be read as a video"),
        (["text.mp4"], "cannot be read as a video"),
        (["good.mp4", "--against", "short.mp4"], "give videos of the same size and length"),
        (["good.mp4", "--prompt", "a cat"], "must name one colour"),
        (["good.mp4", "--lpips"], "--against"),
        (["good.mp4", "--against", "good.mp4", "--lpips"], "pip install lpips"),
    ],
)
def test_what_cannot_be_measured_is_one_line(clip, tmp_path, monkeypatch, capfd, flags, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "lpips", None)
    perceptual._network.cache_clear()
    (tmp_path / "text.mp4").write_text("no video")
    write(tmp_path / "good.mp4", clip[:, :20])
    write(tmp_path / "short.mp4", clip[:, :16])
    capfd.readouterr()
    assert main(["measure", "video", *flags]) == 2
    out, err = capfd.readouterr()
    assert words in err and err.startswith("vidgen: error: ") and err.count("\n") == 1 and not out


class Gap(torch.nn.Module):
    """Instead of the network: the mean absolute difference of each pair [N, 3, Y, X]."""

    def __init__(self, net: str, verbose: bool) -> None:
        super().__init__()

    def forward(self, frames: Tensor, others: Tensor) -> Tensor:
        return (frames - others).abs().mean((1, 2, 3), keepdim=True)


def test_lpips_is_the_mean_over_all_frames(clip, monkeypatch):
    monkeypatch.setitem(sys.modules, "lpips", SimpleNamespace(LPIPS=Gap))
    perceptual._network.cache_clear()
    other = damaged(clip[:, :37])
    expected = (other - clip[:, :37]).abs().mean().item()
    assert perceptual.lpips(other, clip[:, :37]) == pytest.approx(expected, rel=1e-5)
    found = measure_video(other.split(16, 1), clip[:, :37].split(16, 1), with_lpips=True)
    assert found["lpips"] == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ValueError, match="32 pixels a side"):
        perceptual.lpips(other[..., :16], clip[:, :37, :, :16])
    perceptual._network.cache_clear()


def test_lpips_without_its_weights_is_one_line(clip, monkeypatch):
    def fail(net: str, verbose: bool) -> None:
        raise OSError("no network")

    monkeypatch.setitem(sys.modules, "lpips", SimpleNamespace(LPIPS=fail))
    perceptual._network.cache_clear()
    with pytest.raises(ValueError, match="weights of AlexNet cannot be loaded"):
        perceptual.lpips(clip, clip)
    perceptual._network.cache_clear()
