"""The server as an application of Ray Serve, for clusters that run everything by it.

serve run vidgen.serve.ray_app:build config=configs/serve.yaml

One process owns the queue, so there is one replica of it; how many videos are made at once is `replicas` in
its own configuration. Ray Serve's proxy listens wherever it was told to: where others can reach it, configure
keys. Without Ray Serve, `vidgen serve` is the same server with one hop less per chunk.
"""

from pathlib import Path
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict
from ray import serve

from vidgen.serve.app import make_app
from vidgen.serve.config import ServerConfig, load_server_config

MAX_OPEN_REQUESTS = 256


class Arguments(BaseModel):
    """What `serve run` is given as name=value."""

    model_config = ConfigDict(extra="forbid")

    config: Path | None = None
    """YAML of the server, as for `vidgen serve --config`; its host and port are Ray Serve's to decide."""
    data: Path | None = None
    """Instead of the file's folder of videos."""


def build(arguments: Arguments) -> Any:
    """The application to run. ValueError in one line for a configuration that cannot be."""
    overrides = {} if arguments.data is None else {"data": arguments.data}
    return application(load_server_config(arguments.config, overrides))


def application(config: ServerConfig) -> Any:
    """A whole server in one replica, which is made where it runs."""

    def make() -> FastAPI:
        return make_app(config)

    deployment: Any = serve.deployment(
        serve.ingress(make)(),  # type: ignore[call-arg]
        name="vidgen",
        num_replicas=1,
        max_ongoing_requests=MAX_OPEN_REQUESTS,
        ray_actor_options={"num_cpus": 0},  # its workers compute, not the server
    )
    return deployment.bind()
