"""What an ablation is, as people type it: a grid of jobs, and the one that the others are held against."""

import hashlib
import itertools
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from vidgen.config import JobConfig, parse_job, read_yaml
from vidgen.sections import Strict, Text
from vidgen.speeds import LEVELS

EXACT = "exact"
MAX_CELLS = 1000
TELLING = ("method", "policy", "timetable", "context_mode")  # settings whose values need no name beside them
NOT_OF_A_CELL = ("prompt", "segments", "seed", "output")

Settings = dict[str, Any]  # a job's, by the path of each: {"queue.stride": 2}


class AblationConfig(Strict):
    """A grid of cells. A setting of a job is named by its path, such as `queue.stride`."""

    name: Text
    videos: int = Field(default=8, ge=1, le=10_000)
    """Of each cell; the same prompts and seeds in all of them."""
    prompts: tuple[Text, ...] = ()
    """By default scenes of the built-in model's world, every other one held out from its training."""
    seed: int = Field(default=0, ge=0, lt=2**62)
    """Of the first video; the next one has the next seed. It also picks the scenes."""
    job: dict[str, Any] = {}
    """What all cells share."""
    exact: dict[str, Any] = {}
    """The cell that all others are held against."""
    cells: tuple[dict[str, Any], ...] = Field(min_length=1)
    """Grids: a list of values is an axis, and each combination of an entry's axes a cell."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One way to render the videos."""

    name: str
    settings: Settings
    job: JobConfig  # of no video yet

    def job_of(self, prompt: str, seed: int, output: Path) -> JobConfig:
        """The job of one video; its clean latents are kept beside it."""
        kept = {"path": output, "save_latents": output.with_suffix(".safetensors"), "sheet": False}
        update = {"prompt": prompt, "seed": seed, "output": self.job.output.model_copy(update=kept)}
        return self.job.model_copy(update=update)

    @property
    def facts(self) -> dict[str, Any]:
        """All settings but those of a single video, ready for JSON.

        Of a step cache and a level of speed also what this version fills in: a later one's is another cell.
        """
        found = self.job.model_dump(mode="json", exclude=set(NOT_OF_A_CELL))
        found["cache"] = asdict(self.job.cache.resolved())
        if self.job.speed in LEVELS:
            found["level"] = asdict(LEVELS[self.job.speed])
        return found

    def digest(self, *others: Any) -> str:
        """Names what a result depends on: the settings, and what else is given."""
        text = json.dumps([self.facts, *others], sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:8]


def read_ablation(path: Path) -> AblationConfig:
    """The ablation of a YAML file. ValueError in one line."""
    values = read_yaml(path)
    if not isinstance(values, dict):
        raise ValueError(f"{path}: need a mapping with name and cells")
    try:
        return AblationConfig.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        known = ", ".join(AblationConfig.model_fields)
        advice = f" (known keys: {known})" if first["type"] == "extra_forbidden" else ""
        raise ValueError(f"{path}: {key}: {first['msg'].lower()}{advice}") from error


def cells_of(config: AblationConfig, source: str) -> list[Cell]:
    """All cells, the exact one first, each once. ValueError in one line for a setting that cannot be."""
    names = {name.rsplit(".", 1)[-1]: set[str]() for grid in config.cells for name in grid}
    for name in (name for grid in config.cells for name in grid):
        names[name.rsplit(".", 1)[-1]].add(name)
    found = [_cell(config, EXACT, dict(config.exact), source)]
    for grid in config.cells:
        for settings in _combinations(grid):
            words = [_word(name, value, names) for name, value in settings.items()]
            cell = _cell(config, " ".join(words) or EXACT, settings, source)
            if all(cell.facts != other.facts for other in found):
                found.append(cell)
    if len(found) > MAX_CELLS:
        raise ValueError(f"{source}: {len(found)} cells; need {MAX_CELLS} at most")
    return found


def _combinations(grid: dict[str, Any]) -> Iterator[Settings]:
    axes = [value if isinstance(value, list) else [value] for value in grid.values()]
    return (dict(zip(grid, values, strict=True)) for values in itertools.product(*axes))


def _word(name: str, value: Any, names: dict[str, set[str]]) -> str:
    last = name.rsplit(".", 1)[-1]
    shown = "+".join(map(str, value)) if isinstance(value, list) else str(value)
    if last in TELLING:
        return f"no {name.split('.')[-2]}" if shown == "none" else shown
    return f"{last if len(names[last]) == 1 else name}={shown}"


def _cell(config: AblationConfig, name: str, settings: Settings, source: str) -> Cell:
    values: dict[str, Any] = {}
    for path, value in {**_flat(config.job), **settings}.items():
        *rooms, last = str(path).split(".")
        if (rooms or [last])[0] in NOT_OF_A_CELL:
            raise ValueError(f"{source}: {path}: is a video's own; set prompts, videos or seed instead")
        room = values
        for part in rooms:
            room = room.setdefault(part, {})
            if not isinstance(room, dict):
                raise ValueError(f"{source}: {path}: {part} is set as a whole as well; give one of them")
        room[last] = value
    return Cell(name=name, settings=settings, job=parse_job(values, f"{source}: cell {name!r}"))


def _flat(values: dict[str, Any], before: str = "") -> Settings:
    """Settings by their paths."""
    found: Settings = {}
    for name, value in values.items():
        if isinstance(value, dict) and value:
            found |= _flat(value, f"{before}{name}.")
        else:
            found[f"{before}{name}"] = value
    return found
