"""Laws of reading: any order, both backends, every kind of MP4, one clear line when it cannot be."""

import struct
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from av.stream import Disposition

from vidgen.media.segments import SegmentEncoder, append_segment
from vidgen.media.source import Backend, VideoSource

BACKENDS: list[Backend] = ["decord", "av"]
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


def write_as(
    path: Path,
    frames: np.ndarray,
    *,
    degrees: int = 0,
    mirrored: bool = False,
    matrix: tuple[int, ...] | None = None,
    pixel_aspect: Fraction | None = None,
    times_ms: Sequence[int] | None = None,
    whole_header_first: bool = False,
) -> None:
    """A file as phones and editors write them, by its suffix; `degrees` counter-clockwise, then mirrored."""
    options = {"movflags": "faststart"} if whole_header_first else {}
    with av.open(path, "w", options=options) as container:
        stream = container.add_stream("libx264", rate=10, options={"g": "6", "bf": "2", "crf": "8"})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        if times_ms:
            stream.codec_context.time_base = stream.time_base = Fraction(1, 1000)
        if pixel_aspect:
            stream.codec_context.sample_aspect_ratio = pixel_aspect
        if matrix:
            stream.set_display_matrix(matrix)
        elif degrees or mirrored:
            stream.set_display_rotation(degrees, hflip=mirrored)
        for index, picture in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            if times_ms:
                frame.pts, frame.time_base = times_ms[index], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def cut_by_edit_list(path: Path, *, skipped_frames: int, shown_ms: int) -> None:
    """Trims the MP4 as an editor on a phone does: the file stays, its edit list names what is shown."""
    data = bytearray(path.read_bytes())
    place = data.index(b"elst")
    duration, start = struct.unpack_from(">Ii", data, place + 12)
    assert duration > shown_ms
    struct.pack_into(">Ii", data, place + 12, shown_ms, start + skipped_frames * 1024)
    path.write_bytes(data)


def all_pictures(path: Path, backend: Backend) -> np.ndarray:
    with VideoSource(path, backend=backend) as source:
        pictures = source.frames(range(source.num_frames))
        assert pictures.shape[1:3] == (source.height, source.width)
    return pictures


@pytest.mark.parametrize("mirrored", [False, True], ids=["", "mirrored"])
@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv"])
def test_pictures_stand_upright_however_the_phone_was_held(
    tmp_path, moving_square, differ, suffix, degrees, mirrored
):
    stored = moving_square(7, height=128, width=160)
    write_as(tmp_path / f"video{suffix}", stored, degrees=degrees, mirrored=mirrored)
    upright = np.rot90(stored, degrees // 90, axes=(1, 2))
    upright = upright[:, :, ::-1] if mirrored else upright
    by_decord, by_av = (all_pictures(tmp_path / f"video{suffix}", backend) for backend in BACKENDS)
    assert differ(by_av, upright) < 2.5
    assert np.array_equal(by_decord, by_av)


def test_a_video_to_be_shown_askew_is_one_clear_line(tmp_path, moving_square):
    write_as(tmp_path / "askew.mp4", moving_square(3), degrees=30)
    with pytest.raises(ValueError, match=r"^\S*askew\.mp4: is to be shown askew; convert it"):
        VideoSource(tmp_path / "askew.mp4")


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_frames_have_their_own_times_where_the_rate_varies(tmp_path, moving_square, suffix):
    times_ms = [3000 + ms for ms in (0, 100, 150, 700, 720, 800, 1500, 1600, 1650, 1700, 2400, 2500)]
    path = tmp_path / f"vary{suffix}"
    write_as(path, moving_square(12), times_ms=times_ms)
    for backend in BACKENDS:
        with VideoSource(path, backend=backend) as source:
            assert source.times_s == pytest.approx([(ms - 3000) / 1000 for ms in times_ms], abs=1e-6)
    by_decord, by_av = (all_pictures(path, backend) for backend in BACKENDS)
    assert np.array_equal(by_decord, by_av)


@pytest.mark.parametrize("backend", BACKENDS)
def test_times_of_a_constant_rate_are_index_over_rate(video, backend):
    with VideoSource(video, backend=backend) as source:
        expected = [float(index / FPS) for index in range(NUM_FRAMES)]
        assert source.times_s == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(("degrees", "expected"), [(0, Fraction(4, 3)), (90, Fraction(3, 4))])
@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_the_shape_of_pixels_is_that_of_the_upright_picture(
    tmp_path, moving_square, suffix, degrees, expected
):
    path = tmp_path / f"wide{suffix}"
    write_as(path, moving_square(12, 128, 160), degrees=degrees, pixel_aspect=Fraction(4, 3))
    for backend in BACKENDS:
        with VideoSource(path, backend=backend) as source:
            # Matroska keeps a width in whole pixels
            assert float(source.pixel_aspect) == pytest.approx(float(expected), rel=0.5 / 213)


def test_square_pixels_are_those_of_files_that_do_not_say(video):
    with VideoSource(video) as source:
        assert source.pixel_aspect == 1


@pytest.mark.parametrize(("skipped", "shown_ms"), [(3, 2100), (0, 1000), (3, 1000)])
def test_a_trimmed_video_shows_what_its_editor_left(tmp_path, moving_square, differ, skipped, shown_ms):
    path, frames = tmp_path / "trimmed.mp4", moving_square(24)
    write_as(path, frames)
    cut_by_edit_list(path, skipped_frames=skipped, shown_ms=shown_ms)
    shown = frames[skipped : skipped + shown_ms // 100]
    assert differ(all_pictures(path, "av"), shown) < 2.5
    assert differ(all_pictures(path, "auto"), shown) < 2.5
    with pytest.raises(ValueError, match="decord cannot read it rightly, it finds .* take backend='av'$"):
        VideoSource(path, backend="decord")


@pytest.mark.parametrize("suffix", [".ts", ".avi"])
def test_auto_takes_pyav_where_decord_gives_wrong_pictures_or_times(tmp_path, moving_square, differ, suffix):
    path, frames = tmp_path / f"video{suffix}", moving_square(12)
    write_as(path, frames)
    with VideoSource(path) as source:
        assert source.backend == "av"
        assert differ(source.frames([11, 0, 5, 6]), frames[[11, 0, 5, 6]]) < 2.5
    with pytest.raises(ValueError, match="decord cannot read it rightly"):
        VideoSource(path, backend="decord")


def test_narrow_turned_pictures_are_left_to_pyav(tmp_path, moving_square, differ):
    path, frames = tmp_path / "narrow.mp4", moving_square(5)  # 48 wide when upright
    write_as(path, frames, degrees=90)
    assert differ(all_pictures(path, "auto"), np.rot90(frames, axes=(1, 2))) < 2.5
    with pytest.raises(ValueError, match=r"shape \[64, 48, 4\]; take backend='av'$"):
        VideoSource(path, backend="decord")


@pytest.mark.parametrize("backend", [*BACKENDS, "auto"])
@pytest.mark.parametrize("part", [0.999, 0.6, 0.25])
def test_a_plain_mp4_that_is_cut_off_is_one_clear_line(tmp_path, moving_square, backend, part):
    path = tmp_path / "cut.mp4"
    write_as(path, moving_square(24), whole_header_first=True)
    data = path.read_bytes()
    path.write_bytes(data[: round(part * len(data))])
    with pytest.raises(ValueError, match=r"cut\.mp4: is cut off, \d+ of its 24 frames are there; copy it"):
        VideoSource(path, backend=backend)


def test_a_plain_mp4_that_is_cut_off_between_two_frames_is_seen_too(tmp_path: Path, moving_square):
    path = tmp_path / "cut.mp4"
    write_as(path, moving_square(24), whole_header_first=True)
    with av.open(path) as source:
        positions = [packet.pos for packet in source.demux(video=0) if packet.size]
    path.write_bytes(path.read_bytes()[: positions[10]])
    with pytest.raises(ValueError, match="is cut off, 10 of its 24 frames are there"):
        VideoSource(path)


def write_with_a_hole(path: Path, frames: np.ndarray) -> None:
    write_as(path, frames, whole_header_first=True)
    data = bytearray(path.read_bytes())
    middle = (data.index(b"mdat") + len(data)) // 2
    data[middle : middle + 900] = bytes(900)
    path.write_bytes(data)


@pytest.mark.parametrize("backend", [*BACKENDS, "auto"])
def test_damage_inside_is_one_clear_line(tmp_path, moving_square, backend):
    write_with_a_hole(tmp_path / "hole.mp4", moving_square(24))
    with pytest.raises(ValueError, match=r"^\S*hole\.mp4: .*damaged.*") as error:
        # decord decodes ahead, and may fail as soon as the file is opened
        with VideoSource(tmp_path / "hole.mp4", backend=backend) as source:
            source.frames(range(24))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("backend", ["av", "auto"])
def test_frames_before_and_after_damage_can_be_read(tmp_path, moving_square, differ, backend):
    frames = moving_square(24)
    write_with_a_hole(tmp_path / "hole.mp4", frames)
    with VideoSource(tmp_path / "hole.mp4", backend=backend) as source:
        for _ in range(2):
            assert differ(source.frames([0, 1, 5, 23]), frames[[0, 1, 5, 23]]) < 2.5
            with pytest.raises(ValueError, match=r"frame \d+ is damaged; re-encode the file$"):
                source.frames(range(24))


def test_the_cover_of_a_song_is_no_video(tmp_path, moving_square):
    song = tmp_path / "song.mp3"
    with av.open(song, "w") as container:
        stream = container.add_stream("libmp3lame", rate=16000, layout="mono")
        cover = container.add_stream("mjpeg", rate=1)
        cover.height, cover.width = 48, 64
        cover.pix_fmt = "yuvj420p"
        cover.disposition = Disposition.attached_pic
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.rate = 16000
        packets = [*stream.encode(frame), *stream.encode()]
        packets += cover.encode(av.VideoFrame.from_ndarray(moving_square(1)[0], format="rgb24"))
        for packet in [*packets, *cover.encode()]:
            container.mux(packet)
    with av.open(song) as container:
        assert len(container.streams.video) == 1
    with pytest.raises(ValueError, match="it has audio and video streams only"):
        VideoSource(song)


@pytest.mark.parametrize("suffix", [".mkv", ".ts", ".avi"])
def test_other_files_that_are_cut_off_give_what_is_there(tmp_path, moving_square, differ, suffix):
    path, frames = tmp_path / f"cut{suffix}", moving_square(24)
    write_as(path, frames)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 2 // 3])
    with VideoSource(path) as source:
        assert 5 <= source.num_frames < 24
        whole = range(source.num_frames - 3)  # the last may be half a frame
        assert differ(source.frames(whole), frames[: len(whole)]) < 2.5
