"""The clip axis: ranks hold runs of whole clips in lock step, and fetch what these see of the others' frames.

At every layer one all-to-all carries keys and values of halos and of the far frames that all clips share. All
else of a layer is done frame by frame.
"""

from itertools import chain

import torch
from torch import Tensor

from vidgen.denoise.lockstep import ClipAttention, Inner, dense
from vidgen.parallel.lanes.exchange import Exchange
from vidgen.parallel.topology import parts

# B batch, F frames, S tokens per frame (at hand), Q query tokens, K key tokens, H heads, D head width


class SplitClips:
    """A rank's clips. ValueError when there are fewer clips than ranks to share them."""

    def __init__(self, attention: ClipAttention, exchange: Exchange) -> None:
        clips = attention.clips
        if exchange.size > clips.num_clips:
            raise ValueError(
                f"clip={exchange.size}: the video has {clips.num_clips} clips of {clips.clip_frames} latent "
                f"frames; take clip=1 to {clips.num_clips}, or a smaller block_frames"
            )
        self.attention, self.exchange = attention, exchange
        held = parts(clips.num_clips, exchange.size)
        self.clips = held[exchange.index]
        self._frames = [range(clips.own(lane[0]).start, clips.own(lane[-1]).stop) for lane in held]
        seen = [sorted({frame for clip in lane for frame, _ in clips.seen(clip)}) for lane in held]
        own = self._frames[exchange.index]
        self._sent = [[frame - own.start for frame in frames if frame in own] for frames in seen]
        self._fetched = [[f for f in seen[exchange.index] if f in frames] for frames in self._frames]

    @property
    def frames(self) -> slice:
        """Those at hand, of the whole video's."""
        own = self._frames[self.exchange.index]
        return slice(own.start, own.stop)

    @property
    def bytes_sent(self) -> int:
        """To ranks that hold other clips."""
        return self.exchange.bytes_sent

    def attend(
        self, query_BQHD: Tensor, key_BKHD: Tensor, value_BKHD: Tensor, inner: Inner = dense
    ) -> Tensor:
        """Attention [B, Q, H, D] of the frames at hand, from their queries, keys and values.

        Bit for bit that of one process, where `inner` is.
        """
        num_frames = len(self._frames[self.exchange.index])
        pair = torch.stack((key_BKHD, value_BKHD))  # one message for each rank
        pair = pair.unflatten(2, (num_frames, key_BKHD.shape[1] // num_frames))  # [2, B, F, S, H, D]
        sent = [pair[:, :, frames] for frames in self._sent]
        shapes = [(*pair.shape[:2], len(frames), *pair.shape[3:]) for frames in self._fetched]
        keys, values = torch.cat(self.exchange.swap(sent, shapes), dim=2).flatten(2, 3)
        frames = list(chain(*self._fetched))
        return self.attention.attend(query_BQHD, keys, values, inner, clips=self.clips, frames=frames)

    def gather(self, x_BF: Tensor, dim: int = 1) -> Tensor:
        """All frames, along this dimension, from those at hand."""
        shapes = [(*x_BF.shape[:dim], len(frames), *x_BF.shape[dim + 1 :]) for frames in self._frames]
        return torch.cat(self.exchange.gather(x_BF, shapes), dim=dim)
