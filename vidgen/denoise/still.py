"""Still scenes: a block that would look like the one before is not denoised, but that one is shown again.

Source: the stochastic similarity filter of StreamDiffusion (arXiv 2312.12491), there of camera
pictures: the more alike the last two are, the likelier the next is skipped, with probability
(similarity - threshold) / (1 - threshold). Here the last two are blocks that were denoised, of the same text
as the new one, so that a repeat never speaks for another repeat; and the die is a function of seed and block.
"""

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from vidgen.denoise.state import BlockState, FinishedBlock, LoopState, Stillness
from vidgen.denoise.timetable import Timetable
from vidgen.types import Block

MOST_IN_A_ROW = 10  # repeats, as in StreamDiffusion: a scene that has begun to move is noticed


@dataclass(frozen=True, kw_only=True, slots=True)
class StillFilter:
    """Decides which blocks are repeats."""

    threshold: float  # cosine similarity below which nothing is ever repeated
    seed: int

    def probability(self, similarity: float) -> float:
        """Of a repeat, in [0, 1]."""
        return min(1.0, max(0.0, (similarity - self.threshold) / (1 - self.threshold)))

    def repeats(self, block: int, stillness: Stillness) -> bool:
        """Whether a block repeats the one before, if its text is the same."""
        if stillness.similarity is None or stillness.in_a_row >= MOST_IN_A_ROW:
            return False
        return random.Random(f"{self.seed}/still/{block}").random() < self.probability(stillness.similarity)


def repeat(timetable: Timetable, state: LoopState, block: Block) -> FinishedBlock:
    """Advance the state by all ticks of a block that shows the one before again; K,V too are that one's."""
    latents = state.blocks[block.index - 1].latents_BCFYX
    if block.num_frames < latents.shape[2]:
        latents = latents[:, :, : block.num_frames].clone()
    state.next_tick = timetable.last_tick(block.index) + 1
    kept, lent = timetable.kept_after(state.next_tick - 1), state.lent.for_later
    if block.index - 1 in lent:
        lent = lent | {block.index: lent[block.index - 1]}
    blocks = state.blocks | {block.index: BlockState(latents, timetable.num_steps)}
    state.lent.for_later = {index: kv for index, kv in lent.items() if index in kept}
    state.blocks = {index: made for index, made in blocks.items() if index in kept}
    state.still = Stillness(state.still.similarity, state.still.in_a_row + 1, state.still.total + 1)
    return FinishedBlock(block, latents)


def denoised(state: LoopState, done: FinishedBlock) -> Stillness:
    """What is known when a block has been denoised; the state still holds the one before."""
    before = state.blocks.get(done.block.index - 1)
    similarity = None
    if before is not None and before.latents_BCFYX.shape == done.latents_BCFYX.shape:
        similarity = cosine(done.latents_BCFYX, before.latents_BCFYX)
    return Stillness(similarity, 0, state.still.total)


def cosine(one: Tensor, other: Tensor) -> float:
    """Of the angle between two tensors as vectors, in [-1, 1]; 0 if one is all zeros."""
    a, b = one.flatten().double(), other.flatten().double()
    return float(torch.nn.functional.cosine_similarity(a, b, dim=0))


def same_texts(one: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> bool:
    """Whether two blocks are asked for the same."""
    return len(one) == len(other) and all(
        a is b or torch.equal(a, b) for a, b in zip(one, other, strict=True)
    )
