"""Pictures that a render begins with: an image, or the last frames of a clip, at the render's size."""

# F frames, H height, W width; pictures are uint8 RGB

import struct
import warnings
from bisect import bisect_right
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from vidgen.media.source import Backend, VideoSource

if TYPE_CHECKING:
    from PIL.Image import Image

LARGEST_ASPECT_RATIO_ERROR = 1.05
# of a frame interval; of 0.3 to 0.47 the one where rounding stamps to 1/1000 s changes no choice between
# whole rates from 8 to 120, but for 16 to 25
EARLY_INTERVALS = 0.35
MAX_16_BIT = 65535
# what Pillow's decoders raise for damaged data
DAMAGE = (OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error)


def read_image(path: Path | str, width: int, height: int) -> NDArray[np.uint8]:
    """uint8 [height, width, 3] of an image file: upright, scaled to cover the size, its middle cut out.

    Transparency is ignored, as diffusers' load_image does; of an animation the first picture is taken. Warns
    when more than 5 % of a side is cut off. ValueError in one line for a file that is not a whole image.
    """
    return _fit(_load(Path(path)), width, height, Fraction(1), str(path))


def fit_picture(picture: NDArray[np.uint8], width: int, height: int) -> NDArray[np.uint8]:
    """uint8 [height, width, 3] of a picture in memory, uint8 [H, W, 3], scaled and cut as in `read_image`."""
    from PIL import Image

    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3 or not picture.size:
        raise ValueError(f"picture={picture.dtype}{list(picture.shape)}: need uint8[H >= 1, W >= 1, 3], RGB")
    return _fit(Image.fromarray(picture), width, height, Fraction(1), "the picture")


def read_clip(
    path: Path | str,
    width: int,
    height: int,
    num_frames: int,
    fps: Fraction | float,
    backend: Backend = "auto",
) -> NDArray[np.uint8]:
    """The last pictures of a video at a constant rate: uint8 [F, height, width, 3], sized as in `read_image`.

    The last is the file's last frame; the others go back from it in steps of 1/fps, each the frame that is on
    the screen at that time by the file's time stamps. ValueError in one line when the clip cannot be used.
    """
    from PIL import Image

    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such video file; check the name")
    if num_frames < 1 or fps <= 0:
        raise ValueError(f"num_frames={num_frames}, fps={fps}: need at least 1 frame and a positive rate")
    clip = np.empty((num_frames, height, width, 3), np.uint8)
    with VideoSource(path, backend=backend) as source:
        try:
            indices = resampled(source.times_s, num_frames, float(fps))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        # one by one: all of a large clip at its own size would not fit in memory
        for place, index in enumerate(indices):
            if place and index == indices[place - 1]:
                clip[place] = clip[place - 1]
                continue
            picture = Image.fromarray(source.frames([index])[0])
            clip[place] = _fit(picture, width, height, source.pixel_aspect, str(path) if not place else None)
    return clip


def resampled(times_s: Sequence[float], num_frames: int, fps: float) -> list[int]:
    """Which frames make `num_frames` at a constant rate, the last of them the last.

    A frame counts as on the screen 0.35 of an interval (the file's median or the output's, the shorter)
    before its time: time stamps are rounded, to 1/1000 s in Matroska, and those of phones tremble.
    """
    interval_s = 1 / fps
    if len(times_s) > 1:
        interval_s = min(interval_s, float(np.median(np.diff(times_s))))
    early_s = EARLY_INTERVALS * interval_s
    wanted_s = [times_s[-1] - back / fps for back in reversed(range(num_frames))]
    indices = [bisect_right(times_s, time_s + early_s) - 1 for time_s in wanted_s]
    if indices[0] < 0:
        enough = num_frames - sum(index < 0 for index in indices)
        raise ValueError(f"has only {enough} frames at {fps:g} a second, {num_frames} are needed; take fewer")
    return indices


def _load(path: Path) -> "Image":
    from PIL import Image, ImageOps, UnidentifiedImageError

    if not path.is_file():
        raise ValueError(f"{path}: no such image file; check the name")
    if not path.stat().st_size:
        raise ValueError(f"{path}: the file is empty; give an image such as PNG or JPEG")
    try:
        with warnings.catch_warnings():
            # from half of the size that is refused; cameras reach it
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(path)
    except Image.DecompressionBombError:
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0) // 10**6
        raise ValueError(f"{path}: has more than {limit} million pixels; scale it down first") from None
    except UnidentifiedImageError:
        raise ValueError(f"{path}: is not an image that Pillow reads; give PNG, JPEG or WebP") from None
    except DAMAGE as error:
        raise _damaged(path, error) from error
    with image:
        try:
            image.load()
            return _rgb(ImageOps.exif_transpose(image))
        except DAMAGE as error:
            raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> ValueError:
    cause = " ".join(str(error).split()) or type(error).__name__
    return ValueError(f"{path}: is damaged ({cause}); give a whole image")


def _rgb(image: "Image") -> "Image":
    from PIL import Image

    if image.mode.startswith("I"):  # grey of 16 bits, which `convert` would clip at 255
        grey = np.asarray(image).astype(np.float64).clip(0, MAX_16_BIT) * (255 / MAX_16_BIT)
        image = Image.fromarray(grey.round().astype(np.uint8))
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # Pillow warns on the short way
    return image.convert("RGB")


def _fit(
    image: "Image", width: int, height: int, pixel_aspect: Fraction, name: str | None
) -> NDArray[np.uint8]:
    """[height, width, 3] of the middle of a picture; `name` is for the warning, None for none."""
    from PIL.Image import Resampling

    if width < 1 or height < 1:
        raise ValueError(f"width={width}, height={height}: need 1 or more")
    shown_width = image.width * pixel_aspect
    ratio = Fraction(width, height) / (shown_width / image.height)  # above 1: top and bottom are cut off
    if name and not 1 / LARGEST_ASPECT_RATIO_ERROR <= ratio <= LARGEST_ASPECT_RATIO_ERROR:
        cut = 1 - min(ratio, 1 / ratio)
        side = "height" if ratio > 1 else "width"
        shapes = f"{round(shown_width)}x{image.height} is cut to the shape of {width}x{height}"
        warnings.warn(f"{name}: {shapes}, {float(cut):.0%} of its {side} is lost", stacklevel=3)
    kept = (image.width * min(1, ratio), image.height / max(1, ratio))
    left, top = (image.width - kept[0]) / 2, (image.height - kept[1]) / 2
    box = (float(left), float(top), float(left + kept[0]), float(top + kept[1]))
    # Lanczos, as diffusers' image processor: equal to it where nothing is cut off
    return np.asarray(image.resize((width, height), Resampling.LANCZOS, box=box))
