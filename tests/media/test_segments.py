"""Laws of the segments: pure, complete in themselves, right in time, durable."""

import io
import struct
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from av.video.frame import PictureType

from vidgen.media.segments import SegmentEncoder, remux, write_atomically

RATES = [Fraction(16), Fraction(24000, 1001), Fraction(15, 2)]
LENGTHS = [4, 1, 7]  # blocks of one frame too


def encoder(fps: Fraction = RATES[0], **options: object) -> SegmentEncoder:
    return SegmentEncoder(64, 48, fps, preset="veryfast", **options)  # pyright: ignore[reportArgumentType]


def boxes(data: bytes) -> Iterator[tuple[str, bytes]]:
    """Top-level MP4 boxes: four-letter kind and content."""
    start = 0
    while start < len(data):
        size, kind = struct.unpack(">I4s", data[start : start + 8])
        yield kind.decode(), data[start + 8 : start + size]
        start += size
    assert start == len(data)


def encode_blocks(maker: SegmentEncoder, frames: np.ndarray, lengths: list[int]) -> list[bytes]:
    starts = np.cumsum([0, *lengths])
    return [
        maker.encode(frames[a:b], first_frame=int(a), sequence=block + 1)
        for block, (a, b) in enumerate(zip(starts, starts[1:], strict=False))
    ]


def write_job(folder: Path, frames: np.ndarray, fps: Fraction) -> tuple[Path, list[Path]]:
    maker = encoder(fps)
    init = folder / "init.mp4"
    init.write_bytes(maker.init_segment())
    paths = []
    for block, data in enumerate(encode_blocks(maker, frames, LENGTHS)):
        paths.append(folder / f"{block}.m4s")
        paths[-1].write_bytes(data)
    return init, paths


@pytest.mark.parametrize("fps", RATES, ids=str)
def test_pts_are_index_over_fps(tmp_path, moving_square, decode, differ, fps):
    frames = moving_square(12)
    init, paths = write_job(tmp_path, frames, fps)
    joined = tmp_path / "joined.mp4"
    joined.write_bytes(b"".join(path.read_bytes() for path in (init, *paths)))
    times, pictures = decode(joined)
    assert times == [index / fps for index in range(12)]
    # 8-bit 4:2:0 of coloured edges: the chroma of a square's rim is what is lost
    assert differ(pictures, frames) < 2.5


def test_segments_do_not_depend_on_what_was_encoded_before(moving_square):
    frames = moving_square(12)
    one_after_another = encode_blocks(encoder(), frames, LENGTHS)
    assert encoder().encode(frames[5:], first_frame=5, sequence=3) == one_after_another[2]
    busy = encoder()
    busy.encode(moving_square(9, start=50), first_frame=0, sequence=1)
    assert busy.encode(frames[4:5], first_frame=4, sequence=2) == one_after_another[1]


def test_init_segment_fits_every_encoder_of_the_same_settings(moving_square):
    used = encoder()
    used.encode(moving_square(2), first_frame=40, sequence=9)
    assert used.init_segment() == encoder().init_segment()


def test_a_segment_is_one_numbered_fragment_that_begins_with_its_only_keyframe(moving_square):
    maker = encoder()
    data = maker.encode(moving_square(6), first_frame=30, sequence=11)
    assert [kind for kind, _ in boxes(maker.init_segment())] == ["ftyp", "moov"]
    assert [kind for kind, _ in boxes(data)] == ["moof", "mdat"]
    (kind, number), *_ = boxes(dict(boxes(data))["moof"])
    assert (kind, struct.unpack(">II", number)[1]) == ("mfhd", 11)
    with av.open(io.BytesIO(maker.init_segment() + data), "r") as container:
        kinds = [int(frame.pict_type) for frame in container.decode(video=0)]
    assert kinds == [PictureType.I, *5 * [PictureType.P]]  # no B: they play as they come


def test_cuts_make_no_keyframes_inside_a_segment():
    noise = np.random.default_rng(0).integers(0, 255, (5, 48, 64, 3), dtype=np.uint8)
    maker = encoder()
    data = maker.init_segment() + maker.encode(noise, first_frame=0, sequence=1)
    with av.open(io.BytesIO(data), "r") as container:
        assert [frame.key_frame for frame in container.decode(video=0)] == [True] + 4 * [False]


def test_frames_may_be_a_view_with_odd_strides(moving_square):
    frames = moving_square(4)
    flipped = frames[::-1, :, ::-1]
    data = [encoder().encode(f, first_frame=0, sequence=1) for f in (flipped, flipped.copy())]
    assert data[0] == data[1]


@pytest.mark.parametrize(("width", "height", "name"), [(63, 48, "width=63"), (64, 47, "height=47")])
def test_odd_sizes_are_refused_in_one_line(width, height, name):
    with pytest.raises(ValueError, match=f"^{name}: .*even; try .*") as caught:
        SegmentEncoder(width, height, Fraction(16))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "frames",
    [
        np.zeros((2, 48, 64, 3), np.float32),
        np.zeros((2, 48, 62, 3), np.uint8),
        np.zeros((0, 48, 64, 3), np.uint8),
        np.zeros((48, 64, 3), np.uint8),
    ],
    ids=["float", "narrow", "none", "one picture"],
)
def test_frames_of_the_wrong_kind_are_refused(frames):
    with pytest.raises(ValueError, match="need uint8"):
        encoder().encode(frames, first_frame=0, sequence=1)


def test_remux_is_fast_start_and_keeps_every_packet(tmp_path, moving_square, decode):
    init, paths = write_job(tmp_path, moving_square(12), RATES[1])
    joined = tmp_path / "joined.mp4"
    joined.write_bytes(b"".join(path.read_bytes() for path in (init, *paths)))
    target = tmp_path / "out.mp4"
    remux(init, paths, target, {})
    kinds = [kind for kind, _ in boxes(target.read_bytes())]
    assert kinds.index("moov") < kinds.index("mdat")
    assert "moof" not in kinds
    times, pictures = decode(target)
    assert times == [index / RATES[1] for index in range(12)]
    assert np.array_equal(pictures, decode(joined)[1])
    with av.open(target) as container:
        stream = container.streams.video[0]
        assert (stream.frames, stream.average_rate) == (12, RATES[1])
        assert stream.duration and stream.time_base and stream.duration * stream.time_base == 12 / RATES[1]


def test_metadata_survives_remux(tmp_path, moving_square):
    init, paths = write_job(tmp_path, moving_square(12), RATES[0])
    job = '{"prompt": "' + 'a fox, ein Fuchs, 狐; \\" = # ' * 400 + '"}'
    metadata = {"title": "fox", "comment": job, "vidgen_seed": "42"}
    remux(init, paths, tmp_path / "out.mp4", metadata)
    with av.open(tmp_path / "out.mp4") as container:
        assert {key: container.metadata.get(key) for key in metadata} == metadata


def test_failed_remux_leaves_the_target_alone(tmp_path, moving_square):
    init, paths = write_job(tmp_path, moving_square(12), RATES[0])
    target = tmp_path / "out.mp4"
    target.write_bytes(b"earlier")
    paths[1].write_bytes(paths[1].read_bytes()[:-40])
    with pytest.raises(ValueError, match="1.m4s: damaged"):
        remux(init, paths, target, {})
    with pytest.raises(ValueError, match="2.m4s: pts .*, not .*; give all segments in order"):
        remux(init, [paths[0], paths[2]], target, {})
    assert target.read_bytes() == b"earlier"
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "0.m4s",
        "1.m4s",
        "2.m4s",
        "init.mp4",
        "out.mp4",
    ]
    with pytest.raises(ValueError, match="render at least one block"):
        remux(init, [], target, {})


def test_write_atomically_replaces_whole_files_and_leaves_no_others(tmp_path):
    target = tmp_path / "a.bin"
    (tmp_path / ".a.bin.tmp").write_bytes(b"left by a killed run, and longer")
    for data in (b"first", b"second"):
        write_atomically(target, data)
        assert target.read_bytes() == data
    assert list(tmp_path.iterdir()) == [target]
