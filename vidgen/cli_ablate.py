"""`vidgen ablate`: a grid of renders, measured and reported, in one command."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from vidgen.cli_exit import INTERRUPTED, OK, PARTIAL_KEPT, Ended, write_line
from vidgen.cli_render import stop_signals

SHOWN = ("seconds", "speed_up", "adherence_all", "psnr")


def ablate(
    grid: Annotated[
        Path,
        typer.Argument(
            metavar="FILE",
            help="YAML of an ablation, such as configs/ablate_caches.yaml.",
            show_default=False,
        ),
    ],
    *,
    folder: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="of the videos and the report")
    ],
    videos: Annotated[
        int | None, typer.Option("--videos", metavar="N", min=1, help="of each cell; instead of the file's")
    ] = None,
    timeout_s: Annotated[
        float, typer.Option("--timeout", metavar="S", min=1, help="a video that takes longer has failed")
    ] = 3600,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="say which cells there are, and stop")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="a line of JSON per cell")] = False,
) -> int:
    """Render the same videos in many ways, hold each against the exact one, and write a report.

    Called again it goes on with what is missing: nothing that is finished is rendered again. The report is
    DIR/report.html, its figures DIR/results.csv and results.json.
    """
    from vidgen.ablate.settings import cells_of, read_ablation

    config = read_ablation(grid)
    if videos is not None:
        config = config.model_copy(update={"videos": videos})
    cells = cells_of(config, str(grid))
    if dry_run:
        for cell in cells:
            write_line("stdout", f"{cell.name}  {json.dumps(cell.settings)}")
        return OK
    from vidgen.ablate.report import write_report, write_results
    from vidgen.ablate.study import FAILED, Stopped, Study

    study = Study(config, cells, folder, timeout_s)
    rows: list[dict[str, Any]] = []

    def done(row: dict[str, Any]) -> None:
        rows.append(row)
        write_results(study, rows)
        write_line("stdout", json.dumps(row) if as_json else f"[{len(rows)}/{len(cells)}]  {_line(row)}")

    with stop_signals() as should_stop:
        try:
            study.run(done, should_stop)
        except Stopped as stopped:
            left = f"interrupted; {len(rows)} of {len(cells)} cells are done; the same call goes on"
            raise Ended(INTERRUPTED, left) from stopped
        report = write_report(study, rows)
    if not as_json:
        write_line("stdout", f"report  {report}")
    failed = [row["cell"] for row in rows if row["state"] == FAILED]
    if failed:
        tried = (
            f"{len(failed)} of {len(cells)} cells failed ({', '.join(failed[:3])}); the same call tries again"
        )
        raise Ended(PARTIAL_KEPT, tried)
    return OK


def _line(row: dict[str, Any]) -> str:
    if "why" in row:
        return f"{row['cell']}  {row['state']}: {row['why']}"
    shown = {name: "equal" if row[name] is None else row[name] for name in SHOWN if name in row}
    return "  ".join([row["cell"], *(f"{name} {value}" for name, value in shown.items())])
