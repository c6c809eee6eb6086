"""The command line. Commands import the engine when they run, so that help is quick.

Exit codes: 0 ok, 2 bad input (one line on stderr, nothing left on disk), 3 failed midway with what was
finished kept, 130 interrupted.
"""

import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from vidgen import (
    __version__,
    cli_ablate,
    cli_batch,
    cli_bench,
    cli_client,
    cli_inspect,
    cli_measure,
    cli_plan,
    cli_render,
    cli_serve,
    cli_train,
)
from vidgen.cli_exit import BAD_INPUT, INTERRUPTED, OK, Ended, one_line, plain_warnings, write_line

app = typer.Typer(
    name="vidgen",
    add_completion=False,
    rich_markup_mode=None,  # its tables cut off long flags, and the aliases with them
    pretty_exceptions_enable=False,
    # --num_frames is --num-frames
    context_settings={
        "token_normalize_func": lambda name: name.replace("_", "-"),
        "help_option_names": ["-h", "--help"],
    },
)
app.command()(cli_render.render)
app.command()(cli_render.resume)
app.command()(cli_batch.batch)
app.command()(cli_serve.serve)
app.command()(cli_client.submit)
app.command()(cli_client.status)
app.command()(cli_client.watch)
app.command()(cli_client.cancel)
app.command()(cli_client.ls)
app.command()(cli_client.download)
app.command()(cli_plan.plan)
app.command()(cli_ablate.ablate)
app.command()(cli_inspect.doctor)
app.command()(cli_train.train)
app.add_typer(cli_inspect.models, name="models")
app.add_typer(cli_measure.measure, name="measure")
app.add_typer(cli_bench.bench, name="bench")


def _print_version(wanted: bool) -> None:
    if wanted:
        write_line("stdout", f"vidgen {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _top(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="print it and exit")
    ] = False,
) -> None:
    """Renders long videos with a video diffusion transformer."""
    if context.invoked_subcommand is None:
        write_line("stdout", context.get_help())


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code of a command line; what went wrong is one line on stderr."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    with plain_warnings():
        try:
            return app(arguments, prog_name="vidgen", standalone_mode=False) or OK
        except Ended as ended:
            is_error = ended.code != INTERRUPTED
            write_line("stderr", f"vidgen: {'error: ' if is_error else ''}{one_line(ended)}")
            return ended.code
        except ValueError as error:
            write_line("stderr", f"vidgen: error: {one_line(error)}")
            return BAD_INPUT
        except Exception as error:
            if not hasattr(error, "format_message"):
                raise
            # Typer's usage errors, whose base class lies elsewhere in each of its versions
            message = error.format_message()  # type: ignore[attr-defined]
            write_line("stderr", f"vidgen: error: {one_line(message)}; see: vidgen --help")
            return BAD_INPUT
