"""The prompt timeline: which text conditions which block."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import count

from torch import Tensor

from vidgen.types import Block, Segment


@dataclass(frozen=True, slots=True)
class Blend:
    """A block's text: `new` with this weight, the rest of `old`."""

    old: str
    new: str
    weight: float


class Timeline:
    """Segments of prompts laid over blocks. A change takes effect at the first block that starts after it.

    `transition_blocks` blocks after a change blend the two embeddings linearly. The last prompt holds on to
    the end of the video. `first_frame` gives the number of a block's first pixel frame.
    """

    def __init__(
        self,
        segments: tuple[Segment, ...],
        *,
        first_frame: Callable[[int], int],
        transition_blocks: int = 0,
    ) -> None:
        if not segments:
            raise ValueError("no prompt: give a prompt or at least one segment")
        self.segments, self.transition_blocks = segments, transition_blocks
        self._first_blocks: list[int] = []
        start = 0
        for index, segment in enumerate(segments):
            if segment.num_frames < 1:
                raise ValueError(f"segment {index + 1} has num_frames={segment.num_frames}: need at least 1")
            previous = self._first_blocks[-1] if self._first_blocks else 0
            self._first_blocks.append(next(b for b in count(previous) if first_frame(b) >= start))
            start += segment.num_frames
        for index, (first, following) in enumerate(
            zip(self._first_blocks, self._first_blocks[1:], strict=False)
        ):
            if first == following:
                block_pixels = first_frame(first + 1) - first_frame(first)
                raise ValueError(
                    f"segment {index + 1} ({segments[index].num_frames} frames) holds no start of a block of "
                    f"{block_pixels} frames, so it would never be seen; make it at least that long"
                )

    @property
    def num_frames(self) -> int:
        return sum(segment.num_frames for segment in self.segments)

    def blend(self, block: int) -> Blend:
        """The text of a block."""
        current = max(i for i, first in enumerate(self._first_blocks) if first <= block)
        new = self.segments[current].prompt
        since = block - self._first_blocks[current]
        if current == 0 or since >= self.transition_blocks:
            return Blend(new, new, 1.0)
        return Blend(self.segments[current - 1].prompt, new, (since + 1) / (self.transition_blocks + 1))


class BlockTexts:
    """For a block, (text, negative text), each [1, N, T]. Plain data inside, so another rank can have it."""

    def __init__(self, timeline: Timeline, negative_prompt: str, encoded: dict[str, Tensor]) -> None:
        self.timeline, self.negative_prompt, self.encoded = timeline, negative_prompt, encoded

    def __call__(self, block: Block) -> tuple[Tensor, Tensor]:
        blend = self.timeline.blend(block.index)
        text = self.encoded[blend.new]
        if blend.weight < 1:
            text = self.encoded[blend.old].lerp(text, blend.weight)
        return text, self.encoded[self.negative_prompt]
