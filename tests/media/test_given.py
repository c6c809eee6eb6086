"""Laws of pictures to begin with: upright, undistorted, at the size and rate asked for, or one clear line."""

import io
import struct
import warnings
import zlib
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from vidgen.media.given import fit_picture, read_clip, read_image, resampled

RATE = 24


def scene(height: int, width: int) -> np.ndarray:
    """uint8 [H, W, 3], smooth and different in every corner."""
    rows, columns = np.mgrid[0:height, 0:width]
    planes = [255 * rows / height, 255 * columns / width, 255 * (rows + columns) / (height + width)]
    return np.stack(planes, axis=-1).astype(np.uint8)


def save(path: Path, picture: np.ndarray, **options: object) -> Path:
    Image.fromarray(picture).save(path, **options)  # pyright: ignore[reportArgumentType]
    return path


def png_header(width: int, height: int) -> bytes:
    """A PNG of any size and no data."""
    fields = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [struct.pack(">I", 13) + fields + struct.pack(">I", zlib.crc32(fields))]
    chunks.append(bytes(4) + b"IEND" + struct.pack(">I", zlib.crc32(b"IEND")))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def write_numbered(path: Path, num_frames: int, times_s: list[float] | None = None) -> Path:
    """A video of grey frames, 8 times their index bright; at RATE unless it says when."""
    with av.open(path, "w") as container:
        stream = container.add_stream("libx264", rate=RATE, options={"g": "12", "crf": "4"})
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        if times_s:
            stream.codec_context.time_base = stream.time_base = Fraction(1, 1000)
        for index in range(num_frames):
            picture = np.full((64, 96, 3), 8 * index, np.uint8)
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            if times_s:
                frame.pts, frame.time_base = round(1000 * times_s[index]), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def numbers(clip: np.ndarray) -> list[int]:
    return [round(float(frame.mean()) / 8) for frame in clip]


def test_an_image_of_the_wanted_size_stays_bit_for_bit(tmp_path):
    picture = scene(48, 64)
    assert np.array_equal(read_image(save(tmp_path / "a.png", picture), 64, 48), picture)
    assert np.array_equal(fit_picture(picture, 64, 48), picture)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("height", "width"), [(97, 130), (24, 32), (48, 64)])
def test_an_image_of_the_wanted_shape_is_what_diffusers_makes_of_it(tmp_path, height, width):
    path = save(tmp_path / "a.png", scene(height, width))
    with Image.open(path) as image:
        expected = np.asarray(image.convert("RGB").resize((64, 48), Image.Resampling.LANCZOS))
    difference = np.abs(read_image(path, 64, 48).astype(int) - expected)
    # 130x97 is half a pixel off the shape
    assert difference.max() <= (1 if height == 97 else 0)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_stand_upright_however_the_camera_was_held(tmp_path, orientation):
    upright = scene(60, 80)
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: np.rot90(upright.transpose(1, 0, 2), 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(tmp_path / "photo.png", np.ascontiguousarray(stored), exif=exif)
    assert np.array_equal(read_image(path, 80, 60), upright)


@pytest.mark.parametrize(("width", "height"), [(40, 80), (80, 40), (37, 91)])
def test_the_middle_is_kept_and_nothing_is_distorted(tmp_path, width, height):
    picture = np.zeros((100, 140, 3), np.uint8)
    rows, columns = np.mgrid[0:100, 0:140]
    picture[np.hypot(rows - 49.5, columns - 69.5) < 30] = 255  # a disc in the middle
    with pytest.warns(UserWarning, match="is cut to the shape of"):
        fitted = read_image(save(tmp_path / "a.png", picture), width, height)
    seen_rows, seen_columns = np.nonzero(fitted[:, :, 0] > 127)
    scale = max(width / 140, height / 100)
    expected = [min(60 * scale, side) for side in (height, width)]
    assert [len(set(seen_rows)), len(set(seen_columns))] == pytest.approx(expected, abs=2)
    assert seen_rows.mean() == pytest.approx((height - 1) / 2, abs=0.5)
    assert seen_columns.mean() == pytest.approx((width - 1) / 2, abs=0.5)


def test_a_loss_of_more_than_a_twentieth_is_one_warning_line(tmp_path):
    path = save(tmp_path / "a.png", scene(100, 100))
    with pytest.warns(UserWarning) as caught:
        read_image(path, 100, 50)
        read_image(path, 94, 100)
    lines = [str(warning.message) for warning in caught]
    assert lines == [
        f"{path}: 100x100 is cut to the shape of 100x50, 50% of its height is lost",
        f"{path}: 100x100 is cut to the shape of 94x100, 6% of its width is lost",
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_image(path, 96, 100)
        read_image(path, 100, 96)


def test_every_kind_of_picture_becomes_rgb_and_transparency_is_ignored(tmp_path):
    picture = scene(32, 48)
    see_through = np.dstack([picture, np.zeros((32, 48), np.uint8)])
    assert np.array_equal(read_image(save(tmp_path / "alpha.png", see_through), 48, 32), picture)
    grey = picture[:, :, 0]
    expected = np.repeat(grey[:, :, None], 3, axis=2)
    assert np.array_equal(read_image(save(tmp_path / "grey.png", grey), 48, 32), expected)
    deep = save(tmp_path / "deep.png", grey.astype(np.uint16) * 257)
    assert np.array_equal(read_image(deep, 48, 32), expected)
    path = tmp_path / "palette.png"
    Image.fromarray(picture).quantize(16).save(path, transparency=bytes(range(16)))
    with Image.open(path) as image:
        assert image.mode == "P"
    assert read_image(path, 48, 32).shape == (32, 48, 3)
    first, second = Image.fromarray(picture), Image.fromarray(255 - picture)
    first.save(tmp_path / "moving.webp", save_all=True, append_images=[second], lossless=True)
    assert np.array_equal(read_image(tmp_path / "moving.webp", 48, 32), picture)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".gif", ".bmp", ".tif"])
@pytest.mark.parametrize("part", [0.02, 0.5, 0.9])
def test_a_damaged_image_is_one_clear_line(tmp_path, suffix, part):
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    image_format = {".jpg": "JPEG", ".tif": "TIFF"}.get(suffix, suffix[1:].upper())
    Image.fromarray(noise).save(buffer, image_format)
    path = tmp_path / f"cut{suffix}"
    path.write_bytes(buffer.getvalue()[: round(part * len(buffer.getvalue()))])
    with pytest.raises(ValueError, match=r"^\S*cut\.\w+: is (damaged|not an image)") as error:
        read_image(path, 64, 64)
    assert "\n" not in str(error.value)


def test_what_is_no_image_is_one_clear_line(tmp_path):
    (tmp_path / "text.png").write_text("not an image")
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "large.png").write_bytes(png_header(20_000, 20_000))
    (tmp_path / "flat.png").write_bytes(png_header(0, 5))
    expected = {
        "missing.png": "no such image file; check the name$",
        ".": "no such image file; check the name$",
        "text.png": "is not an image that Pillow reads; give PNG, JPEG or WebP$",
        "empty.png": "the file is empty; give an image such as PNG or JPEG$",
        "large.png": r"has more than 1\d\d million pixels; scale it down first$",
        "flat.png": "is (damaged|not an image)",
    }
    for name, cause in expected.items():
        with pytest.raises(ValueError, match=f": {cause}") as error:
            read_image(tmp_path / name, 64, 64)
        assert "\n" not in str(error.value)
    save(tmp_path / "good.png", scene(8, 8))
    with pytest.raises(ValueError, match="width=0, height=8: need 1 or more"):
        read_image(tmp_path / "good.png", 0, 8)
    with pytest.raises(ValueError, match=r"picture=float64\[8, 8, 3\]: need uint8"):
        fit_picture(np.zeros((8, 8, 3)), 8, 8)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"picture=uint8\[8, 0, 3\]: need uint8"):
        fit_picture(np.zeros((8, 0, 3), np.uint8), 8, 8)


@pytest.mark.parametrize("backend", ["decord", "av", "auto"])
@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_a_clip_is_the_last_frames_of_a_video_of_the_same_rate(tmp_path, suffix, backend):
    path = write_numbered(tmp_path / f"a{suffix}", 30)
    clip = read_clip(path, 48, 32, 7, Fraction(RATE), backend)
    assert (clip.shape, clip.dtype) == ((7, 32, 48, 3), np.uint8)
    assert numbers(clip) == list(range(23, 30))
    assert numbers(read_clip(path, 48, 32, 30, RATE, backend)) == list(range(30))


@pytest.mark.parametrize(
    ("fps", "expected"),
    [
        (12, [21, 23, 25, 27, 29]),
        (8, [17, 20, 23, 26, 29]),
        (6, [13, 17, 21, 25, 29]),
        (48, [27, 27, 28, 28, 29]),
        (16, [23, 24, 26, 27, 29]),
    ],
)
@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_another_rate_takes_the_frames_on_the_screen_at_its_times(tmp_path, suffix, fps, expected):
    path = write_numbered(tmp_path / f"a{suffix}", 30)  # Matroska's times are rounded to 1/1000 s
    assert numbers(read_clip(path, 48, 32, 5, fps)) == expected


def test_a_varying_rate_becomes_constant(tmp_path):
    times_s = [0, 0.1, 0.2, 0.3, 0.7, 0.8, 0.9, 1.5, 1.6]
    path = write_numbered(tmp_path / "vary.mp4", 9, times_s)
    expected = [3, 3, 3, 4, 5, 6, 6, 6, 6, 6, 6, 7, 8]
    for backend in ("decord", "av"):
        assert numbers(read_clip(path, 48, 32, 13, 10, backend)) == expected
    assert resampled(times_s, 17, 10) == [0, 1, 2, 3, *expected]


@pytest.mark.parametrize("rate", [10, 15, 16, 23.976, 24, 25, 29.97, 30, 48, 50, 60, 120])
@pytest.mark.parametrize("fps", [8, 12, 15, 16, 24, 30])
def test_rounded_time_stamps_choose_as_exact_ones(rate, fps):
    exact = [index / rate for index in range(1000)]
    rounded = [round(time_s, 3) for time_s in exact]  # as Matroska does
    num_frames = int(exact[-1] * fps)
    chosen = resampled(exact, num_frames, fps)
    differing = sum(a != b for a, b in zip(chosen, resampled(rounded, num_frames, fps), strict=True))
    # broadcast rates drift slowly through every phase
    assert differing <= (num_frames // 30 if rate % 1 else 0)


@pytest.mark.parametrize("rate", [10, 16, 23.976, 30, 60])
@pytest.mark.parametrize("fps", [8, 16, 24, 30])
def test_no_chosen_frame_is_older_than_one_interval_or_ahead_by_more_than_a_third_of_one(rate, fps):
    times_s = [index / rate for index in range(500)]
    num_frames = int(times_s[-1] * fps)
    shown_s = np.array(times_s)[resampled(times_s, num_frames, fps)]
    wanted_s = times_s[-1] - np.arange(num_frames)[::-1] / fps
    assert (shown_s - wanted_s).max() <= 0.35 / max(rate, fps) + 1e-9
    assert (wanted_s - shown_s).max() < 1 / rate


@pytest.mark.parametrize("seed", range(5))
def test_trembling_time_stamps_of_the_wanted_rate_lose_no_frame(seed):
    tremble_s = np.random.default_rng(seed).uniform(-5e-3, 5e-3, 200)
    times_s = (np.arange(200) / 30 + tremble_s).tolist()
    assert resampled(times_s, 150, 30) == list(range(50, 200))


def test_pixels_that_are_not_square_are_stretched(tmp_path):
    path = tmp_path / "wide.mp4"
    picture = np.zeros((96, 96, 3), np.uint8)
    rows, columns = np.mgrid[0:96, 0:96]
    picture[np.hypot(rows - 47.5, 2 * (columns - 47.5)) < 30] = 255  # a disc when shown 2:1
    with av.open(path, "w") as container:
        stream = container.add_stream("libx264", rate=RATE, options={"crf": "4"})
        stream.width, stream.height, stream.pix_fmt = 96, 96, "yuv420p"
        stream.codec_context.sample_aspect_ratio = Fraction(2)
        for _ in range(3):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        clip = read_clip(path, 192, 96, 2, RATE)
    rows, columns = np.nonzero(clip[0, :, :, 0] > 127)
    assert [len(set(rows)), len(set(columns))] == pytest.approx([60, 60], abs=2)
    with pytest.warns(UserWarning, match="192x96 is cut to the shape of 96x96, 50% of its width") as caught:
        read_clip(path, 96, 96, 2, RATE)
    assert len(caught) == 1  # not one a frame


def test_a_clip_that_cannot_be_used_is_one_clear_line(tmp_path):
    path = write_numbered(tmp_path / "short.mp4", 12)
    with pytest.raises(ValueError, match=r"short\.mp4: has only 12 frames at 24 a second, 13 are needed"):
        read_clip(path, 48, 32, 13, RATE)
    with pytest.raises(ValueError, match=r"short\.mp4: has only 6 frames at 12 a second, 7 are needed"):
        read_clip(path, 48, 32, 7, 12)
    with pytest.raises(ValueError, match="missing.mp4: no such video file; check the name$"):
        read_clip(tmp_path / "missing.mp4", 48, 32, 7, 12)
    with pytest.raises(ValueError, match="num_frames=0, fps=12: need at least 1 frame and a positive rate"):
        read_clip(path, 48, 32, 0, 12)
    with pytest.raises(ValueError, match="width=0, height=32: need 1 or more"):
        read_clip(path, 0, 32, 2, 12)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="the file is empty"):
        read_clip(path, 48, 32, 7, 12)
