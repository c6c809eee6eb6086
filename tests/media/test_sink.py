"""Laws of the sinks: one shape for all, nothing committed is ever lost, resuming changes no byte."""

import os
import signal
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from vidgen.media.blocks import WrittenBlock
from vidgen.media.images import AnimationSink, ImageSink
from vidgen.media.sink import Mp4Sink, Sink, open_sink, upscale

FPS = Fraction(16)
LENGTHS = [5, 1, 4, 3]
STARTS = [0, 5, 6, 10]
NUM_FRAMES = 13
METADATA = {"title": "square", "comment": '{"seed": 7}'}
KINDS = ["video.mp4", "video.gif", "video.webp", "pictures/"]


def open_job(tmp_path: Path, name: str, done: list[WrittenBlock] | None = None) -> Sink:
    return open_sink(f"{tmp_path}/out/{name}", tmp_path / "job", 64, 48, FPS, METADATA, done=done or ())


def write_blocks(sink: Sink, frames: np.ndarray, blocks: list[int]) -> list[WrittenBlock]:
    return [
        sink.write(frames[STARTS[b] : STARTS[b] + LENGTHS[b]], first_frame=STARTS[b], block=b) for b in blocks
    ]


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("name", KINDS)
def test_every_sink_is_used_alike_and_leaves_only_its_output(tmp_path, moving_square, name):
    sink = open_job(tmp_path, name)
    records = write_blocks(sink, moving_square(NUM_FRAMES), [0, 1, 2, 3])
    assert [(r.block, r.first_frame, r.num_frames) for r in records] == list(
        zip(range(4), STARTS, LENGTHS, strict=True)
    )
    assert all(record.path.is_file() and len(record.sha256) == 64 for record in records)
    output = sink.finish()
    assert output == tmp_path / "out" / name
    names = list(files(tmp_path / "out"))
    pictures = [f"pictures/frame_{index:06d}.png" for index in range(NUM_FRAMES)]
    assert names == (pictures if name == "pictures/" else [name])
    assert not any(path.endswith(".tmp") for path in files(tmp_path))


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("num_done", [0, 1, 3, 4])
def test_resumed_job_writes_the_same_bytes(tmp_path, moving_square, name, num_done):
    frames = moving_square(NUM_FRAMES)
    whole = open_job(tmp_path / "whole", name)
    records = write_blocks(whole, frames, [0, 1, 2, 3])
    first = open_job(tmp_path / "parts", name)
    # one block more than the journal knows: killed between the rename and the journal row
    done = write_blocks(first, frames, [0, 1, 2, 3][: num_done + 1])[:num_done]
    second = open_job(tmp_path / "parts", name, done=done)
    rest = write_blocks(second, frames, [0, 1, 2, 3][num_done:])
    assert [r.sha256 for r in done + rest] == [r.sha256 for r in records]
    before = files(tmp_path / "parts" / "job")
    assert before == files(tmp_path / "whole" / "job")
    whole.finish()
    second.finish()
    second.finish()  # killed inside finish: it is called again
    assert files(tmp_path / "parts") == files(tmp_path / "whole")


@pytest.mark.parametrize("name", KINDS)
def test_blocks_out_of_order_are_refused(tmp_path, moving_square, name):
    sink = open_job(tmp_path, name)
    write_blocks(sink, moving_square(NUM_FRAMES), [0])
    for first_frame, block in [(5, 2), (6, 1), (0, 0)]:
        with pytest.raises(ValueError, match="next is block 1 at frame 5"):
            sink.write(moving_square(1), first_frame=first_frame, block=block)


@pytest.mark.parametrize("name", KINDS)
def test_finish_without_blocks_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match="render at least one block"):
        open_job(tmp_path, name).finish()


@pytest.mark.parametrize("name", ["video.mp4", "video.gif", "pictures/"])
def test_resume_refuses_a_block_that_changed_on_disk(tmp_path, moving_square, name):
    done = write_blocks(open_job(tmp_path, name), moving_square(NUM_FRAMES), [0, 1])
    done[1].path.write_bytes(done[0].path.read_bytes())
    with pytest.raises(ValueError, match=f"{done[1].path.name}: .* the journal says"):
        open_job(tmp_path, name, done=done)


def test_resume_refuses_another_size(tmp_path, moving_square):
    done = write_blocks(open_job(tmp_path, "video.mp4"), moving_square(NUM_FRAMES), [0])
    with pytest.raises(ValueError, match="init.mp4: from another size"):
        Mp4Sink(tmp_path / "video.mp4", tmp_path / "job", 32, 48, FPS, {}, done=done)


def test_live_file_plays_after_every_block(tmp_path, moving_square, decode, differ):
    frames = moving_square(NUM_FRAMES)
    sink = open_job(tmp_path, "video.mp4")
    for block in range(4):
        (record,) = write_blocks(sink, frames, [block])
        num_frames = record.first_frame + record.num_frames
        times, pictures = decode(tmp_path / "job" / "live.mp4")
        assert times == [index / FPS for index in range(num_frames)]
        assert differ(pictures, frames[:num_frames]) < 2.5
    sink.finish()
    assert not (tmp_path / "job" / "live.mp4").exists()


def test_resume_rebuilds_live_file(tmp_path, moving_square, decode):
    frames = moving_square(NUM_FRAMES)
    done = write_blocks(open_job(tmp_path, "video.mp4"), frames, [0, 1, 2])
    live = tmp_path / "job" / "live.mp4"
    whole = live.read_bytes()
    for damage in (whole[:-50], whole + b"half a fragment", None):
        live.unlink() if damage is None else live.write_bytes(damage)
        open_job(tmp_path, "video.mp4", done=done)
        assert live.read_bytes() == whole
    assert len(decode(live)[0]) == 10


def test_a_moved_job_folder_resumes(tmp_path, moving_square):
    done = write_blocks(open_job(tmp_path / "a", "video.mp4"), moving_square(NUM_FRAMES), [0, 1])
    (tmp_path / "a").rename(tmp_path / "b")
    sink = open_job(tmp_path / "b", "video.mp4", done=done)
    write_blocks(sink, moving_square(NUM_FRAMES), [2, 3])
    with av.open(sink.finish()) as container:
        assert container.streams.video[0].frames == NUM_FRAMES


WRITER = """
import itertools, sys
from fractions import Fraction
from pathlib import Path
import numpy as np
from vidgen.media.sink import open_sink
job = Path(sys.argv[1])
sink = open_sink(job / "video.mp4", job, 64, 48, Fraction(16), {})
noise = np.random.default_rng(0).integers(0, 255, (6, 48, 64, 3), dtype=np.uint8)
for block in itertools.count():
    record = sink.write(noise, first_frame=6 * block, block=block)
    print(record.first_frame + record.num_frames, flush=True)
"""


def test_live_file_plays_after_kill(tmp_path, decode):
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True, env=environment
    ) as writer:
        assert writer.stdout is not None
        committed = [int(writer.stdout.readline()) for _ in range(5)]
        writer.send_signal(signal.SIGKILL)
        committed += [int(line) for line in writer.stdout if line.endswith("\n")]
    assert writer.returncode == -signal.SIGKILL
    times, _ = decode(tmp_path / "live.mp4")
    assert len(times) >= committed[-1] >= 30
    assert times == [index / FPS for index in range(len(times))]


class Killed(Exception):
    """Stands for a SIGKILL at a chosen place."""


def test_live_file_plays_if_killed_anywhere_inside_a_write(tmp_path, moving_square, decode, monkeypatch):
    frames = moving_square(NUM_FRAMES)
    sink = open_job(tmp_path, "video.mp4")
    write_blocks(sink, frames, [0, 1, 2])
    live = tmp_path / "job" / "live.mp4"
    committed = live.read_bytes()
    sync = os.fsync

    def killed_before_the_header(descriptor: int) -> None:
        if os.fstat(descriptor).st_ino == live.stat().st_ino:
            raise Killed
        sync(descriptor)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr("os.fsync", killed_before_the_header)
        write_blocks(sink, frames, [3])
    body = live.read_bytes()
    assert body.startswith(committed)
    num_bytes = len(body) - len(committed)
    assert num_bytes == (tmp_path / "job" / "segments" / "000003.m4s").stat().st_size
    for num_kept in (1, 7, 9, 40, 100, 130, num_bytes // 2, num_bytes - 1, num_bytes):
        live.write_bytes(body[: len(committed) + num_kept])
        assert len(decode(live)[0]) == 10


def test_metadata_survives_in_every_file(tmp_path, moving_square):
    outputs = {}
    for name in KINDS:
        sink = open_job(tmp_path / name.strip("/"), name)
        write_blocks(sink, moving_square(NUM_FRAMES), [0])
        outputs[name] = sink.finish()
    with av.open(outputs["video.mp4"]) as container:
        assert {key: container.metadata[key] for key in METADATA} == METADATA
    with Image.open(outputs["pictures/"] / "frame_000004.png") as picture:
        assert {key: picture.info[key] for key in METADATA} == METADATA
    with Image.open(outputs["video.gif"]) as picture:
        assert b'"title": "square"' in picture.info["comment"]
    with Image.open(outputs["video.webp"]) as picture:
        assert '"title": "square"' in picture.getexif()[0x010E]


def test_output_name_chooses_the_sink(tmp_path):
    (tmp_path / "there.v2").mkdir()
    expected = {
        "a.mp4": Mp4Sink,
        "A.MP4": Mp4Sink,
        "a.gif": AnimationSink,
        "a.webp": AnimationSink,
        "frames": ImageSink,
        "v1.5/": ImageSink,
        "there.v2": ImageSink,
    }
    for name, kind in expected.items():
        sink = open_sink(f"{tmp_path}/{name}", tmp_path / "job", 64, 48, FPS, {})
        assert type(sink) is kind, name
    for name in ("a.avi", "a.png", "b.v2"):
        with pytest.raises(ValueError, match=r"is not known; end in \.mp4, \.gif, \.webp or /"):
            open_sink(tmp_path / name, tmp_path / "job", 64, 48, FPS, {})


@pytest.mark.parametrize("factor", [1, 2, 5])
def test_upscale_is_nearest(factor):
    frames = np.random.default_rng(1).integers(0, 255, (2, 3, 4, 3), dtype=np.uint8)
    large = upscale(frames, factor)
    assert large.shape == (2, 3 * factor, 4 * factor, 3)
    for dy in range(factor):
        for dx in range(factor):
            assert np.array_equal(large[:, dy::factor, dx::factor], frames)


def test_upscale_refuses_a_factor_below_one():
    with pytest.raises(ValueError, match="factor=0"):
        upscale(np.zeros((1, 2, 2, 3), np.uint8), 0)
