"""From the name of a model to its family."""

from collections.abc import Sequence
from pathlib import Path

from vidgen.builtin import BUILTIN_PATH
from vidgen.families.family import Family
from vidgen.families.small import SmallFamily
from vidgen.model.dtypes import DType
from vidgen.sections import LoraConfig, OffloadConfig

NO_OFFLOAD = OffloadConfig()


def open_model(
    name: str,
    *,
    dtype: DType | None = None,
    loras: Sequence[LoraConfig] = (),
    tile: int | None = None,
    offload: OffloadConfig = NO_OFFLOAD,
    text_cache: Path | None = None,
) -> Family:
    """The model of that name: `builtin`, a file of vidgen's own, or a folder of Wan's or diffusers'.

    No weights of a DiT are read. ValueError in one line when there is none, or it cannot be told what it is.
    """
    checkpoint = BUILTIN_PATH if name == "builtin" else Path(name)
    if checkpoint.is_dir():
        from vidgen.families.wan import WanFamily

        return WanFamily(checkpoint, dtype, loras, tile=tile, offload=offload, text_cache=text_cache)
    if not checkpoint.is_file():
        raise ValueError(f"model={name}: no such model, file or folder; `vidgen models` lists what there is")
    if tile is not None:
        raise ValueError(f"tile={tile}: {name} decodes frames whole; leave it out")
    return SmallFamily(name, checkpoint, dtype, loras)
