"""Laws of reading: any order, both backends, every kind of MP4, one clear line when it cannot be."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from vidgen.media.segments import SegmentEncoder, append_segment
from vidgen.media.source import VideoSource

BACKENDS = ["decord", "av"]
FPS = Fraction(24000, 1001)
NUM_FRAMES = 23


def write_plain(path: Path, frames: np.ndarray) -> None:
    """An MP4 with B-frames and a keyframe every 6 frames, as other programs write them."""
    with av.open(path, "w") as container:
        stream = container.add_stream("libx264", rate=FPS, options={"g": "6", "bf": "2", "crf": "12"})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for picture in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


def write_fragmented(path: Path, frames: np.ndarray) -> None:
    encoder = SegmentEncoder(frames.shape[2], frames.shape[1], FPS, crf=12, preset="veryfast")
    path.write_bytes(encoder.init_segment())
    for block, first in enumerate(range(0, len(frames), 6)):
        part = frames[first : first + 6]
        append_segment(path, encoder.encode(part, first_frame=first, sequence=block + 1))


@pytest.fixture(params=[write_plain, write_fragmented], ids=["plain", "fragmented"])
def video(request, tmp_path, moving_square) -> Path:
    path = tmp_path / "video.mp4"
    request.param(path, moving_square(NUM_FRAMES))
    return path


@pytest.mark.parametrize("backend", BACKENDS)
def test_source_knows_what_it_holds(video, backend):
    with VideoSource(video, backend=backend) as source:
        assert (source.num_frames, len(source)) == (NUM_FRAMES, NUM_FRAMES)
        assert (source.fps, source.width, source.height) == (FPS, 64, 48)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "indices",
    [[0], [NUM_FRAMES - 1], [17, 3, 3, 22, 0, 8, 9, 7], list(range(NUM_FRAMES))[::-1], [5, 6, 11, 12]],
    ids=["first", "last", "mixed", "backwards", "around keyframes"],
)
def test_frames_come_in_the_order_asked_for(video, moving_square, differ, backend, indices):
    with VideoSource(video, backend=backend) as source:
        found = source.frames(indices)
        assert differ(found, moving_square(NUM_FRAMES)[indices]) < 2.5
        assert np.array_equal(source.frames(indices[::-1]), found[::-1])  # and again, after seeking about


@pytest.mark.parametrize("backend", BACKENDS)
def test_iteration_gives_every_frame_once_and_may_be_repeated(video, backend):
    with VideoSource(video, backend=backend) as source:
        in_order = np.stack(list(source))
        assert np.array_equal(in_order, source.frames(range(NUM_FRAMES)))
        assert np.array_equal(in_order, np.stack(list(source)))


def test_backends_show_the_same_pictures(video):
    with VideoSource(video, backend="decord") as one, VideoSource(video, backend="av") as other:
        a, b = (source.frames(range(NUM_FRAMES)).astype(int) for source in (one, other))
    # the decoded planes are equal; swscale of two FFmpeg releases rounds them to RGB differently
    assert np.abs(a - b).max() <= 2
    assert np.abs(a - b).mean() < 0.5


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_indices_are_no_frames(video, backend):
    with VideoSource(video, backend=backend) as source:
        assert source.frames([]).shape == (0, 48, 64, 3)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("index", [NUM_FRAMES, -1, 10**6])
def test_index_out_of_range_is_one_clear_line(video, backend, index):
    with VideoSource(video, backend=backend) as source:
        with pytest.raises(IndexError, match=rf"^frame {index} of .*has 23, give 0 to 22$"):
            source.frames([0, index])
        assert len(source.frames([0])) == 1


@pytest.mark.parametrize("backend", [*BACKENDS, "auto"])
def test_what_is_no_video_is_one_clear_line(tmp_path, backend):
    with pytest.raises(FileNotFoundError, match="no such video file$"):
        VideoSource(tmp_path / "missing.mp4", backend=backend)
    with pytest.raises(FileNotFoundError, match="no such video file$"):
        VideoSource(tmp_path, backend=backend)
    sound = tmp_path / "sound.mp4"
    with av.open(sound, "w") as container:
        stream = container.add_stream("aac", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    (tmp_path / "text.mp4").write_text("not a video")
    (tmp_path / "empty.mp4").write_bytes(b"")
    header = SegmentEncoder(64, 48, FPS).init_segment()
    (tmp_path / "header.mp4").write_bytes(header)
    for name in ("text.mp4", "empty.mp4", "sound.mp4", "header.mp4"):
        with pytest.raises(
            ValueError, match=rf"{name}: .* finds no video in it; give a video file"
        ) as caught:
            VideoSource(tmp_path / name, backend=backend)
        assert "\n" not in str(caught.value)


def test_auto_is_decord_where_installed_and_pyav_otherwise(video, monkeypatch):
    with VideoSource(video) as source:
        assert source.backend == "decord"
    monkeypatch.setattr("vidgen.media.source.find_spec", lambda name: None)
    with VideoSource(video) as source:
        assert source.backend == "av"
    with pytest.raises(ValueError, match="choose auto, decord or av"):
        VideoSource(video, backend="opencv")  # pyright: ignore[reportArgumentType]


def test_a_file_cut_inside_a_fragment_gives_what_is_whole(tmp_path, moving_square, differ):
    path = tmp_path / "cut.mp4"
    write_fragmented(path, moving_square(18))
    path.write_bytes(path.read_bytes()[:-100])
    with VideoSource(path, backend="av") as source:
        assert 12 <= source.num_frames < 18
        assert differ(source.frames(range(source.num_frames)), moving_square(source.num_frames)) < 2.5
