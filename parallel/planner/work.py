"""What there is to do in a render: FLOPs, frames, numbers of weights. From shapes, without a machine."""

from dataclasses import dataclass
from math import ceil, prod

from vidgen.denoise.lockstep import Clips
from vidgen.denoise.timetable import Timetable
from vidgen.model.dit import DiTConfig
from vidgen.model.dtypes import DTYPES
from vidgen.parallel.simulation.workload import Item
from vidgen.parallel.topology import Axis
from vidgen.stepcache.cache import StepCache
from vidgen.types import ContextMode


@dataclass(frozen=True, kw_only=True, slots=True)
class Film:
    """What is rendered, whatever the plan."""

    dit: DiTConfig
    num_experts: int
    num_frames: int  # latent
    num_steps: int
    latent_rows: int
    latent_columns: int
    text_tokens: int
    branches: int  # of guidance, at every step but perhaps the first
    stacked: bool  # branches as one batch
    pixels_per_frame: int  # that a latent frame stands for
    decode_bytes: int = 0
    cache: StepCache | None = None  # every step is run without
    levels: tuple[float, ...] = ()  # of noise, at every step and after the last; a cache's rules are by them
    closed_axes: frozenset[Axis] = frozenset()  # ways to share the work that the job's settings do not know

    @property
    def tokens_per_frame(self) -> int:
        return self.latent_rows * self.latent_columns // prod(self.dit.patch)

    @property
    def elements_per_frame(self) -> int:
        """Of latents."""
        return self.dit.latent_channels * self.latent_rows * self.latent_columns

    @property
    def token_bytes(self) -> int:
        """Of one number of a token."""
        return DTYPES[self.dit.dtype].itemsize


def largest_item(timetable: Timetable, clips: Clips | None = None) -> Item:
    """A run of the model in the middle of the render, when most blocks are live."""
    own, context = min(timetable.block_frames, timetable.num_frames), timetable.context_frames
    if clips is not None:
        return Item(own)
    if timetable.is_patched:
        return Item(timetable.num_frames)
    live = min(ceil(timetable.num_steps / timetable.stride), timetable.num_blocks)
    if timetable.joint:
        own, live = min(live * own, timetable.num_frames), 1
    before = context if timetable.num_blocks > 1 else 0
    anchor = timetable.anchor_frames if timetable.num_blocks > 2 else 0
    after = context if live > 1 else 0
    if timetable.mode == ContextMode.RECOMPUTE:
        return Item(own, before, after + anchor)
    return Item(own, 0, before + after + anchor)


def linear_flops(dit: DiTConfig, tokens: float, text_tokens: int) -> float:
    """Of a layer without its self-attention: projections, cross-attention, feed-forward."""
    width, hidden = dit.width, dit.ffn_width
    keys = text_tokens + dit.image_tokens
    per_token = 4 * width**2 + 2 * width**2 + 2 * width * hidden + 2 * keys * width
    return 2 * tokens * per_token + 4 * keys * width**2


def attention_flops(width: float, queries: float, keys: float) -> float:
    """Of scores and values, all heads together being of that width."""
    return 4 * queries * keys * width


def end_flops(dit: DiTConfig, tokens: int, channels: float) -> float:
    """Of embedding or projecting so many tokens."""
    return 2 * tokens * (9 if dit.convolutions else 1) * channels * dit.width


def layer_parameters(dit: DiTConfig) -> int:
    """Numbers of one layer."""
    width, hidden = dit.width, dit.ffn_width
    attention = 4 * (width**2 + width) + 2 * width
    image = 2 * (width**2 + width) + width if dit.image_tokens else 0
    return 2 * attention + image + 2 * width + 2 * width * hidden + hidden + width + 6 * width


def first_parameters(dit: DiTConfig) -> int:
    """Numbers that only a lane's first stage holds."""
    width, taps = dit.width, 9 if dit.convolutions else 1
    channels = (dit.latent_channels + dit.condition_channels) * prod(dit.patch)
    embedding = taps * channels * width + width
    text = dit.text_width * width + width + width**2 + width
    noise = dit.num_frequencies * width + width + width**2 + width + 6 * width**2 + 6 * width
    image = 0
    if dit.image_width is not None:
        inner = dit.image_width
        image = 2 * inner + 2 * width + inner**2 + inner + inner * width + width
        image += dit.image_tokens * inner if dit.image_positions else 0
    return embedding + text + noise + image + (dit.latent_channels if dit.linear_skip else 0)


def out_channels(dit: DiTConfig) -> int:
    """Channels of a token's projection."""
    return dit.latent_channels * prod(dit.patch) * (2 if dit.linear_skip else 1)


def last_parameters(dit: DiTConfig) -> int:
    """Numbers that only a lane's last stage holds."""
    taps = 9 if dit.convolutions else 1
    return 2 * dit.width + taps * dit.width * out_channels(dit) + out_channels(dit)


def share(total: int, num_parts: int) -> int:
    """The largest of `num_parts` parts of `total` things."""
    return ceil(total / num_parts)


def first_channels(dit: DiTConfig) -> int:
    """Input channels of a token's embedding."""
    return (dit.latent_channels + dit.condition_channels) * prod(dit.patch)
