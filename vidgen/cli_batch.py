"""`vidgen batch`: many jobs of a file, some at a time."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vidgen.cli_exit import INTERRUPTED, OK, PARTIAL_KEPT, Ended, write_line
from vidgen.cli_flags import build_values, takes_job_flags
from vidgen.cli_render import stop_signals

if TYPE_CHECKING:
    from vidgen.batch import Outcome


@takes_job_flags
def batch(
    jobs: Annotated[
        Path,
        typer.Argument(
            metavar="FILE", help="A prompt a line, or YAML: a list of jobs' settings.", show_default=False
        ),
    ],
    *,
    folder: Annotated[Path, typer.Option("--folder", metavar="DIR", help="where the videos go")],
    replicas: Annotated[int, typer.Option("--replicas", metavar="N", min=1, help="jobs at a time")] = 1,
    config: Annotated[
        Path | None, typer.Option("--config", metavar="FILE", help="YAML of what all jobs share")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="a line of JSON per job")] = False,
    **flags: Any,
) -> int:
    """Render many jobs, N at a time, each as it would be alone. Called again it goes on with what is left.

    Flags are for all jobs; what a job says of itself wins over them.
    """
    from vidgen.batch import read_batch, run_batch

    entries = read_batch(jobs, build_values(flags, config=config), folder)

    def ended(outcome: "Outcome") -> None:
        entry = outcome.entry
        if as_json:
            row = {"name": entry.name, "code": outcome.code, "seconds": round(outcome.seconds, 3)}
            write_line("stdout", json.dumps({**row, "output": str(entry.job.output.path)}))
        elif outcome.code == 0:
            write_line("stdout", f"{entry.name}  {outcome.seconds:.1f} s  {entry.job.output.path}")
        else:
            write_line("stderr", f"{entry.name}  ended with {outcome.code}: {outcome.message}")

    with stop_signals() as should_stop:
        left = run_batch(entries, replicas, ended=ended, should_stop=should_stop)
        if left:
            again = f"{len(left)} of {len(entries)} jobs are left; the same call goes on with them"
            raise Ended(INTERRUPTED if should_stop() else PARTIAL_KEPT, again)
    return OK
