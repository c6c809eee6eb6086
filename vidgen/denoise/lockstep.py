"""All frames take each step together, but attend by clips: each sees its neighbours and a few far frames.

Source: Video-Infinity (arXiv 2406.16260): a clip's frames attend to the clip, to frames on each side of it
(its halo) and to frames spread evenly over the whole video, the same for all clips. Positions are those of
the whole video, so that a halo needs no turning. A far frame would stand further away than the model was
trained for: its keys are turned to stand right outside the window, in order. Rotations compose, so a key
turned for frame p is turned on by p' - p along time; rows and columns stay.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby

import torch
from torch import Tensor

from vidgen.kernels.attention.api import attention
from vidgen.kernels.rope.reference import rotate
from vidgen.model.context import Context
from vidgen.model.dit import DiTConfig, Grid
from vidgen.model.layers import Attend
from vidgen.model.rope import axis_widths

# B batch, F frames, S tokens per frame (at hand), Q query tokens, K key tokens, H heads, D head width

Inner = Callable[[int, int], Attend]  # of so many query frames to so many key frames


@dataclass(frozen=True, kw_only=True, slots=True)
class Clips:
    """Which frames of a video each clip holds and sees. ValueError for sizes that make no clips."""

    num_frames: int
    clip_frames: int
    halo_frames: int
    global_frames: int = 0  # of the whole video; a clip sees those that its window does not hold

    def __post_init__(self) -> None:
        bounds = {
            "num_frames": (self.num_frames, 1),
            "block_frames": (self.clip_frames, 1),
            "context_frames": (self.halo_frames, 0),
            "global_frames": (self.global_frames, 0),
        }
        for name, (value, low) in bounds.items():
            if value < low:
                raise ValueError(f"{name}={value}: allowed is at least {low}")

    @property
    def num_clips(self) -> int:
        return -(-self.num_frames // self.clip_frames)

    def own(self, clip: int) -> range:
        """The clip's frames; the last clip may be shorter."""
        start = clip * self.clip_frames
        return range(start, min(start + self.clip_frames, self.num_frames))

    def window(self, clip: int) -> range:
        """The clip's frames and its halo."""
        own = self.own(clip)
        return range(max(0, own.start - self.halo_frames), min(own.stop + self.halo_frames, self.num_frames))

    def globals(self, clip: int) -> tuple[int, ...]:
        """The far frames that the clip sees, in order."""
        count = min(self.global_frames, self.num_frames)
        spread = ((2 * index + 1) * self.num_frames // (2 * count) for index in range(count))
        return tuple(frame for frame in spread if frame not in self.window(clip))

    @lru_cache(maxsize=4096)  # noqa: B019 - of plain numbers, and asked for in every layer of every step
    def seen(self, clip: int) -> tuple[tuple[int, int], ...]:
        """(frame, where its keys stand) of all that the clip sees, in order."""
        window = self.window(clip)
        before = [frame for frame in self.globals(clip) if frame < window.start]
        after = [frame for frame in self.globals(clip) if frame >= window.stop]
        places = range(window.start - len(before), window.stop + len(after))
        return tuple(zip([*before, *window, *after], places, strict=True))


def dense(query_frames: int, key_frames: int) -> Attend:
    """Every query sees every key."""
    return attention


class ClipAttention:
    """The self-attention of layers in lock step; nothing of it outlives a forward."""

    def __init__(self, clips: Clips, config: DiTConfig, layers: range) -> None:
        self.clips, self.layers = clips, layers
        self.head_width, self.theta = config.width // config.num_heads, config.rope_theta

    def attends(self, block: int, step: int, run: int, grid: Grid, context: Context) -> list[Attend]:
        """Of each layer at hand, with all of the video at hand."""

        def attend(query_BQHD: Tensor, key_BKHD: Tensor, value_BKHD: Tensor) -> Tensor:
            return self.attend(query_BQHD, key_BKHD, value_BKHD)

        return [attend] * len(self.layers)

    def end_tick(self, tick: int) -> None:
        """Nothing is kept."""

    def attend(
        self,
        query_BQHD: Tensor,
        key_BKHD: Tensor,
        value_BKHD: Tensor,
        inner: Inner = dense,
        *,
        clips: range | None = None,
        frames: Sequence[int] | None = None,
    ) -> Tensor:
        """Attention [B, Q, H, D] of consecutive clips (all) to keys of these frames, in order (all)."""
        clips = range(self.clips.num_clips) if clips is None else clips
        frames = range(self.clips.num_frames) if frames is None else frames
        tokens = key_BKHD.shape[1] // len(frames)
        keys, values = (
            dict(zip(frames, tensor.unflatten(1, (len(frames), tokens)).unbind(1), strict=True))
            for tensor in (key_BKHD, value_BKHD)
        )
        own = [len(self.clips.own(clip)) for clip in clips]
        queries = query_BQHD.split([num_frames * tokens for num_frames in own], dim=1)
        outs = []
        for clip, num_frames, query in zip(clips, own, queries, strict=True):
            seen = self.clips.seen(clip)
            placed = torch.cat([part.flatten(1, 2) for part in self._placed(keys, seen)], dim=1)
            shown = torch.cat([values[frame] for frame, _ in seen], dim=1)
            outs.append(inner(num_frames, len(seen))(query.contiguous(), placed, shown))
        return torch.cat(outs, dim=1)

    def _placed(self, keys: dict[int, Tensor], seen: Sequence[tuple[int, int]]) -> Iterator[Tensor]:
        """Keys [B, F, S, H, D] of the frames that a clip sees, turned for where they stand."""
        for moves, frames in groupby(seen, key=lambda at: at[0] != at[1]):
            here = list(frames)
            key_BFSHD = torch.stack([keys[frame] for frame, _ in here], dim=1)
            if moves:
                by = tuple(place - frame for frame, place in here)
                tokens, device = key_BFSHD.shape[2], key_BFSHD.device
                turns = turns_in_time(by, tokens, self.head_width, self.theta, device)
                key_BFSHD = rotate(key_BFSHD.flatten(1, 2), *turns).view_as(key_BFSHD)
            yield key_BFSHD


@lru_cache(maxsize=1024)
@torch.inference_mode(False)  # kept for later calls
def turns_in_time(
    by: tuple[int, ...], tokens: int, head_width: int, theta: float, device: torch.device
) -> tuple[Tensor, Tensor]:
    """(cosines, signed sines) [F*S, 1, D] that move each frame's keys so many frames on.

    See vidgen/model/rope.py.
    """
    temporal, *spatial = axis_widths(head_width)
    frequencies = theta ** (-torch.arange(0, temporal, 2, dtype=torch.float64) / temporal)
    still = torch.zeros(len(by), sum(spatial) // 2, dtype=torch.float64)
    angles = torch.cat((torch.tensor(by)[:, None] * frequencies, still), dim=1)  # [F, D/2]
    cosines, sines = angles.cos().float(), angles.sin().float()
    tables = cosines.repeat_interleave(2, dim=1), torch.stack((-sines, sines), dim=-1).flatten(1)
    turned, signed = (table.repeat_interleave(tokens, dim=0).unsqueeze(1).to(device) for table in tables)
    return turned, signed
