"""What a job gives of the video itself: an image that it begins with, a clip that it goes on from."""

from dataclasses import dataclass

import torch
from torch import Tensor

# C latent channels, F latent frames, Y X latent rows and columns, M image tokens, I image feature width


@dataclass(frozen=True, kw_only=True)
class Given:
    """Plain tensors, the same for every branch of guidance; frames are numbered from the video's start."""

    pinned_CFYX: Tensor | None = None  # clean latents of the video's first frames, which stay as they are
    channels_CFYX: Tensor | None = None  # channels beside the latents; the last frame's hold for all after it
    image_BMI: Tensor | None = None  # features of the image, for cross-attention

    @property
    def num_pinned(self) -> int:
        """How many frames are known."""
        return 0 if self.pinned_CFYX is None else self.pinned_CFYX.shape[1]

    @property
    def num_given(self) -> int:
        """How many of the first frames differ from those after them in what is given."""
        channels = 0 if self.channels_CFYX is None else self.channels_CFYX.shape[1]
        return max(self.num_pinned, channels)

    def pin(
        self, latents_BCFYX: Tensor, first_frame: int, levels: list[float] | None = None
    ) -> tuple[Tensor, list[float]]:
        """Latents that begin at a frame of the video, known frames clean in them; their levels, 0 there."""
        levels = list(levels or [])
        count = min(self.num_pinned - first_frame, latents_BCFYX.shape[2])
        if self.pinned_CFYX is None or count <= 0:
            return latents_BCFYX, levels
        known = self.pinned_CFYX[:, first_frame : first_frame + count].to(latents_BCFYX).unsqueeze(0)
        pinned = torch.cat([known, latents_BCFYX[:, :, count:]], dim=2)
        return pinned, [0.0] * min(count, len(levels)) + levels[count:]

    def channels(self, first_frame: int, num_frames: int, like: Tensor) -> Tensor | None:
        """Extra channels [1, C, F, Y, X] of some frames; None when the model has none."""
        if self.channels_CFYX is None:
            return None
        last = self.channels_CFYX.shape[1] - 1
        frames = [min(frame, last) for frame in range(first_frame, first_frame + num_frames)]
        return self.channels_CFYX[:, frames].to(like).unsqueeze(0)


NOTHING = Given()


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What a job's texts and pictures become before denoising; kept with the job, so made only once."""

    texts: dict[str, Tensor]  # by prompt, [1, N, T]
    given: Given = NOTHING
