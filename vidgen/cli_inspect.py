"""`vidgen doctor` and `vidgen models`: what this machine and this package have."""

import json
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vidgen.cli_exit import BAD_INPUT, OK, write_line
from vidgen.cli_flags import build_job, parse_size, takes_job_flags

if TYPE_CHECKING:
    from vidgen.builtin import SmallModel

Json = Annotated[bool, typer.Option("--json", help="one JSON object instead of text")]
MARKS = {"ok": "ok     ", "absent": "-      ", "missing": "MISSING"}


def doctor(as_json: Json = False) -> int:
    """Say what this machine has of what vidgen can use, and how to get the rest.

    Exit code 2 when something required is missing.
    """
    from vidgen.doctor import examine

    findings = examine()
    is_well = not any(finding.state == "missing" for finding in findings)
    if as_json:
        report = {"ok": is_well, "findings": [asdict(finding) for finding in findings]}
        write_line("stdout", json.dumps(report, indent=2))
        return OK if is_well else BAD_INPUT
    for group, members in groupby(findings, key=lambda finding: finding.group):
        write_line("stdout", group)
        for finding in members:
            advice = f" ({finding.advice})" if finding.advice else ""
            write_line("stdout", f"  {MARKS[finding.state]} {finding.name:12} {finding.detail}{advice}")
    write_line("stdout", "all that is required is there" if is_well else "something required is MISSING")
    return OK if is_well else BAD_INPUT


models = typer.Typer(help="List the models there are, and look into checkpoints.")


@models.callback(invoke_without_command=True)
def listing(context: typer.Context, as_json: Json = False) -> None:
    """List the models there are, with their vocabulary and the settings they are best used with."""
    if context.invoked_subcommand is None:
        _list(as_json)


@models.command()
@takes_job_flags
def inspect(
    path: Annotated[str, typer.Argument(metavar="NAME|PATH", help="A model's name, file or folder.")],
    *,
    size: Annotated[str | None, typer.Option("--size", metavar="WxH", help="832x480 or 832*480")] = None,
    as_json: Json = False,
    **flags: Any,
) -> int:
    """Say what a checkpoint is, how large its parts are, and what memory a render with these flags takes.

    Every tensor's name and shape is checked; no weights are read.
    """
    from vidgen.inspection import inspect_model

    sizes = parse_size(size) if size is not None else {}
    named = {**flags, "model": path, "prompt": flags.get("prompt") or "any"}
    found = inspect_model(build_job(named, config=None, segments=None, size=sizes))
    if as_json:
        write_line("stdout", json.dumps(found, indent=2))
        return OK
    for line in describe(found):
        write_line("stdout", line)
    return OK


def describe(found: dict[str, Any]) -> list[str]:
    """What `inspect_model` found, for people."""
    from vidgen.limits import readable

    lines = [f"{found['model']}: {found['family']}, {readable(found['bytes'])} on disk"]
    lines += [f"  {name}: {count / 1e6:,.2f} M parameters" for name, count in found["parameters"].items()]
    settings = ", ".join(f"{key} {value}" for key, value in found["settings"].items())
    lines.append(f"  a render with: {settings}")
    lines.append(f"  {found['tokens']:,} tokens per forward, {found['forwards']:,} forwards")
    lines.append(f"  decoding holds {readable(found['decode_bytes'])} beside the codec's weights")
    for rank in found["ranks"]:
        weights, work = readable(rank["weight_bytes"]), readable(rank["work_bytes"])
        lines.append(f"  rank {rank['rank']}: {rank['layers']} layers, {weights} of weights, {work} of work")
    return lines


def _list(as_json: bool) -> None:
    from vidgen.builtin import BUILTIN_PATH, FAMILY, load_small

    if not BUILTIN_PATH.exists():
        raise ValueError(f"{BUILTIN_PATH}: the built-in model is not there; reinstall vidgen")
    facts = _facts(load_small(BUILTIN_PATH), FAMILY, BUILTIN_PATH)
    if as_json:
        write_line("stdout", json.dumps([facts], indent=2))
        return
    training, recommended = facts["training"], facts["recommended"]
    size = f"{facts['parameters'] / 1e6:.2f} M parameters, {facts['bytes'] / 1e6:.1f} MB"
    write_line("stdout", f"builtin ({FAMILY}): {size}, {facts['path']}")
    if training:
        world = training.get("config", {}).get("world", "?")
        write_line(
            "stdout",
            f"  trained on the world {world!r}, {training.get('step')} steps in {training.get('seconds')} s",
        )
    settings = ", ".join(f"{key} {value}" for key, value in recommended.items())
    write_line("stdout", f"  recommended: {settings}")
    for kind, words in facts["vocabulary"].items():
        write_line("stdout", f"  {kind}: {', '.join(words)}")


def _facts(model: "SmallModel", family: str, path: Path) -> dict[str, Any]:
    """A model as plain data."""
    from vidgen.conditioning.text import FILLER, SYNONYMS

    return {
        "name": "builtin",
        "family": family,
        "path": str(path),
        "bytes": path.stat().st_size,
        "parameters": sum(p.numel() for part in model.parts().values() for p in part.parameters()),
        "recommended": asdict(model.recommended),
        "training": model.training,
        "vocabulary": {
            "words": list(model.text.config.content_words),
            "filler": list(FILLER),
            "synonyms": sorted(SYNONYMS),
        },
    }
