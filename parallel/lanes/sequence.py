"""The sequence axis: ranks hold a part of each frame's tokens, and attend to all of them together.

Ulysses (arXiv 2309.14509) exchanges tokens for heads, a ring (arXiv 2310.01889) passes keys and values
around; USP (arXiv 2405.07719) is both, Ulysses inside. What is cut where is said in splits.SCHEME.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from vidgen.kernels.attention.api import attention
from vidgen.kernels.attention.cut import heads
from vidgen.kernels.attention.layout import BlockLayout
from vidgen.model.layers import Attend
from vidgen.parallel.lanes.exchange import Exchange
from vidgen.parallel.lanes.ring import attend_blocks, attend_dense
from vidgen.parallel.lanes.splits import SCHEME, Held, move
from vidgen.parallel.topology import parts

# B batch, F frames, S tokens of a frame, Q queries, K keys, H heads, D width (of a head after H)


class SplitSequence:
    """A rank's part of each frame's tokens (see model.part.Part). Any number of tokens and heads will do.

    Ring members hold rows of a frame's tokens, consecutive parts; Ulysses members parts of a row.
    """

    frames: slice | None = None

    def __init__(self, tokens_per_frame: int, ulysses: Exchange, ring: Exchange) -> None:
        self.ulysses, self.ring, self.tokens_per_frame = ulysses, ring, tokens_per_frame
        size = ulysses.size
        held = parts(tokens_per_frame, ring.size * size)
        self._rows = tuple(
            range(held[row * size].start, held[(row + 1) * size - 1].stop) for row in range(ring.size)
        )
        row = self._rows[ring.index]
        own_row = held[ring.index * size : (ring.index + 1) * size]
        self._own_row = tuple(range(part.start - row.start, part.stop - row.start) for part in own_row)
        own = own_row[ulysses.index]
        self.tokens = slice(own.start, own.stop)

    @property
    def bytes_sent(self) -> int:
        """To the other ranks."""
        return self.ulysses.bytes_sent + self.ring.bytes_sent

    def cut(self, x_BFSD: Tensor) -> Tensor:
        """The part at hand of all tokens."""
        return self._across("cut tokens", self._across("cut rows", x_BFSD))

    def gather(self, x_BFSD: Tensor) -> Tensor:
        """All tokens, from every rank's part."""
        return self._across("gather rows", self._across("gather tokens", x_BFSD))

    def around(
        self,
        attend: Attend,
        key_frames: int,
        *,
        query_frames: int,
        layout: BlockLayout | None = None,
        is_plain: bool = True,
    ) -> Attend:
        """Attention of the tokens at hand to all, from `attend`, which is that of all to all. See Part.

        ValueError for a ring with attention that is not plain: its results cannot be merged.
        """
        if self.ring.size > 1 and not is_plain:
            raise ValueError(
                f"ring={self.ring.size} with adaptive sparsity: a ring does dense and windowed attention; "
                f"take ring=1 and ulysses={self.ring.size * self.ulysses.size}"
            )
        if self.ring.size == self.ulysses.size == 1:
            return attend
        layout = layout if is_plain else None

        def attend_all(query_BQHD: Tensor, key_BKHD: Tensor, value_BKHD: Tensor) -> Tensor:
            tokens = len(self._own_row[self.ulysses.index])
            framed = [query_BQHD.unflatten(1, (query_frames, tokens))]
            framed += [tensor.unflatten(1, (key_frames, tokens)) for tensor in (key_BKHD, value_BKHD)]
            held = Held(tokens=self._own_row, heads=parts(query_BQHD.shape[2], self.ulysses.size))
            whole = move(SCHEME["to heads"], self.ulysses, framed, held)
            out_BFSHD = self._attend_heads(attend, whole, layout, held.heads[self.ulysses.index])
            (mine,) = move(SCHEME["from heads"], self.ulysses, [out_BFSHD], held)
            return mine.flatten(1, 2)

        return attend_all

    def _attend_heads(
        self, attend: Attend, tensors: Sequence[Tensor], layout: BlockLayout | None, of: range
    ) -> Tensor:
        """Attention [B, F, S, H, D] of a row's queries to all keys, for the heads at hand."""
        query_BFSHD, key_BFSHD, value_BFSHD = tensors
        own_layout = heads(layout, of) if layout is not None and of else None
        if self.ring.size > 1:
            if own_layout is None:
                return attend_dense(self.ring, query_BFSHD, key_BFSHD, value_BFSHD, self._rows)
            return attend_blocks(self.ring, query_BFSHD, key_BFSHD, value_BFSHD, self._rows, own_layout)
        if not query_BFSHD.numel():  # more ranks than heads
            return torch.zeros_like(query_BFSHD)
        flat = [tensor.flatten(1, 2) for tensor in tensors]
        if own_layout is None:
            return attend(flat[0], flat[1], flat[2]).view(query_BFSHD.shape)
        return attention(flat[0], flat[1], flat[2], layout=own_layout).view(query_BFSHD.shape)

    def _across(self, name: str, x_BFSD: Tensor) -> Tensor:
        boundary = SCHEME[name]
        over_rows = boundary.axis == "ring"
        exchange, tokens = (self.ring, self._rows) if over_rows else (self.ulysses, self._own_row)
        return move(boundary, exchange, [x_BFSD], Held(tokens=tokens))[0]
