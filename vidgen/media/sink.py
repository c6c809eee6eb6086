"""Where a render's frames go, block by block: a growing MP4, a PNG sequence, or a small animation."""

# F frames, H height, W width; pictures are uint8 RGB

import hashlib
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from vidgen.media.blocks import Blocks, WrittenBlock, check_unchanged
from vidgen.media.images import AnimationSink, ImageSink
from vidgen.media.segments import SegmentEncoder, append_segment, remux, replacing, write_atomically

SUFFIXES = (".mp4", ".gif", ".webp")


class Sink(Protocol):
    """Takes blocks in order, each durable when `write` returns; `finish` makes the output from them.

    A sink opened with the blocks `done` before continues after the last of them; a block that was written
    but is not in `done` is simply written again.
    """

    def write(self, frames: NDArray[np.uint8], *, first_frame: int, block: int) -> WrittenBlock:
        """Keeps uint8 [F, H, W, 3]; the returned record may go into the journal at once."""
        ...

    def finish(self) -> Path:
        """Makes the output, durably, and says where it is. May be called again after a crash inside it."""
        ...


class Mp4Sink:
    """Segments in FOLDER/segments, a playable FOLDER/live.mp4 that grows with each, one MP4 at the end."""

    def __init__(
        self,
        output: Path,
        folder: Path,
        width: int,
        height: int,
        fps: Fraction,
        metadata: Mapping[str, str],
        *,
        crf: int = 16,
        done: Sequence[WrittenBlock] = (),
    ) -> None:
        self.output = output
        self.live = folder / "live.mp4"
        self._metadata = dict(metadata)
        self._segments = folder / "segments"
        self._init = self._segments / "init.mp4"
        self._encoder = SegmentEncoder(width, height, fps, crf=crf)
        self._blocks = Blocks(done)
        self._segments.mkdir(parents=True, exist_ok=True)
        header = self._encoder.init_segment()
        if done and self._init.read_bytes() != header:
            raise ValueError(f"{self._init}: from another size, fps, crf or encoder build; resume with those")
        write_atomically(self._init, header)
        self._rebuild_live()

    def write(self, frames: NDArray[np.uint8], *, first_frame: int, block: int) -> WrittenBlock:
        self._blocks.expect(block, first_frame)
        data = self._encoder.encode(frames, first_frame=first_frame, sequence=block + 1)
        path = self._segment(block)
        write_atomically(path, data)
        append_segment(self.live, data)
        return self._blocks.add(block, first_frame, len(frames), path, hashlib.sha256(data).hexdigest())

    def finish(self) -> Path:
        self.output.parent.mkdir(parents=True, exist_ok=True)
        segments = [self._segment(record.block) for record in self._blocks.written]
        remux(self._init, segments, self.output, self._metadata)
        self.live.unlink(missing_ok=True)
        return self.output

    def _segment(self, block: int) -> Path:
        # from the number, not from the record's path: a job folder may have been moved
        return self._segments / f"{block:06d}.m4s"

    def _rebuild_live(self) -> None:
        with replacing(self.live) as temporary, temporary.open("wb") as live:
            live.write(self._init.read_bytes())
            for record in self._blocks.written:
                data = self._segment(record.block).read_bytes()
                check_unchanged(self._segment(record.block), data, record.sha256)
                live.write(data)


def open_sink(
    output: Path | str,
    folder: Path,
    width: int,
    height: int,
    fps: Fraction,
    metadata: Mapping[str, str],
    *,
    crf: int = 16,
    done: Sequence[WrittenBlock] = (),
) -> Sink:
    """The sink that `output` asks for: .mp4, .gif, .webp, or a folder of PNG.

    A folder is an existing one, a path that ends in /, or one without a suffix.
    `folder` is the job's, for what is kept on the way; `done` is what its journal holds.
    """
    target = Path(output)
    suffix = target.suffix.lower()
    if str(output).endswith("/") or target.is_dir() or not suffix:
        return ImageSink(target, width, height, metadata, done=done)
    if suffix == ".mp4":
        return Mp4Sink(target, folder, width, height, fps, metadata, crf=crf, done=done)
    if suffix in SUFFIXES:
        return AnimationSink(target, folder, width, height, fps, metadata, done=done)
    raise ValueError(f"output={output}: {suffix} is not known; end in {', '.join(SUFFIXES)} or / (PNGs)")


def upscale(frames: NDArray[np.uint8], factor: int) -> NDArray[np.uint8]:
    """uint8 [F, factor*H, factor*W, 3]: every pixel becomes a square of factor x factor."""
    if factor < 1:
        raise ValueError(f"factor={factor}: need a whole number of 1 or more; 1 keeps the size")
    return frames.repeat(factor, axis=1).repeat(factor, axis=2)
