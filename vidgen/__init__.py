"""vidgen renders long videos with a video diffusion transformer: `vidgen.Engine` is the Python face."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vidgen.engine import Engine as Engine

__version__ = "0.1.0"
__all__ = ["Engine", "__version__"]


def __getattr__(name: str) -> object:
    if name == "Engine":
        from vidgen.engine import Engine  # lazy: importing vidgen must not import torch

        return Engine
    raise AttributeError(f"module 'vidgen' has no attribute {name!r}")
