"""The single-process denoising loop: the specification that every parallel scheme must equal.

A tick runs its forwards newest block first. What a forward reads is named by the timetable and is the same
whatever ran where: latents as they stood at the end of the tick before, keys and values of later blocks from
this tick. Branches of guidance are runs of the model of their own, or one batch where the task says so.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vidgen.denoise.attending import Attending, Sparsity
from vidgen.denoise.conditions import Conditions
from vidgen.denoise.given import NOTHING, Given
from vidgen.denoise.guidance import combine, num_branches
from vidgen.denoise.lending import Lending, Lent
from vidgen.denoise.solver import History, Solver
from vidgen.denoise.timetable import Forward, Timetable
from vidgen.kernels.attention.api import attention_backend
from vidgen.model.dit import Conditioning, DiT
from vidgen.types import Block, GuidanceMode

# B batch, C latent channels, F latent frames, Y X latent rows and columns


@dataclass(frozen=True, kw_only=True)
class Task:
    """Everything that decides the clean latents; nothing that changes while they are made."""

    model: DiT
    timetable: Timetable
    noise_levels: Sequence[float]  # as the model sees them: num_steps + 1, from 1 to 0
    solver: Solver
    guidance_scale: float
    second_model: DiT | None = None  # the expert that takes the steps from the timetable's switch on
    second_guidance_scale: float | None = None  # its own, where it differs
    given: Given = NOTHING
    noise: Callable[[Block], Tensor]  # [1, C, F, Y, X] of a block
    texts: Callable[[Block], tuple[Tensor, ...]]  # text [1, N, T] of a block, one per branch
    guidance_mode: GuidanceMode = GuidanceMode.SPLIT
    sparsity: Sparsity | None = None  # dense attention without
    attention_backend: str | None = None  # None: the first that is able
    conditions: Conditions = field(default_factory=Conditions, repr=False, compare=False)

    def __post_init__(self) -> None:
        if len(self.noise_levels) != self.timetable.num_steps + 1:
            raise ValueError(
                f"{len(self.noise_levels)} noise levels for {self.timetable.num_steps} steps: need one more "
                "level than steps"
            )
        if (self.second_model is None) != (self.timetable.switch_step is None):
            raise ValueError("a second model and the step from which it is used belong together")

    @property
    def num_branches(self) -> int:
        """Branches of guidance that every step needs."""
        return max(num_branches(scale) for scale in (self.guidance_scale, self.guidance_at(-1)))

    @property
    def models(self) -> tuple[DiT, ...]:
        """The experts, in the order of their steps; mostly one."""
        return (self.model,) if self.second_model is None else (self.model, self.second_model)

    def model_at(self, step: int) -> DiT:
        """Who takes a step."""
        return self.models[self.timetable.expert(step)]

    def guidance_at(self, step: int) -> float:
        """The guidance scale of a step; of the last one for -1."""
        is_second = self.timetable.expert(step % self.timetable.num_steps)
        if is_second and self.second_guidance_scale is not None:
            return self.second_guidance_scale
        return self.guidance_scale

    def conditioning(self, step: int, levels: tuple[float, ...], text_BNT: Tensor) -> Conditioning:
        """What the model of a step makes of frames' noise levels and a text."""
        return self.conditions.of(self.model_at(step), levels, text_BNT, self.given.image_BMI)

    @property
    def runs_per_forward(self) -> int:
        """How often the model runs for one step of one block."""
        return 1 if self.guidance_mode == GuidanceMode.STACKED else self.num_branches

    def run_texts(self, block: Block) -> tuple[Tensor, ...]:
        """Text [B, N, T] of each run of the model: a branch each, or all of them in one batch."""
        texts = self.texts(block)[: self.num_branches]
        if len(texts) < self.num_branches:
            raise ValueError(
                f"guidance_scale={self.guidance_scale}: needs a text and a negative text, got one"
            )
        return self.conditions.placed(texts, self.device, stacked=self.runs_per_forward < len(texts))

    def new_block(self, block: Block) -> "BlockState":
        """A block before its first step."""
        return BlockState(self.noise(block).to(self.device), 0)

    def attending(self, layers: range, lent: Lent) -> Attending | None:
        """What gives some of the layers their attention, where that is not the plain one."""
        if self.sparsity is None:
            return None
        return Attending(self.sparsity, self.timetable, layers, self.model.config.num_layers, lent)

    @property
    def device(self) -> torch.device:
        """Where the model is, and so all of the work."""
        return self.model.device


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
    lent: Lent = field(default_factory=Lent)


@dataclass(frozen=True)
class FinishedBlock:
    """A block's clean latents [1, C, F, Y, X]."""

    block: Block
    latents_BCFYX: Tensor


@dataclass(frozen=True, slots=True)
class Window:
    """What a forward runs on: the recomputed context, then the block's own frames."""

    latents_BCFYX: Tensor  # B is 1; with the channels that the job gives, where the model takes such
    noise_level_BF: Tensor
    levels: tuple[float, ...]  # the same, as numbers
    frames_before: int

    def own_frames(self) -> "Window":
        """The block's own frames, without what is before them."""
        first = self.frames_before
        latents = self.latents_BCFYX[:, :, first:]
        return Window(latents, self.noise_level_BF[:, first:], self.levels[first:], 0)

    def repeated(self, batch: int) -> tuple[Tensor, Tensor]:
        """Latents and noise levels, once per branch in the batch."""
        if batch == 1:
            return self.latents_BCFYX, self.noise_level_BF
        return self.latents_BCFYX.repeat(batch, 1, 1, 1, 1), self.noise_level_BF.repeat(batch, 1)


@torch.inference_mode()
def run_tick(
    task: Task, state: LoopState, before_forward: Callable[[], None] | None = None
) -> list[FinishedBlock]:
    """Advance the state by one tick; the blocks that it finished, oldest first.

    `before_forward` is called before each forward. An error from it leaves the state as it was, so that a
    render can be given up in the middle of a long tick.
    """
    timetable, tick = task.timetable, state.next_tick
    stepped: dict[int, BlockState] = {}
    lending = Lending(state.lent)
    attending = task.attending(range(task.model.config.num_layers), state.lent)
    for forward in timetable.forwards(tick):
        if before_forward is not None:
            before_forward()
        block = timetable.block(forward.block)
        own = state.blocks.get(block.index) or task.new_block(block)
        lending.begin(forward)
        with attention_backend(task.attention_backend):
            velocity = run_forward(task, state.blocks, forward, own, lending, attending)
        stepped[block.index] = take_step(task, forward, own, velocity)
    kept = timetable.kept_after(tick)
    lending.end_tick(kept)
    if attending is not None:
        attending.end_tick(tick)
    state.blocks = {index: block for index, block in (state.blocks | stepped).items() if index in kept}
    state.next_tick = tick + 1
    return [
        FinishedBlock(timetable.block(index), stepped[index].latents_BCFYX)
        for index in sorted(stepped)
        if stepped[index].steps_done == timetable.num_steps
    ]


def run_forward(
    task: Task,
    blocks: dict[int, BlockState],
    forward: Forward,
    own: BlockState,
    lending: Lending,
    attending: Attending | None,
) -> Tensor:
    """Guided velocity of the block's own frames; what the forward lends is kept."""
    window = make_window(task, blocks, forward, own)
    model = task.model_at(forward.step)
    grid = model.token_grid(window.latents_BCFYX.shape)
    velocities: list[Tensor] = []
    for run, text in enumerate(task.run_texts(task.timetable.block(forward.block))):
        context = lending.context(run)
        velocity, own_kv = model.forward_and_lend(
            *window.repeated(text.shape[0]),
            text,
            context,
            first_frame=window.frames_before,
            lends=lending.is_lending,
            conditioning=task.conditioning(forward.step, window.levels, text),
            attends=attending and attending.attends(forward.block, forward.step, run, grid, context),
        )
        lending.keep(own_kv, window.frames_before)
        velocities.extend(velocity.split(1))
    return combine(velocities, task.guidance_at(forward.step))


def make_window(task: Task, blocks: dict[int, BlockState], forward: Forward, own: BlockState) -> Window:
    """What a forward runs on; each part in the version that the timetable names."""
    assert own.steps_done == forward.step
    latents = own.latents_BCFYX
    levels = [task.noise_levels[forward.step]] * latents.shape[2]
    read = forward.before_latents
    if read is not None:
        before = blocks[read.block]
        assert before.steps_done == read.step, "a read names the version at the end of the last tick"
        latents = torch.cat([before.latents_BCFYX[:, :, read.start : read.stop], latents], dim=2)
        levels = [task.noise_levels[read.step]] * read.num_frames + levels
    frames_before = read.num_frames if read is not None else 0
    first_frame = task.timetable.block(forward.block).start - frames_before
    latents, levels = task.given.pin(latents, first_frame, levels)
    channels = task.given.channels(first_frame, latents.shape[2], latents)
    if channels is not None:
        latents = torch.cat([latents, channels], dim=1)
    level_BF = torch.tensor([levels], dtype=torch.float32, device=latents.device)
    return Window(latents, level_BF, tuple(levels), frames_before)


def take_step(task: Task, forward: Forward, own: BlockState, velocity_BCFYX: Tensor) -> BlockState:
    """The block after this step."""
    latents, history = task.solver.step(own.latents_BCFYX, velocity_BCFYX, forward.step, own.history)
    if forward.step + 1 == task.timetable.num_steps:
        latents, _ = task.given.pin(latents, task.timetable.block(forward.block).start)
    return BlockState(latents, forward.step + 1, history)


def denoise(task: Task, state: LoopState | None = None) -> Iterator[FinishedBlock]:
    """Clean blocks in order, from the beginning or from a saved state."""
    state = state or LoopState()
    while state.next_tick < task.timetable.num_ticks:
        yield from run_tick(task, state)
