"""Some of a window's tokens, while others are elsewhere: what the model has to know of it."""

from typing import Protocol

from vidgen.kernels.attention.layout import BlockLayout
from vidgen.model.layers import Attend


class Part(Protocol):
    """A cut of a window's tokens [F, S], and the way to the rest of them in self-attention.

    All else that a layer does is done token by token, and the same wherever they are.
    """

    @property
    def frames(self) -> slice | None:
        """The frames at hand; None: all."""
        ...

    @property
    def tokens(self) -> slice:
        """Those at hand of each frame's."""
        ...

    def around(
        self, attend: Attend, key_frames: int, *, query_frames: int, layout: BlockLayout | None = None,
        is_plain: bool = True,
    ) -> Attend:  # fmt: skip
        """Attention of the tokens at hand to all, from `attend`, which is that of all to all.

        Queries [B, F*S, H, D] and keys [B, key_frames*S, H, D] are those at hand, frame after frame; where
        all frames are at hand, the queries have `query_frames`.
        `is_plain`: `attend` is attention with this layout, or to every key without one.
        """
        ...
