"""Runs an ablation: cell after cell, video after video, each kept as soon as it is there.

A study is a folder: FOLDER/cells/NAME-DIGEST has a cell's videos (.mp4, and their clean latents) and a line
of figures for each in videos.jsonl. The same call made again goes on with what is missing. The digest is of
the cell's settings, the exact cell's and the model, so that a grid may grow: what it has in common with the
one before is not rendered again.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path

from torch import Tensor

from vidgen.ablate.figures import Eyes, cell_figures, set_figures
from vidgen.ablate.rendering import CellFailed, Worker
from vidgen.ablate.scenes import prompts_of
from vidgen.ablate.settings import AblationConfig, Cell
from vidgen.journal import hold
from vidgen.measure.keeping import Row, kept_rows
from vidgen.measure.summary import plain, shrink
from vidgen.render import load_engine

DONE, FAILED, IMPOSSIBLE = "done", "failed", "impossible"
MARK = "ablation.json"


class Stopped(Exception):
    """A study was asked to stop; what is finished is kept."""


class Study:
    """An ablation in its folder. ValueError for a folder that holds something else."""

    def __init__(self, config: AblationConfig, cells: Sequence[Cell], folder: Path, timeout_s: float) -> None:
        self.config, self.cells, self.folder, self.timeout_s = config, cells, folder, timeout_s
        self.prompts = prompts_of(config)
        if folder.exists() and any(folder.iterdir()) and not (folder / MARK).exists():
            raise ValueError(f"{folder}: is not an ablation's folder and not empty; choose another -o")
        self.engine = load_engine(cells[0].job)
        self._eyes = Eyes(self.engine)
        self._model = self.engine.sha256()
        self._should_stop: Callable[[], bool] = lambda: False
        self._exact_rows: list[Row] = []
        self._small: dict[Path, Tensor] = {}  # the exact cell's videos and those of the cell at hand, shrunk

    @property
    def exact(self) -> Cell:
        """What the others are held against."""
        return self.cells[0]

    def run(self, done: Callable[[Row], None], should_stop: Callable[[], bool] = lambda: False) -> list[Row]:
        """A row per cell, told of as it is done. Stopped when asked to, after a video.

        A cell that cannot be, or fails, has a row that says why; the others go on. ValueError when that is
        the exact one.
        """
        self._should_stop = should_stop
        self.folder.mkdir(parents=True, exist_ok=True)
        with closing(hold(self.folder)):
            (self.folder / MARK).write_text(self.config.model_dump_json(indent=1) + "\n", encoding="utf-8")
            rows = []
            for cell in self.cells:
                rows.append(self._cell(cell))
                done(rows[-1])
                if cell is self.exact and rows[0]["state"] != DONE:
                    raise ValueError(f"the exact cell, which all are held against: {rows[0]['why']}")
        return rows

    def place(self, cell: Cell) -> Path:
        """The cell's folder."""
        plain = re.sub(r"[^A-Za-z0-9.=+-]+", "-", cell.name)[:80].strip("-")
        given = self.config.prompts, self.config.seed, self.exact.facts, self._model
        return self.folder / "cells" / f"{plain}-{cell.digest(*given)}"

    def latents(self, cell: Cell, video: int) -> Path:
        """A video's clean latents."""
        return self.place(cell) / f"{video:04d}.safetensors"

    def rows(self, cell: Cell) -> Iterator[Row]:
        """A row of figures per video: those that are kept, and the others as they are rendered.

        CellFailed, and ValueError for a cell that cannot be.
        """
        place = self.place(cell)
        place.mkdir(parents=True, exist_ok=True)
        what = {"cell": cell.facts, "exact": self.exact.facts, "model_sha256": self._model}
        with Worker(cell, self.timeout_s) as worker:
            yield from kept_rows(
                place / "videos.jsonl",
                what,
                self.config.videos,
                lambda video: self._video(cell, worker, video),
            )

    def _cell(self, cell: Cell) -> Row:
        row: Row = {"cell": cell.name, "settings": cell.settings}
        try:
            rows = list(self.rows(cell))
        except (CellFailed, ValueError) as error:
            state = FAILED if isinstance(error, CellFailed) else IMPOSSIBLE
            return row | {"state": state, "why": str(error)}
        if cell is self.exact:
            self._exact_rows = rows
        row |= {"state": DONE, **cell_figures(rows, self._exact_rows)}
        seen, others = (
            [self._shrunk(which, video) for video in range(len(rows))] for which in (cell, self.exact)
        )
        if cell is not self.exact:
            self._small = {
                path: self._small[path] for path in self._small if path.parent == self.place(self.exact)
            }
        return row | set_figures(seen, others)

    def _video(self, cell: Cell, worker: Worker, video: int) -> Row:
        if self._should_stop():
            raise Stopped
        prompt, output = self.prompts[video], self.place(cell) / f"{video:04d}.mp4"
        taken = worker.render(prompt, self.config.seed + video, output)
        if "cannot" in taken:
            raise ValueError(taken["cannot"])
        pictures = self.see(cell, video)
        exact = pictures if cell is self.exact else self.see(self.exact, video)
        if pictures.shape != exact.shape:
            raise ValueError(f"its videos are {tuple(pictures.shape)}, the exact ones {tuple(exact.shape)}")
        found = self._eyes.measure(pictures, exact, prompt, taken["block_frames"])
        return {"prompt": prompt, **taken, **plain(found)}

    def see(self, cell: Cell, video: int) -> Tensor:
        """A video [3, F, Y, X] in [-1, 1] that was rendered."""
        num_frames = cell.job.num_frames or self.engine.family.recommended.num_frames
        path = self.latents(cell, video)
        seen = self._eyes.see(path, num_frames)
        self._small[path] = shrink(seen)
        return seen

    def _shrunk(self, cell: Cell, video: int) -> Tensor:
        path = self.latents(cell, video)
        if path not in self._small:
            self.see(cell, video)
        return self._small[path]
