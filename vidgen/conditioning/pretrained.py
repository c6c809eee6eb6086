"""Encoders that transformers or Wan wrote: read, checked name by name, and let go after use."""

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Native:
    """One of Wan's own tensors, by transformers' names; more than one name: stacked along dim 0."""

    native: str
    theirs: tuple[str, ...]
    ones: int = 0  # leading dims of size 1 that transformers' tensor lacks


def count_layers(tensors: Mapping[str, Tensor], prefix: str) -> int:
    """How many layers the names of the form PREFIX0.what speak of."""
    layers = (name.removeprefix(prefix).split(".")[0] for name in tensors if name.startswith(prefix))
    return 1 + max(int(layer) for layer in layers if layer.isdigit())


def load_pretrained(
    model_class: Any, path: Path, dtype: torch.dtype, shown: Mapping[str, str], **more: Any
) -> Any:
    """A transformers model from what its save_pretrained wrote at `path`, or from a state_dict in `more`.

    `shown` are names for errors in place of transformers'. ValueError in one line for what cannot be read.
    """
    try:
        with quietly():
            model, report = model_class.from_pretrained(
                None if "state_dict" in more else path, dtype=dtype, local_files_only=True,
                output_loading_info=True, ignore_mismatched_sizes=True, **more,
            )  # fmt: skip
    except (OSError, SafetensorError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"{path}: no readable {model_class.__name__} ({reason})") from error
    report["mismatched_keys"] = {name for name, *_ in report["mismatched_keys"]}
    kinds = {
        "missing": "missing_keys",
        "unexpected": "unexpected_keys",
        "of another shape": "mismatched_keys",
    }
    faults = [
        f"{kind}: {', '.join(sorted({shown.get(name, name) for name in report[key]}))}"
        for kind, key in kinds.items()
        if report[key]
    ]
    if faults:
        raise ValueError(f"{path}: not the tensors of a {model_class.__name__}; {'; '.join(faults)}")
    return model.eval().requires_grad_(False)


def load_native(
    model_class: Any,
    path: Path,
    dtype: torch.dtype,
    table: Sequence[Native],
    config_of: Callable[[Mapping[str, Tensor]], Any],
    ignored: tuple[str, ...] = (),
) -> Any:
    """The same model from a file of Wan's own names; `ignored` are prefixes of what it holds besides."""
    tensors = {name: t for name, t in read_native(path).items() if not name.startswith(ignored)}
    try:
        config = config_of(tensors)
    except KeyError as error:
        raise ValueError(f"{path}: not Wan's {model_class.__name__}; missing: {error.args[0]}") from error
    state, shown = {}, {}
    for row in table:
        for layer in range(config.num_hidden_layers if "{}" in row.native else 1):
            native, theirs = row.native.format(layer), [name.format(layer) for name in row.theirs]
            shown |= dict.fromkeys(theirs, native)
            if native in tensors:
                tensor = tensors.pop(native)
                if tensor.shape[: row.ones] == (1,) * row.ones:
                    tensor = tensor.reshape(tensor.shape[row.ones :])
                state |= zip(theirs, tensor.tensor_split(len(theirs)), strict=True)
    return load_pretrained(model_class, path, dtype, shown, config=config, state_dict=state | tensors)


def read_native(path: Path) -> dict[str, Tensor]:
    """Tensors by name of a .pth or .safetensors file, their bytes mapped and not read yet."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return dict(torch.load(path, map_location="cpu", mmap=True, weights_only=True))
    except Exception as error:  # of no common class: pickled code, no mmap in an old format, a cut file
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"{path}: not a file of plain tensors that torch can map ({reason})") from error


@contextmanager
def quietly() -> Iterator[None]:
    """transformers without its progress bars and reports; what they say is checked and raised here."""
    from transformers.utils import logging

    verbosity, has_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if has_bars:
            logging.enable_progress_bar()


def release_memory() -> None:
    """Give back what a model that nobody refers to any more held."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
