"""`vidgen train`: make a model."""

import difflib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vidgen.cli_exit import OK, write_line

if TYPE_CHECKING:
    from vidgen.train.trainer import TrainConfig

Json = Annotated[bool, typer.Option("--json", help="JSON on stdout")]


def train(
    config: Annotated[Path, typer.Option("--config", metavar="FILE", help="YAML of a training run")],
    run: Annotated[Path, typer.Option("--run", metavar="DIR", help="the run's folder; goes on if it is one")],
    steps: Annotated[
        int | None, typer.Option("--steps", min=1, metavar="N", help="instead of the file's num_steps")
    ] = None,
    as_json: Json = False,
) -> int:
    """Train a model of the built-in family; the result is RUN/model.safetensors."""
    chosen = read_train_config(config, {} if steps is None else {"num_steps": steps})
    if run.exists() and not run.is_dir():
        raise ValueError(f"--run {run}: is a file; give a folder")

    from vidgen.train.trainer import train as run_training

    def report(row: dict[str, Any]) -> None:
        text = json.dumps(row) if as_json else "  ".join(f"{key} {value}" for key, value in row.items())
        write_line("stdout", text)

    try:
        run_training(chosen, run, report)
    except OSError as error:
        raise ValueError(f"--run {run}: {error}") from error
    write_line("stderr" if as_json else "stdout", f"model   {run / 'model.safetensors'}")
    return OK


def read_train_config(path: Path, instead: dict[str, Any]) -> "TrainConfig":
    """A training run from a YAML file, `instead` winning over it. ValueError in one line."""
    from pydantic import TypeAdapter, ValidationError

    from vidgen.config import read_yaml
    from vidgen.train.trainer import TrainConfig
    from vidgen.world import WORLDS

    values = read_yaml(path)
    if not isinstance(values, dict):
        found = "nothing" if values is None else type(values).__name__
        raise ValueError(f"{path}: need a mapping of settings, found {found}")
    known = list(TrainConfig.__dataclass_fields__)
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.5)
            advice = f"did you mean {near[0]}?" if near else f"known keys: {', '.join(known)}"
            raise ValueError(f"{path}: unknown key {key}; {advice}")
    try:
        chosen = TypeAdapter(TrainConfig).validate_python({**values, **instead})
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise ValueError(f"{path}: {key}={first['input']!r}: {first['msg']}") from error
    if chosen.world not in WORLDS:
        raise ValueError(f"{path}: world={chosen.world!r}: there are {', '.join(WORLDS)}")
    return chosen
