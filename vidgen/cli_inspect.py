"""`vidgen doctor` and `vidgen models`: what this machine and this package have."""

import json
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vidgen.cli_exit import BAD_INPUT, OK, write_line

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


def models(as_json: Json = False) -> int:
    """List the models there are, with their vocabulary and the settings they are best used with."""
    from vidgen.builtin import BUILTIN_PATH, FAMILY, load_small

    if not BUILTIN_PATH.exists():
        raise ValueError(f"{BUILTIN_PATH}: the built-in model is not there; reinstall vidgen")
    facts = _facts(load_small(BUILTIN_PATH), FAMILY, BUILTIN_PATH)
    if as_json:
        write_line("stdout", json.dumps([facts], indent=2))
        return OK
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
    return OK


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
