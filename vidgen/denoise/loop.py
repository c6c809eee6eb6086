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
from vidgen.denoise.checks import check_task
from vidgen.denoise.conditions import Conditions
from vidgen.denoise.given import NOTHING, Given
from vidgen.denoise.guidance import guide, num_branches
from vidgen.denoise.lending import Lending, Lent
from vidgen.denoise.lockstep import ClipAttention, Clips
from vidgen.denoise.skipping import decide, regions_of, share_skipped, skipping_layers, skips_forwards
from vidgen.denoise.solver import Solver
from vidgen.denoise.state import BlockState, FinishedBlock, LoopState, Window
from vidgen.denoise.still import StillFilter, denoised, repeat, same_texts
from vidgen.denoise.timetable import Forward, Timetable
from vidgen.kernels.attention.api import attention_backend
from vidgen.model.conditioning import Conditioning
from vidgen.model.dit import DiT
from vidgen.model.region import Region
from vidgen.stepcache.cache import Decision, StepCache
from vidgen.stepcache.kept import NOTHING_KEPT
from vidgen.types import Block, GuidanceMode, ResidualGuidance

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
    residual_guidance: ResidualGuidance = ResidualGuidance.NONE
    still: StillFilter | None = None  # every block is denoised without
    sparsity: Sparsity | None = None  # dense attention without
    clips: Clips | None = None  # in lock step; every frame sees every other without
    cache: StepCache | None = None  # every step is run without
    attention_backend: str | None = None  # None: the first that is able
    conditions: Conditions = field(default_factory=Conditions, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_task(self)

    @property
    def num_branches(self) -> int:
        """Branches of guidance of a block's first step; later ones have no more."""
        return self.branches_at(0)

    def branches_at(self, step: int) -> int:
        """Branches of guidance that a step needs, the prompt's first; the same for any step but the first."""
        if self.residual_guidance == ResidualGuidance.SELF:
            return 1
        if self.residual_guidance == ResidualGuidance.ONETIME and step != 0:
            return 1
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
        """How often the model runs for a block's first step, and at most for a later one."""
        return self.runs_at(0)

    def runs_at(self, step: int) -> int:
        """How often the model runs for this step of a block."""
        return 1 if self.guidance_mode == GuidanceMode.STACKED else self.branches_at(step)

    def run_texts(self, block: Block, step: int = 0) -> tuple[Tensor, ...]:
        """Text [B, N, T] of each run of the model: a branch each, or all of them in one batch."""
        branches = self.branches_at(step)
        texts = self.texts(self.timetable.text_block(block))[:branches]
        if len(texts) < branches:
            raise ValueError(
                f"guidance_scale={self.guidance_scale}: needs a text and a negative text, got one"
            )
        return self.conditions.placed(texts, self.device, stacked=self.runs_at(step) < len(texts))

    def new_block(self, block: Block) -> BlockState:
        """A block before its first step."""
        return BlockState(self.noise(block).to(self.device), 0)

    def attending(self, layers: range, lent: Lent) -> Attending | ClipAttention | None:
        """How some of the layers are run, where that is not the plain way."""
        if self.clips is not None:
            return ClipAttention(self.clips, self.model.config, layers)
        left_out, regions = skipping_layers(self), regions_of(self)
        if self.sparsity is None and left_out is None and regions is None:
            return None
        num_layers = self.model.config.num_layers
        return Attending(self.sparsity, self.timetable, layers, num_layers, lent, left_out, regions)

    @property
    def device(self) -> torch.device:
        """Where the model is, and so all of the work."""
        return self.model.device


@torch.inference_mode()
def run_tick(
    task: Task, state: LoopState, before_forward: Callable[[], None] | None = None
) -> list[FinishedBlock]:
    """Advance the state by one tick; the blocks that it finished, oldest first.

    `before_forward` is called before each forward. An error from it leaves the state as it was, so that a
    render can be given up in the middle of a long tick. A block that is shown again takes all its ticks at
    once.
    """
    timetable, tick = task.timetable, state.next_tick
    again = shown_again(task, state)
    if again is not None:
        if before_forward is not None:
            before_forward()
        return [repeat(timetable, state, again)]
    lending = Lending(state.lent, remembers=skips_forwards(task))
    attending = task.attending(range(task.model.config.num_layers), state.lent)
    stepped: dict[int, BlockState] = {}
    for forward in timetable.forwards(tick):
        if before_forward is not None:
            before_forward()
        stepped |= run_forward(task, state.blocks, forward, lending, attending)
    kept = timetable.kept_after(tick)
    lending.end_tick(kept)
    if attending is not None:
        attending.end_tick(tick)
    finished = [
        FinishedBlock(timetable.block(index), stepped[index].latents_BCFYX)
        for index in sorted(stepped)
        if stepped[index].steps_done == timetable.num_steps
    ]
    if task.still is not None and finished:
        state.still = denoised(state, finished[-1])
    state.blocks = {index: block for index, block in (state.blocks | stepped).items() if index in kept}
    state.next_tick = tick + 1
    return finished


def shown_again(task: Task, state: LoopState) -> Block | None:
    """The block that this tick admits, if it is not to be denoised: see still.py."""
    index, ticks = divmod(state.next_tick, task.timetable.stride)
    if task.still is None or ticks or index < 2 or not task.still.repeats(index, state.still):
        return None
    block = task.timetable.block(index)
    texts = task.texts(block)
    if block.start < task.given.num_given:
        return None
    is_same = all(same_texts(task.texts(task.timetable.block(index - back)), texts) for back in (1, 2))
    return block if is_same else None


def run_forward(
    task: Task,
    blocks: dict[int, BlockState],
    forward: Forward,
    lending: Lending,
    attending: Attending | ClipAttention | None,
) -> dict[int, BlockState]:
    """The blocks of the window after their step; what the forward lends is kept."""
    owns = [blocks.get(index) or task.new_block(task.timetable.block(index)) for index, _ in forward.parts]
    window = make_window(task, blocks, forward, *owns)
    with attention_backend(task.attention_backend):
        decision = decide(task, forward, owns[0], window)
        if task.cache is not None:
            task.cache.tally(forward.step, share_skipped(task, forward, decision))
        if decision is not None and decision.outputs is not None:
            lending.relend(forward)
            return take_steps(task, forward, owns, decision.outputs, decision)
        lending.begin(forward)
        region = region_of(decision, window)
        velocities = run_model(task, window, forward, lending, attending, region)
    return take_steps(task, forward, owns, velocities, decision)


def run_model(
    task: Task,
    window: Window,
    forward: Forward,
    lending: Lending,
    attending: Attending | ClipAttention | None,
    region: Region | None = None,
) -> list[Tensor]:
    """Velocities of the blocks' own frames, one per branch; new ones in the `region`, where there is one."""
    model = task.model_at(forward.step)
    grid = model.token_grid(window.latents_BCFYX.shape)
    velocities: list[Tensor] = []
    newest, step = forward.parts[-1]
    for run, text in enumerate(task.run_texts(task.timetable.block(newest), step)):
        context = lending.context(run)
        velocity, own_kv = model.forward_and_lend(
            *window.repeated(text.shape[0]),
            text,
            context,
            first_frame=window.frames_before,
            lends=lending.is_lending,
            conditioning=task.conditioning(forward.step, window.levels, text),
            attends=attending and attending.attends(forward.block, forward.step, run, grid, context),
            region=region,
        )
        lending.keep(own_kv, window.frames_before)
        del own_kv  # of all layers and frames: the next branch is to have the memory
        velocities.extend(velocity.split(1))
    return velocities


def region_of(decision: Decision | None, window: Window) -> Region | None:
    """The tokens that are run, where a step cache leaves out some."""
    if decision is None or decision.active_FS is None:
        return None
    return Region.of(decision.active_FS, window.frames_before)


def make_window(task: Task, blocks: dict[int, BlockState], forward: Forward, *owns: BlockState) -> Window:
    """What a forward runs on; each part in the version that the timetable names."""
    assert [own.steps_done for own in owns] == [step for _, step in forward.parts]
    latents = owns[0].latents_BCFYX if len(owns) == 1 else torch.cat([o.latents_BCFYX for o in owns], dim=2)
    levels = [task.noise_levels[own.steps_done] for own in owns for _ in range(own.latents_BCFYX.shape[2])]
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


def take_steps(
    task: Task,
    forward: Forward,
    owns: Sequence[BlockState],
    velocities: Sequence[Tensor],
    decision: Decision | None = None,
) -> dict[int, BlockState]:
    """Every block of the window after its step; the velocities hold their frames one after the other.

    `decision`: a step cache's.
    """
    frames = [own.latents_BCFYX.shape[2] for own in owns]
    by_block = zip(*(velocity.split(frames, dim=2) for velocity in velocities), strict=True)
    return {
        block: take_step(task, Forward(block, step), own, parts[: task.branches_at(step)], decision)
        for (block, step), own, parts in zip(forward.parts, owns, by_block, strict=True)
    }


def take_step(
    task: Task,
    forward: Forward,
    own: BlockState,
    velocities: Sequence[Tensor],
    decision: Decision | None = None,
) -> BlockState:
    """The block after this step, from the velocities of the step's branches."""
    step = forward.step
    if task.cache is not None and decision is not None:
        velocities = task.cache.mixed(decision, velocities, task.model.config.patch)
    velocity, negative = guide(
        velocities,
        task.guidance_at(step),
        task.residual_guidance,
        latents=own.latents_BCFYX,
        level=task.noise_levels[step],
        negative=own.negative_BCFYX,
    )
    latents, history = task.solver.step(own.latents_BCFYX, velocity, step, own.history)
    kept = NOTHING_KEPT
    if step + 1 < task.timetable.num_steps and task.cache is not None and decision is not None:
        kept = task.cache.after(decision, step, velocities)
    if step + 1 == task.timetable.num_steps:
        latents, _ = task.given.pin(latents, task.timetable.block(forward.block).start)
        negative = None  # nobody reads it again
    return BlockState(latents, step + 1, history, negative, kept)


def denoise(task: Task, state: LoopState | None = None) -> Iterator[FinishedBlock]:
    """Clean blocks in order, from the beginning or from a saved state."""
    state = state or LoopState()
    while state.next_tick < task.timetable.num_ticks:
        yield from run_tick(task, state)
