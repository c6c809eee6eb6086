"""The sections of a job, as people type them; what each setting means stands under it."""

import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from vidgen.sparsity.settings import SparsitySettings
from vidgen.types import ContextMode, GuidanceMode, NoiseKind, ResidualGuidance

MAX_COUNT = 10**15  # far past any machine; keeps estimates within what a float can hold
MAX_RANKS = 4096


def _check_text(value: Any) -> Any:
    """The value, if it can be written into files and handed to the system."""
    text = str(value)
    if "\0" in text or text.encode("utf-8", "replace").decode() != text:
        raise ValueError("need text of valid UTF-8 without zero bytes")
    return value


def _check_ranks(value: Any) -> Any:
    """The value, if it is a number of ranks or `auto`; one message for both."""
    is_number = isinstance(value, int) or (isinstance(value, str) and value.strip().isdigit())
    if value == "auto" or (is_number and not isinstance(value, bool) and 1 <= int(value) <= MAX_RANKS):
        return value if value == "auto" else int(value)
    raise ValueError(f"need a whole number from 1 to {MAX_RANKS}, or auto")


Text = Annotated[str, AfterValidator(_check_text)]
Place = Annotated[Path, AfterValidator(_check_text)]


class Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class SegmentConfig(Strict):
    """A prompt and for how many frames it holds."""

    prompt: Text
    num_frames: int = Field(ge=1, le=MAX_COUNT)


class QueueConfig(Strict):
    """How the video is cut into blocks and how they stream. Frames here are latent frames."""

    timetable: (
        Literal["autoregressive", "buffer", "dualparal", "fifo", "full", "lockstep", "pipefusion"] | None
    ) = None
    """`full` denoises all frames at once, as a plain pipeline does; by default up to the length that the
    model was trained for, and `dualparal` for longer videos. `autoregressive` finishes each block before the
    next one begins, so that another prompt shows in the next block. `buffer` runs all live blocks in one
    window, for models that know mixed noise levels. `fifo` is `dualparal` with blocks of
    one frame. Approximations of `full` for more ranks: in `lockstep` all blocks take each step together, and
    each sees the frames around it and `global_frames`; `pipefusion` runs them one after the other, and each
    sees those after it as they were a step ago."""
    block_frames: int | None = Field(default=None, ge=1, le=MAX_COUNT)
    context_frames: int | None = Field(default=None, ge=0)
    stride: int = Field(default=1, ge=1)
    """Ticks between two admissions; 1 is DualParal. `autoregressive` sets it to the number of steps."""
    context_mode: ContextMode | None = None
    anchor_frames: int = Field(default=0, ge=0)
    """Frames of the first block that all later blocks see, against drift."""
    global_frames: int = Field(default=4, ge=0)
    """`lockstep`: frames spread over the whole video that all blocks see."""
    warm_up_steps: int = Field(default=1, ge=1)
    """`pipefusion`: steps in which all frames run at once, exactly, before blocks run one by one."""
    noise: NoiseKind | None = None
    guidance: GuidanceMode = GuidanceMode.SPLIT
    """Branches of guidance one by one, which fills a pipeline better, or `stacked` as one batch."""
    residual_guidance: ResidualGuidance = ResidualGuidance.NONE
    """An approximation that saves the negative branch: `onetime` runs it at a block's first step only, `self`
    never; a virtual one stands for it, see vidgen/denoise/guidance.py."""
    static_threshold: float | None = Field(default=None, ge=0, lt=1, allow_inf_nan=False)
    """An approximation for still scenes: a block may repeat the one before, the likelier the more alike the
    last two are, by the cosine of their latents, above this. `autoregressive` in one process only."""
    transition_blocks: int = Field(default=0, ge=0)
    """Blocks over which one prompt turns into the next."""


class AttentionConfig(Strict):
    """How attention is computed, and how much of it."""

    backend: Text | None = None
    """A kernel by name (see `vidgen doctor`), or `auto`: the fastest by measurement, so that last bits depend
    on the machine. By default VIDGEN_ATTENTION_BACKEND, else always the same one for a device."""
    sparsity: SparsitySettings = SparsitySettings()
    """An approximation, off by default: see vidgen/sparsity/settings.py."""


class LoraConfig(Strict):
    """A LoRA that is merged into the weights as they are read."""

    path: Place
    scale: float = Field(default=1.0, ge=-10, le=10, allow_inf_nan=False)
    expert: Literal["both", "first", "second"] = "both"
    """Of a model with two: `first` takes the noisier steps."""

    @model_validator(mode="before")
    @classmethod
    def _read(cls, value: Any) -> Any:
        """FILE:SCALE, or FILE, is the same as a mapping."""
        if not isinstance(value, str | Path):
            return value
        path, _, scale = str(value).rpartition(":")
        is_scaled = bool(path) and bool(re.fullmatch(r"[-+]?[0-9]*\.?[0-9]+", scale))
        return {"path": path, "scale": scale} if is_scaled else {"path": str(value)}


class OffloadConfig(Strict):
    """What stays off the GPU. It decides the last bits, like the device."""

    encoders: bool = False
    """Run the text and image encoders on the CPU."""
    codec: bool = False
    """Run the codec on the CPU."""


class InputConfig(Strict):
    """Pictures that the video begins with."""

    image: Place | None = None
    """The first frame."""
    last_image: Place | None = None
    """The last frame, for models that were trained for one."""
    video: Place | None = None
    """A clip to go on from: its last frames are the video's first."""
    video_frames: int = Field(default=5, ge=1, le=MAX_COUNT)
    """How many of them."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.image is not None and self.video is not None:
            raise ValueError("both image and video are given: give one of them")
        return self


class OutputConfig(Strict):
    """Where the frames go and how."""

    path: Place = Path("out.mp4")
    """`.mp4`, `.gif`, `.webp`, or a folder for PNG frames."""
    upscale: int = Field(default=1, ge=1, le=64)
    """Every pixel becomes a square of this side."""
    crf: int = Field(default=16, ge=0, le=51)
    """H.264 quality: lower is better and larger."""
    save_latents: Place | None = None
    sheet: bool = True
    """Write a contact sheet (PNG) beside the output."""

    @property
    def sheet_path(self) -> Path | None:
        """Where the contact sheet goes, if there is to be one."""
        if not self.sheet:
            return None
        name = f"{self.path.stem}.png" if self.path.suffix else f"{self.path.name}_sheet.png"
        return self.path.with_name(name)


class ParallelConfig(Strict):
    """Which ranks a render runs on, and what each does. Nothing here changes a frame, but for last bits where
    tokens are shared (`ulysses`, `ring`)."""

    ranks: Annotated[int | Literal["auto"], BeforeValidator(_check_ranks)] = 1
    """Processes that share the model's layers; `auto` takes what the cluster or this machine offers."""
    scheme: Literal["given", "auto"] = "given"
    """`auto`: the planner chooses how the ranks share the work, and with `ranks: auto` how many there are;
    the video stays the same. See `vidgen plan`."""
    hardware: Text | None = None
    """What the planner takes this machine for: a profile's name or file; by default that of the device."""
    layers_per_rank: tuple[Annotated[int, Field(ge=1)], ...] | None = None
    """The cut of the layers by hand; by default it is made from measured costs."""
    ulysses: int = Field(default=1, ge=1, le=MAX_RANKS)
    """Ranks that share the tokens of every frame, and in attention its heads (DeepSpeed-Ulysses)."""
    ring: int = Field(default=1, ge=1, le=MAX_RANKS)
    """Ranks that share the tokens of every frame and pass keys and values around; times `ulysses`."""
    guidance: int = Field(default=1, ge=1, le=2)
    """2: the branches of guidance run on different ranks. Layers are shared by
    ranks / (ulysses * ring * guidance * clip) of them."""
    clip: int = Field(default=1, ge=1, le=MAX_RANKS)
    """Ranks that share the clips of `timetable: lockstep`."""
    address: Text | None = None
    """HOST:PORT of a running Ray cluster; by default ranks are started on this machine."""
    placement: Literal["pack", "spread"] = "pack"
    """Ranks on as few or as many nodes as possible."""
    max_restarts: int = Field(default=3, ge=0, le=MAX_COUNT)
    """How often lost ranks are replaced before the render gives up, resumable."""
    min_ranks: int | None = Field(default=None, ge=2, le=MAX_RANKS)
    """After a loss go on with fewer ranks, down to this many; by default with the same number."""
    heartbeat_timeout_s: float = Field(default=15, gt=0, le=86400, allow_inf_nan=False)
    """A rank that does not answer for so long counts as lost."""
    link_timeout_s: float = Field(default=120, gt=0, le=86400, allow_inf_nan=False)
    """A rank gives up on another one that sends nothing for so long."""
    links: Literal["auto", "gloo"] = "auto"
    """`auto`: shared memory between ranks on CPUs of one node, gloo between nodes, NCCL between GPUs."""
    queue_blocks: int = Field(default=4, ge=1, le=MAX_COUNT)
    """Finished blocks that may wait for the disk before denoising pauses."""
    trace: bool = True
    """Keep what ran when in the job folder, for tools/trace_pipeline.py."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        axes = [axis for axis in ("ulysses", "ring", "guidance", "clip") if getattr(self, axis) > 1]
        if self.scheme == "auto" and (axes or self.layers_per_rank):
            given = ", ".join([*axes, *(["layers_per_rank"] if self.layers_per_rank else [])])
            raise ValueError(f"scheme=auto chooses {given}: leave out one or the other")
        if self.min_ranks is not None and self.ranks != "auto" and self.min_ranks > max(self.ranks, 2):
            raise ValueError(f"min_ranks={self.min_ranks} is more than ranks={self.ranks}; make it less")
        return self
