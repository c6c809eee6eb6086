"""Some tokens of a window's own frames run through the layers; the others are seen as they were last time."""

from dataclasses import dataclass

import torch
from torch import Tensor

from vidgen.model.context import KeyValue

# B batch, F own frames, W frames of the window, S tokens of a frame, A those that run, H heads, D width


@dataclass(frozen=True, slots=True)
class Region:
    """The tokens that run: as many of every own frame. Frames before the own ones do not run at all."""

    index_FA: Tensor  # int64, ascending
    tokens_per_frame: int
    frames_before: int = 0

    @classmethod
    def of(cls, active_FS: Tensor, frames_before: int = 0) -> "Region":
        """From zeros and ones, as many of these in every frame."""
        frames, tokens = active_FS.shape
        index = active_FS.flatten().nonzero().view(frames, -1) % tokens
        return cls(index, tokens, frames_before)

    @property
    def active_FS(self) -> Tensor:
        """Zeros and ones."""
        frames = self.index_FA.shape[0]
        zeros = torch.zeros(frames, self.tokens_per_frame, device=self.index_FA.device)
        return zeros.scatter_(1, self.index_FA, 1.0)

    def cut(self, own_BFSD: Tensor) -> Tensor:
        """Those that run [B, F, A, D], of all of the own frames."""
        batch, frames, _, width = own_BFSD.shape
        index = self.index_FA[None, :, :, None].expand(batch, frames, -1, width)
        return own_BFSD.gather(2, index)

    def fill(self, own_BFSD: Tensor, new_BFAD: Tensor) -> Tensor:
        """All of the own frames [B, F, S, D], with those that ran anew."""
        index = self.index_FA[None, :, :, None].expand_as(new_BFAD)
        return own_BFSD.scatter(2, index, new_BFAD)

    def window(self, stale: KeyValue, own: KeyValue) -> KeyValue:
        """Keys and values of the whole window [B, W, S, H, D], with those of the tokens that ran anew."""

        def filled(stale_BWSHD: Tensor, new_BFAHD: Tensor) -> Tensor:
            before, old = stale_BWSHD[:, : self.frames_before], stale_BWSHD[:, self.frames_before :]
            new = self.fill(old.flatten(3), new_BFAHD.flatten(3)).view_as(old)
            return torch.cat((before, new), dim=1) if self.frames_before else new

        return KeyValue(filled(stale.key_BFSHD, own.key_BFSHD), filled(stale.value_BFSHD, own.value_BFSHD))

    def turns(self, turns_S1d: Tensor) -> Tensor:
        """Rotations of the tokens that run [F*A, 1, d], of those of the whole window [W*S, 1, d]."""
        frames = self.frames_before + torch.arange(len(self.index_FA), device=self.index_FA.device)
        return turns_S1d[(frames[:, None] * self.tokens_per_frame + self.index_FA).flatten()]
