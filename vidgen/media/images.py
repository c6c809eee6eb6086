"""Sinks that keep pictures: a PNG sequence, and the small animations (GIF, WebP) made from one."""

# F frames, H height, W width; pictures are uint8 RGB

import hashlib
import io
import json
import re
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin

from vidgen.media.blocks import Blocks, WrittenBlock, check_unchanged
from vidgen.media.segments import check_frames, replacing, write_atomically

EXIF_IMAGE_DESCRIPTION = 0x010E


class ImageSink:
    """PNG pictures frame_000000.png and on in a folder that is this render's alone.

    `finish` removes higher numbers that a longer render left there.
    """

    def __init__(
        self,
        output: Path,
        width: int,
        height: int,
        metadata: Mapping[str, str],
        *,
        done: Sequence[WrittenBlock] = (),
    ) -> None:
        self.output = output
        self._width = width
        self._height = height
        self._tags = PngImagePlugin.PngInfo()
        for key, value in metadata.items():
            self._tags.add_itxt(key, value)
        self._blocks = Blocks(done)
        for record in self._blocks.written:
            indices = range(record.first_frame, record.first_frame + record.num_frames)
            data = b"".join(self.picture(index).read_bytes() for index in indices)
            check_unchanged(self.picture(record.first_frame), data, record.sha256)
        output.mkdir(parents=True, exist_ok=True)

    def write(self, frames: NDArray[np.uint8], *, first_frame: int, block: int) -> WrittenBlock:
        self._blocks.expect(block, first_frame)
        check_frames(frames, self._width, self._height)
        digest = hashlib.sha256()
        for index, frame in enumerate(frames, first_frame):
            buffer = io.BytesIO()
            Image.fromarray(frame).save(buffer, "PNG", pnginfo=self._tags)
            write_atomically(self.picture(index), buffer.getvalue())
            digest.update(buffer.getvalue())
        return self._blocks.add(
            block, first_frame, len(frames), self.picture(first_frame), digest.hexdigest()
        )

    def finish(self) -> Path:
        if not self._blocks.written:
            raise ValueError(f"{self.output}: no frames to finish with; render at least one block")
        for path in self.output.iterdir():
            match = re.fullmatch(r"frame_(\d{6,})\.png", path.name)
            if match and int(match[1]) >= self.num_frames:
                path.unlink()
        return self.output

    @property
    def num_frames(self) -> int:
        return self._blocks.num_frames

    def picture(self, index: int) -> Path:
        return self.output / f"frame_{index:06d}.png"


class AnimationSink:
    """A GIF or WebP that loops for ever, made at the end from a PNG sequence in FOLDER/frames.

    For small videos: the writers hold every frame in memory. Runs of equal frames may become one frame of
    their total duration.
    """

    def __init__(
        self,
        output: Path,
        folder: Path,
        width: int,
        height: int,
        fps: Fraction,
        metadata: Mapping[str, str],
        *,
        done: Sequence[WrittenBlock] = (),
    ) -> None:
        # browsers play a delay under 2/100 s as 10/100 s
        if output.suffix.lower() == ".gif" and fps > 50:
            raise ValueError(f"fps={fps}: GIF allows at most 50; write .webp or .mp4, or lower the rate")
        self.output = output
        self._fps = Fraction(fps)
        self._comment = json.dumps(dict(metadata))
        self._pictures = ImageSink(folder / "frames", width, height, {}, done=done)

    def write(self, frames: NDArray[np.uint8], *, first_frame: int, block: int) -> WrittenBlock:
        return self._pictures.write(frames, first_frame=first_frame, block=block)

    def finish(self) -> Path:
        self._pictures.finish()
        self.output.parent.mkdir(parents=True, exist_ok=True)
        first, *rest = map(self._pictures.picture, range(self._pictures.num_frames))
        is_gif = self.output.suffix.lower() == ".gif"
        options = self._gif_options() if is_gif else self._webp_options()
        with replacing(self.output) as temporary, Image.open(first) as image:
            image.save(temporary, save_all=True, append_images=map(_loaded, rest), loop=0, **options)
        return self.output

    def _gif_options(self) -> dict[str, Any]:
        return {"format": "GIF", "duration": self._durations_ms(10), "comment": self._comment.encode()}

    def _webp_options(self) -> dict[str, Any]:
        exif = Image.Exif()
        exif[EXIF_IMAGE_DESCRIPTION] = self._comment
        return {"format": "WEBP", "duration": self._durations_ms(1), "quality": 90, "exif": exif}

    def _durations_ms(self, unit_ms: int) -> list[int]:
        """How long each frame stays, in whole units, so rounded that the times never drift from index/fps."""
        unit_s = Fraction(unit_ms, 1000)
        ends = [round(index / self._fps / unit_s) for index in range(self._pictures.num_frames + 1)]
        return [unit_ms * (end - start) for start, end in zip(ends, ends[1:], strict=False)]


def _loaded(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")
