"""How a layer is run in one forward: with which attention, for which tokens, or not at all."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Self

from torch import Tensor

from vidgen.model.context import KeyValue
from vidgen.model.layers import Attend

# B batch, F latent frames, S tokens per frame, D width

NAMES = ("change", "change_key", "change_value")
STALE_NAMES = ("window_key", "window_value", "own_tokens")


@dataclass(frozen=True, slots=True)
class Change:
    """What a layer made of its tokens when it ran."""

    added_BFSD: Tensor
    own: KeyValue | None  # its keys and values, if anybody read some of them

    def tensors(self) -> dict[str, Tensor]:
        """The same by names, to be kept."""
        own = () if self.own is None else (self.own.key_BFSHD, self.own.value_BFSHD)
        return dict(zip(NAMES, (self.added_BFSD, *own), strict=False))

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Self:
        """What was kept so."""
        change, key, value = (tensors.get(name) for name in NAMES)
        assert change is not None, "a layer is left out only where its change is kept"
        return cls(change, None if key is None or value is None else KeyValue(key, value))


@dataclass(frozen=True, slots=True)
class Stale:
    """What a layer made of a window when it last ran, for tokens that are left out next time."""

    window: KeyValue
    own_BFSD: Tensor | None  # the tokens after it, of the own frames; of the last layer only

    def tensors(self) -> dict[str, Tensor]:
        """The same by names, to be kept."""
        own = () if self.own_BFSD is None else (self.own_BFSD,)
        return dict(zip(STALE_NAMES, (self.window.key_BFSHD, self.window.value_BFSHD, *own), strict=False))

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Self:
        """What was kept so."""
        key, value, own = (tensors.get(name) for name in STALE_NAMES)
        assert key is not None and value is not None, "tokens are left out only where these are kept"
        return cls(KeyValue(key, value), own)


@dataclass(frozen=True, slots=True)
class LayerRun:
    """Of one layer; by default it runs for all tokens, with the plain attention."""

    attend: Attend | None = None
    stale: Stale | None = None  # where only a region's tokens run
    keep_stale: Callable[[KeyValue, Tensor], None] | None = None  # told the window's K,V, tokens after it
    known: Change | None = None  # added in place of running it
    keep: Callable[[Change], None] | None = None  # is told what it changed
