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


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptChange:
    """From this block on another prompt holds, blended in over so many blocks."""

    prompt: str
    first_block: int
    transition_blocks: int = 0


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
        self.segments = segments
        first_blocks: list[int] = []
        start = 0
        for index, segment in enumerate(segments):
            if segment.num_frames < 1:
                raise ValueError(f"segment {index + 1} has num_frames={segment.num_frames}: need at least 1")
            previous = first_blocks[-1] if first_blocks else 0
            first_blocks.append(next(b for b in count(previous) if first_frame(b) >= start))
            start += segment.num_frames
        for index, (first, following) in enumerate(zip(first_blocks, first_blocks[1:], strict=False)):
            if first == following:
                block_pixels = first_frame(first + 1) - first_frame(first)
                raise ValueError(
                    f"segment {index + 1} ({segments[index].num_frames} frames) holds no start of a block of "
                    f"{block_pixels} frames, so it would never be seen; make it at least that long"
                )
        self._changes = [
            PromptChange(prompt=segment.prompt, first_block=first, transition_blocks=transition_blocks)
            for first, segment in zip(first_blocks, segments, strict=True)
        ]

    @property
    def num_frames(self) -> int:
        return sum(segment.num_frames for segment in self.segments)

    def blend(self, block: int) -> Blend:
        """The text of a block."""
        current = max(i for i, change in enumerate(self._changes) if change.first_block <= block)
        change = self._changes[current]
        since = block - change.first_block
        if current == 0 or since >= change.transition_blocks:
            return Blend(change.prompt, change.prompt, 1.0)
        weight = (since + 1) / (change.transition_blocks + 1)
        return Blend(self._changes[current - 1].prompt, change.prompt, weight)

    def change(self, change: PromptChange) -> None:
        """Another prompt from a block on, in place of all that was said of it and of later ones."""
        self._changes = [earlier for earlier in self._changes if earlier.first_block < change.first_block]
        self._changes.append(change)


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

    def change(self, change: PromptChange, text_1NT: Tensor) -> None:
        """Another prompt from a block on, with its text."""
        self.encoded.setdefault(change.prompt, text_1NT)
        self.timeline.change(change)
