"""The single-process denoising loop: the specification that every parallel scheme must equal.

A tick runs its forwards newest block first. What a forward reads is named by the timetable and is the same
whatever ran where: latents as they stood at the end of the tick before, keys and values of later blocks from
this tick. Branches of guidance are forwards of their own, so that a rank may run one of them alone.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vidgen.denoise.guidance import combine, num_branches
from vidgen.denoise.solver import History, Solver
from vidgen.denoise.timetable import Forward, Lender, Read, Timetable
from vidgen.model.context import Context, LayerKeyValues, concatenate
from vidgen.model.dit import DiT
from vidgen.types import Block

# B batch (1), C latent channels, F latent frames, Y X latent rows and columns

BranchKeyValues = tuple[LayerKeyValues, ...]  # one per guidance branch


@dataclass(frozen=True, kw_only=True)
class Task:
    """Everything that decides the clean latents; nothing that changes while they are made."""

    model: DiT
    timetable: Timetable
    noise_levels: Sequence[float]  # num_steps + 1, from 1 to 0
    solver: Solver
    guidance_scale: float
    noise: Callable[[Block], Tensor]  # [1, C, F, Y, X] of a block
    texts: Callable[[Block], tuple[Tensor, ...]]  # text [1, N, T] of a block, one per branch

    def __post_init__(self) -> None:
        if len(self.noise_levels) != self.timetable.num_steps + 1:
            raise ValueError(
                f"{len(self.noise_levels)} noise levels for {self.timetable.num_steps} steps: need one more "
                "level than steps"
            )


@dataclass
class BlockState:
    """A block between two ticks."""

    latents_BCFYX: Tensor
    steps_done: int
    history: History = ()


@dataclass
class LoopState:
    """All that the next tick needs; what a checkpoint holds."""

    next_tick: int = 0
    blocks: dict[int, BlockState] = field(default_factory=dict)
    kv_for_later: dict[int, tuple[int, BranchKeyValues]] = field(default_factory=dict)  # block -> (step, K,V)
    anchor: BranchKeyValues = ()


@dataclass(frozen=True)
class FinishedBlock:
    """A block's clean latents [1, C, F, Y, X]."""

    block: Block
    latents_BCFYX: Tensor


@torch.inference_mode()
def run_tick(task: Task, state: LoopState) -> list[FinishedBlock]:
    """Advance the state by one tick; the blocks that it finished, oldest first."""
    timetable, tick = task.timetable, state.next_tick
    stepped: dict[int, BlockState] = {}
    for_later: dict[int, tuple[int, BranchKeyValues]] = {}
    for_earlier: dict[tuple[int, int], BranchKeyValues] = {}  # (block, step) -> K,V of its first frames
    anchor: BranchKeyValues = ()
    for forward in timetable.forwards(tick):
        block = timetable.block(forward.block)
        own = state.blocks.get(block.index) or BlockState(task.noise(block), 0)
        velocity, lent = run_forward(task, state, forward, own, for_earlier)
        latents, history = task.solver.step(own.latents_BCFYX, velocity, forward.step, own.history)
        stepped[block.index] = BlockState(latents, forward.step + 1, history)
        for_earlier = {}  # the block before this one is next, and nobody else reads them
        if Lender.EARLIER_BLOCK in lent:
            for_earlier[block.index, forward.step] = lent[Lender.EARLIER_BLOCK]
        if Lender.LATER_BLOCK in lent:
            for_later[block.index] = forward.step, lent[Lender.LATER_BLOCK]
        anchor = lent.get(Lender.ALL, anchor)

    state.blocks |= stepped
    state.kv_for_later |= for_later
    state.anchor = state.anchor or anchor
    state.next_tick = tick + 1
    kept = timetable.kept_after(tick)
    state.blocks = {index: block for index, block in state.blocks.items() if index in kept}
    state.kv_for_later = {index: kv for index, kv in state.kv_for_later.items() if index in kept}
    return [
        FinishedBlock(timetable.block(index), stepped[index].latents_BCFYX)
        for index in sorted(stepped)
        if stepped[index].steps_done == timetable.num_steps
    ]


def run_forward(
    task: Task,
    state: LoopState,
    forward: Forward,
    own: BlockState,
    for_earlier: dict[tuple[int, int], BranchKeyValues],
) -> tuple[Tensor, dict[Lender, BranchKeyValues]]:
    """(guided velocity of the block's own frames, keys and values it lends)."""
    assert own.steps_done == forward.step
    latents, levels, frames_before = _window(task, state, forward, own)
    branches = num_branches(task.guidance_scale)
    texts = task.texts(task.timetable.block(forward.block))[:branches]
    if len(texts) < branches:
        raise ValueError(f"guidance_scale={task.guidance_scale}: needs a text and a negative text, got one")
    velocities, lent = [], []
    for branch, text in enumerate(texts):
        velocity, own_kv = task.model.forward_and_lend(
            latents, levels, text, _context(state, forward, branch, for_earlier)
        )
        velocities.append(velocity[:, :, frames_before:])
        lent.append(own_kv)
    lends = {
        lend.to: tuple(
            tuple(kv.frames(frames_before + lend.start, frames_before + lend.stop) for kv in layers)
            for layers in lent
        )
        for lend in forward.lends
    }
    return combine(velocities, task.guidance_scale), lends


def _window(task: Task, state: LoopState, forward: Forward, own: BlockState) -> tuple[Tensor, Tensor, int]:
    """(latents of the recomputed context and the block, their noise levels [1, F], context frames)."""
    latents = own.latents_BCFYX
    levels = [task.noise_levels[forward.step]] * latents.shape[2]
    read = forward.before_latents
    if read is not None:
        before = state.blocks[read.block]
        assert before.steps_done == read.step, "a read names the version at the end of the last tick"
        latents = torch.cat([before.latents_BCFYX[:, :, read.start : read.stop], latents], dim=2)
        levels = [task.noise_levels[read.step]] * read.num_frames + levels
    frames_before = read.num_frames if read is not None else 0
    return latents, torch.tensor([levels], dtype=torch.float32, device=latents.device), frames_before


def _context(
    state: LoopState,
    forward: Forward,
    branch: int,
    for_earlier: dict[tuple[int, int], BranchKeyValues],
) -> Context:
    """Keys and values around the window: anchor and cached frames before it, the next block's after it."""
    anchor = state.anchor[branch] if forward.anchor_kv is not None else ()
    return Context(
        before=concatenate(anchor, _cached(state, forward.before_kv, branch)),
        after=for_earlier[forward.after_kv.block, forward.after_kv.step][branch] if forward.after_kv else (),
    )


def _cached(state: LoopState, read: Read | None, branch: int) -> LayerKeyValues:
    if read is None:
        return ()
    step, kv = state.kv_for_later[read.block]
    assert step == read.step, "a read names the version at the end of the last tick"
    return kv[branch]


def denoise(task: Task, state: LoopState | None = None) -> Iterator[FinishedBlock]:
    """Clean blocks in order, from the beginning or from a saved state."""
    state = state or LoopState()
    while state.next_tick < task.timetable.num_ticks:
        yield from run_tick(task, state)
