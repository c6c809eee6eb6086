"""`vidgen serve`: the server, and keys for it."""

import hashlib
import json
import re
import secrets
from pathlib import Path
from typing import Annotated, Any

import typer

from vidgen.cli_exit import OK, write_line

KEY_BYTES = 32


def serve(
    config: Annotated[
        Path | None, typer.Option("--config", metavar="FILE", help="YAML of a server; flags win over it")
    ] = None,
    host: Annotated[
        str | None, typer.Option("--host", help="to listen on; others than this machine's need keys")
    ] = None,
    port: Annotated[
        int | None,
        typer.Option("--port", min=0, max=65535, metavar="N", help="0: a free one (default: 8711)"),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option("--data", metavar="DIR", help="queue and videos (default: vidgen-data)"),
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option("--model", metavar="NAME|PATH", help="to offer; may be repeated (default: builtin)"),
    ] = None,
    replicas: Annotated[
        int | None, typer.Option("--replicas", min=1, metavar="N", help="videos made at once (default: 1)")
    ] = None,
    max_queue: Annotated[
        int | None, typer.Option("--max-queue", min=1, metavar="N", help="videos that may wait (default: 64)")
    ] = None,
    max_running_per_key: Annotated[
        int | None,
        typer.Option("--max-running-per-key", min=1, metavar="N", help="at once, of one key (default: 2)"),
    ] = None,
    log_level: Annotated[
        str | None, typer.Option("--log-level", metavar="LEVEL", help="debug, info, warning or error")
    ] = None,
    new_key: Annotated[
        str | None, typer.Option("--new-key", metavar="NAME", help="print a fresh API key and end")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object per line on stdout")] = False,
) -> int:
    """Serve a web page and an API that make videos, until Ctrl-C. Running jobs go on at the next start.

    Servers that other machines can reach need keys: --new-key prints one and the lines for --config.
    """
    if new_key is not None:
        return _print_key(new_key, as_json)
    from vidgen.serve.config import load_server_config

    values = {"host": host, "port": port, "data": data, "replicas": replicas, "log_level": log_level}
    limits = {"max_queue": max_queue, "max_running_per_key": max_running_per_key}
    overrides: dict[str, Any] = {key: value for key, value in values.items() if value is not None}
    overrides["limits"] = {key: value for key, value in limits.items() if value is not None}
    if model:
        if config is not None:
            raise ValueError(f"--model {model[0]} and --config {config}: name the models in the file")
        overrides["models"] = _models(model)
    settings = load_server_config(config, overrides)

    from vidgen.serve.app import serve as run_server

    if not as_json:
        return run_server(settings)
    return run_server(settings, lambda text: write_line("stdout", json.dumps(_serving(text))))


def _serving(text: str) -> dict[str, str]:
    """The line that says where the server is, as an event."""
    return {"event": "serving", "url": text.rpartition(" ")[2]}


def _models(names: list[str]) -> dict[str, Any]:
    """The `models` section for some models, by the names that clients will use."""
    from vidgen.serve.config import ServerConfig

    usual = ServerConfig().models
    found: dict[str, Any] = {}
    for text in names:
        name = text if text in usual else re.sub(r"[^A-Za-z0-9_.-]+", "-", Path(text).stem)
        if name in found:
            raise ValueError(f"--model {text}: another one is called {name} already; use --config")
        found[name] = usual[text].model_dump(mode="json") if text in usual else {"model": text}
    return found


def _print_key(name: str, as_json: bool) -> int:
    """A key that is in no file: shown here once, known to the server by its hash."""
    from vidgen.serve.config import KeyConfig, load_server_config

    key = f"vidgen_{secrets.token_urlsafe(KEY_BYTES)}"
    entry = {"name": name, "sha256": hashlib.sha256(key.encode()).hexdigest()}
    load_server_config(None, {"keys": [entry]})  # one line about a name that cannot be used
    entry = KeyConfig.model_validate(entry).model_dump(include={"name", "sha256"})
    if as_json:
        write_line("stdout", json.dumps({"key": key, **entry}))
        return OK
    write_line("stderr", f"The key of {name}, shown this once; keep it in a file that only {name} can read:")
    write_line("stdout", key)
    write_line("stderr", "For the server's --config:")
    for line in ("keys:", f"  - name: {entry['name']}", f'    sha256: "{entry["sha256"]}"'):
        write_line("stdout", line)
    return OK
