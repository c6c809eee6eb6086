"""Which block takes which step in which tick, and what it sees of its neighbours. Pure data, no tensors.

A video of latent frames is cut into blocks; block k enters at tick stride*k and takes step t in tick
stride*k + t. A tick runs its forwards in order, newest (noisiest) block first. Every read names the exact
version it wants, (block, steps done), so the result depends on nothing but the timetable. Patches of one
video (`pipefusion`) all enter at tick 0, and a tick runs them oldest first.

Source of the queue: DualParal (arXiv 2505.21070), with freshness defined by ticks instead of by arrival.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from vidgen.denoise.forwards import Forward, Lend, Lender, Read
from vidgen.types import Block, ContextMode


@dataclass(frozen=True, kw_only=True, slots=True)
class Timetable:
    """A queue of blocks, made by the functions below; sizes are latent frames, ticks and steps."""

    num_frames: int
    num_steps: int
    block_frames: int
    context_frames: int = 0
    stride: int = 1
    mode: ContextMode = ContextMode.RECOMPUTE
    anchor_frames: int = 0
    switch_step: int | None = None  # the first step of a second expert; none has all steps done by one
    joint: bool = False  # whether all live blocks run in one window, see `moving_buffer`
    warm_up_steps: int | None = None  # blocks are patches of one video, see `pipefusion`; None: they are not

    def __post_init__(self) -> None:
        bounds = {
            "num_frames": (self.num_frames, 1, None),
            "num_inference_steps": (self.num_steps, 1, None),
            "block_frames": (self.block_frames, 1, None),
            "context_frames": (self.context_frames, 0, self.block_frames),
            "stride": (self.stride, 1, self.num_steps),
            "anchor_frames": (self.anchor_frames, 0, self.block_frames),
            "switch_step": (self.switch_step or 0, 0, self.num_steps),
            "warm_up_steps": (1 if self.warm_up_steps is None else self.warm_up_steps, 1, None),
        }
        for name, (value, low, high) in bounds.items():
            if value < low or (high is not None and value > high):
                allowed = f"at least {low}" if high is None else f"{low} to {high}"
                raise ValueError(f"{name}={value}: allowed is {allowed}")
        cached = self.mode == ContextMode.CACHE and self.context_frames
        if self.joint and (cached or self.anchor_frames or self.switch_step is not None):
            raise ValueError(
                "timetable=buffer: runs all blocks in one window, with context_mode=recompute, without "
                "anchor_frames and on models of one expert only"
            )

    @property
    def num_blocks(self) -> int:
        return -(-self.num_frames // self.block_frames)

    @property
    def is_patched(self) -> bool:
        """Whether blocks are patches of one video, which take each step in the same tick."""
        return self.warm_up_steps is not None

    @property
    def num_ticks(self) -> int:
        return self.last_tick(self.num_blocks - 1) + 1

    @property
    def num_forwards(self) -> int:
        if self.joint:
            return self.num_ticks
        whole = sum(self._is_whole(tick) for tick in range(self.num_steps)) if self.is_patched else 0
        return whole + self.num_blocks * (self.num_steps - whole)

    def block(self, index: int) -> Block:
        """The index-th block; the last one may be shorter."""
        start = index * self.block_frames
        return Block(index, start, min(self.block_frames, self.num_frames - start))

    def text_block(self, block: Block) -> Block:
        """The block whose text this one gets: patches of a video all have its first."""
        return self.block(0) if self.is_patched else block

    def lends(self, block: int, step: int) -> tuple[Lend, ...]:
        """What a block's step lends, where each block runs by itself."""
        return self._lends(self.block(block), self.admission_tick(block) + step)

    def expert(self, step: int) -> int:
        """Which of the model's experts takes a step: 0, or 1 from `switch_step` on."""
        return int(self.switch_step is not None and step >= self.switch_step)

    def admission_tick(self, block: int) -> int:
        return 0 if self.is_patched else self.stride * block

    def last_tick(self, block: int) -> int:
        """The tick in which the block takes its last step."""
        return self.admission_tick(block) + self.num_steps - 1

    def live(self, tick: int) -> range:
        """Blocks that take a step in this tick."""
        if self.is_patched:
            return range(self.num_blocks if 0 <= tick < self.num_steps else 0)
        oldest = -(-(tick - self.num_steps + 1) // self.stride)
        return range(max(0, oldest), min(self.num_blocks - 1, tick // self.stride) + 1)

    def kept_after(self, tick: int) -> range:
        """Blocks whose state some later tick still needs: the live ones, and one more as context."""
        if self.is_patched:
            return self.live(tick + 1)
        oldest = max(0, -(-(tick + 2 - self.num_steps) // self.stride))  # the first not finished by `tick`
        if oldest >= self.num_blocks:
            return range(0)
        return range(max(0, oldest - 1), min(self.num_blocks - 1, tick // self.stride) + 1)

    def forwards(self, tick: int) -> tuple[Forward, ...]:
        """The forwards of a tick in the order they run: newest block first, patches oldest first."""
        if self.is_patched:
            return self._patches(tick)
        if self.joint:
            return tuple(self._joint(blocks, tick) for blocks in (self.live(tick),) if blocks)
        return tuple(self._forward(block, tick) for block in reversed(self.live(tick)))

    def ticks(self, start: int = 0) -> Iterator[tuple[Forward, ...]]:
        """All ticks from `start` on."""
        return (self.forwards(tick) for tick in range(start, self.num_ticks))

    def _forward(self, block: int, tick: int) -> Forward:
        step = tick - self.admission_tick(block)
        own, context = self.block(block), self.context_frames
        before_latents = before_kv = after_kv = anchor_kv = None
        if block > 0 and context:
            start, stop = self.block_frames - context, self.block_frames
            # how many steps the block before had done at the end of the last tick
            done = min(step + self.stride, self.num_steps)
            if self.mode == ContextMode.RECOMPUTE:
                before_latents = Read(block - 1, done, start, stop)
            elif self._share_expert(step, done - 1):
                before_kv = Read(block - 1, done - 1, start, stop)
        if block + 1 in self.live(tick) and context and self._share_expert(step, step - self.stride):
            after_kv = Read(block + 1, step - self.stride, 0, min(context, self.block(block + 1).num_frames))
        has_anchor = self._share_expert(step, self.num_steps - 1)
        if self.anchor_frames and block >= 2 and tick > self.last_tick(0) and has_anchor:
            anchor_kv = Read(0, self.num_steps - 1, 0, min(self.anchor_frames, self.block(0).num_frames))
        return Forward(block, step, before_latents, before_kv, after_kv, anchor_kv, self._lends(own, tick))

    def _joint(self, blocks: range, tick: int) -> Forward:
        steps = [(block, tick - self.admission_tick(block)) for block in blocks]
        (oldest, step), *newer = steps
        read = None
        if oldest > 0 and self.context_frames:  # the block before is finished, else it were live
            read = Read(
                oldest - 1, self.num_steps, self.block_frames - self.context_frames, self.block_frames
            )
        return Forward(oldest, step, before_latents=read, newer=tuple(newer))

    def _is_whole(self, tick: int) -> bool:
        """Whether a tick runs all patches in one window: to warm up, or for want of the expert's K,V."""
        return tick < (self.warm_up_steps or 0) or tick == self.switch_step

    def _patches(self, tick: int) -> tuple[Forward, ...]:
        patches = [self.block(index) for index in self.live(tick)]
        read_next = tick + 1 < self.num_steps and not self._is_whole(tick + 1)
        if not self._is_whole(tick):
            return tuple(self._patch(patch, patches, tick, read_next) for patch in patches)
        if not patches:
            return ()
        newer = patches[1:]  # the first one's are read by nobody: the next tick runs it first
        lends = tuple(
            Lend(Lender.PATCHES, patch.start, patch.start + patch.num_frames, part)
            for part, patch in enumerate(newer, start=1)
            if read_next
        )
        return (Forward(0, tick, lends=lends, newer=tuple((patch.index, tick) for patch in newer)),)

    def _patch(self, own: Block, patches: list[Block], tick: int, read_next: bool) -> Forward:
        reads = tuple(
            Read(other.index, tick if other.index < own.index else tick - 1, 0, other.num_frames)
            for other in patches
            if other != own
        )
        is_read = own != patches[-1] or (read_next and own != patches[0])
        lends = (Lend(Lender.PATCHES, 0, own.num_frames),) if is_read else ()
        return Forward(own.index, tick, lends=lends, patches_kv=reads)

    def _lends(self, own: Block, tick: int) -> tuple[Lend, ...]:
        lends, step = [], tick - self.admission_tick(own.index)
        if self.context_frames:
            if own.index - 1 in self.live(tick) and self._share_expert(step, step + self.stride):
                lends.append(Lend(Lender.EARLIER_BLOCK, 0, min(self.context_frames, own.num_frames)))
            # the last forward's serve the next block up to its own last step, which shares the expert
            reader_step = step if step + 1 == self.num_steps else step + 1 - self.stride
            is_read = own.index + 1 in self.live(tick + 1) and self._share_expert(step, reader_step)
            if self.mode == ContextMode.CACHE and is_read:
                start = self.block_frames - self.context_frames
                lends.append(Lend(Lender.LATER_BLOCK, start, self.block_frames))
        if self.anchor_frames and self.num_blocks > 2 and own.index == 0 and tick == self.last_tick(0):
            lends.append(Lend(Lender.ALL, 0, min(self.anchor_frames, own.num_frames)))
        return tuple(lends)

    def _share_expert(self, step: int, other: int) -> bool:
        """Whether keys and values of one step can be read in the other: experts do not read each other's.

        Latents can be read at any step. So for one step a block at the switch sees nothing of the block after
        it, which is still with the first expert.
        """
        return self.expert(step) == self.expert(other)


def dualparal(
    num_frames: int,
    num_steps: int,
    *,
    block_frames: int,
    context_frames: int,
    stride: int = 1,
    mode: ContextMode = ContextMode.RECOMPUTE,
    anchor_frames: int = 0,
    switch_step: int | None = None,
) -> Timetable:
    """A queue of blocks, one admitted every `stride` ticks. ValueError for sizes that make no queue."""
    return Timetable(
        num_frames=num_frames,
        num_steps=num_steps,
        block_frames=block_frames,
        context_frames=context_frames,
        stride=stride,
        mode=mode,
        anchor_frames=anchor_frames,
        switch_step=switch_step,
    )


def autoregressive(num_frames: int, num_steps: int, **sizes: Any) -> Timetable:
    """A queue in which each block is finished before the next one begins: `dualparal` with stride num_steps.

    Nothing flows back into a block from the one after it, so another prompt shows in the next block and
    changes none before it. In `recompute` mode a block reads the clean latents of the one before, at noise
    level 0. In `cache` mode it reads the K,V of that block's last forward: of latents before the last solver
    step, at the last noise level above 0. A clean-cache pass, as causal models are trained for (CausVid,
    arXiv 2412.07772; Self Forcing, arXiv 2506.08009), instead runs every finished block once more at level 0,
    only for its K,V: one forward a block more, and K,V of exactly the latents that are shown. `sizes` are
    those of `dualparal`.
    """
    return dualparal(num_frames, num_steps, stride=num_steps, **sizes)


def moving_buffer(num_frames: int, num_steps: int, **sizes: Any) -> Timetable:
    """A queue whose live blocks, each at its own noise level, run in one window and attend to one another.

    Source: StreamDiT (arXiv 2507.03745), whose chunks are the blocks and whose micro-steps are the `stride`
    ticks between two shifts: then the oldest block is clean and leaves, and noise enters. The buffer holds
    num_steps / stride blocks; it fills by one a shift at the beginning and empties so at the end. Beyond the
    paper, the last `context_frames` clean frames before the buffer stay in the window. All of a window has
    one text, that of its newest block. Models want training with such mixed levels. `sizes` are those of
    `dualparal`; ValueError for those that make no buffer.
    """
    return replace(dualparal(num_frames, num_steps, **sizes), joint=True)


def full(num_frames: int, num_steps: int, *, switch_step: int | None = None) -> Timetable:
    """One block with all frames, as a plain video pipeline runs it."""
    return Timetable(
        num_frames=num_frames, num_steps=num_steps, block_frames=num_frames, switch_step=switch_step
    )


def pipefusion(
    num_frames: int,
    num_steps: int,
    *,
    block_frames: int,
    warm_up_steps: int = 1,
    switch_step: int | None = None,
) -> Timetable:
    """`full` in patches of `block_frames` frames: each run sees the other patches by their keys and values.

    Source: PipeFusion (arXiv 2405.14430), there patches of an image. All take the same step in a tick, oldest
    first: those before a patch show it what they are in this tick, those after it what they were in the tick
    before, one step noisier. So one video fills a pipeline of stages, at the price of an error. The first
    `warm_up_steps` ticks run all in one window, which is exact; so does the first tick of a second expert.
    """
    return Timetable(
        num_frames=num_frames,
        num_steps=num_steps,
        block_frames=block_frames,
        warm_up_steps=warm_up_steps,
        switch_step=switch_step,
    )


def fifo(num_frames: int, num_steps: int, *, context_frames: int = 1, **options: Any) -> Timetable:
    """A queue of single frames, each at a step of its own; as many live as there are steps: `dualparal`.

    Source: FIFO-Diffusion (arXiv 2405.11473), whose model sees a run of the queue at once. Here a frame sees
    `context_frames` (0 or 1) on each side; with `moving_buffer`, of blocks of one frame, it sees all that
    live. `options` are those of `dualparal`.
    """
    return dualparal(num_frames, num_steps, block_frames=1, context_frames=context_frames, **options)
