"""How the server is set up: a YAML file and flags, checked in one place. What a setting means is under it."""

import ipaddress
import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, ValidationError, model_validator

from vidgen.config import parse_job, read_yaml
from vidgen.sections import LoraConfig, Place, Strict, Text
from vidgen.serve.errors import explain
from vidgen.serve.records import is_id

OWNER = re.compile(r"[A-Za-z0-9_.-]{1,64}")
LOCAL = "local"  # the owner where there are no keys
# what belongs to a request or to the server's own folder
NOT_OPERATORS = ("model", "prompt", "segments", "input")

Seconds = Annotated[float, Field(gt=0, le=10**9, allow_inf_nan=False)]
Bytes = Annotated[int, Field(ge=1, le=2**62)]
Count = Annotated[int, Field(ge=1, le=10**15)]


def _check_name(name: str) -> str:
    if not OWNER.fullmatch(name):
        raise ValueError("need 1 to 64 letters, digits, dots, dashes or underscores")
    return name


def _check_origin(origin: str) -> str:
    if not re.fullmatch(r"https?://[A-Za-z0-9.\-\[\]:]+", origin):
        raise ValueError("need scheme://host or scheme://host:port, for example https://video.example.org")
    return origin


Name = Annotated[str, AfterValidator(_check_name)]


class ModelConfig(Strict):
    """A model that the server offers, and what a job of it uses where its client says nothing."""

    model: Text = "builtin"
    """`builtin` or the path of a checkpoint."""
    job: dict[str, Any] = {}
    """Settings of a job (vidgen/config.py)."""
    session: dict[str, Any] = {}
    """More of them, for live sessions."""
    loras: dict[Name, LoraConfig] = {}
    """LoRAs that clients may ask for, by name."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name, job in (("job", self.job), ("session", self.session)):
            parse_job(job, name)
            taken = [key for key in NOT_OPERATORS if key in job]
            taken += [f"output.{key}" for key in ("path", "save_latents") if key in (job.get("output") or {})]
            if taken:
                raise ValueError(f"{name}.{taken[0]}: is not set here; leave it out")
        return self


class KeyConfig(Strict):
    """An API key: who has it and what they may do. The key itself is nowhere, only its hash."""

    name: Name
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    """Of the key's text in UTF-8, in hex."""
    max_running: Count | None = None
    """Videos in progress at once; by default limits.max_running_per_key."""
    priority: int = Field(default=0, ge=-1000, le=1000)
    """Of this key's videos in the queue; higher comes first."""


class LimitsConfig(Strict):
    """How much anybody may ask for."""

    max_queue: Count = 64
    """Videos that may wait."""
    max_running_per_key: Count = 2
    """Videos of one key in progress at once."""
    max_body_bytes: Bytes = 32 * 2**20
    """Of a request."""
    max_prompt_characters: Count = 4000
    """Of each prompt."""
    max_segments: Count = 64
    """Of a prompt timeline."""
    max_frames: Count = 20_000
    """Of a video or session."""
    max_pixels: Count = 1920 * 1088
    """Of a frame that comes out."""
    max_steps: Count = 200
    """Of denoising."""
    max_work: Count = 5 * 10**11
    """Pixels of a frame, as the model makes it, times frames, times steps."""
    max_image_pixels: int = Field(default=40 * 10**6, ge=1, le=80 * 10**6)
    """Of a picture that a client gives."""
    disk_quota_bytes: Bytes = 20 * 2**30
    """Of all videos together; above it no new one is taken."""
    retention_s: Seconds | None = None
    """Ended videos are deleted after so long; by default never."""
    max_viewers: Count = 64
    """Sockets and streams that may be open at once."""
    session_seconds: Seconds = 600
    """Of video in a live session, where its client says nothing."""
    max_attempts: Count = 3
    """How often a video is tried whose worker died."""


class TimingsConfig(Strict):
    """How long things may take."""

    heartbeat_timeout_s: Seconds = 15
    """A worker that does not answer for so long counts as lost."""
    start_timeout_s: Seconds = 300
    """Until a worker has loaded its model."""
    stall_timeout_s: Seconds = 600
    """A worker that answers but gets nowhere for so long is replaced."""
    cancel_grace_s: Seconds = 5
    """A worker that has not let go of a cancelled video after so long is replaced."""
    drain_s: Seconds = 10
    """For open requests when the server stops."""
    session_grace_s: Seconds = 10
    """A session that nobody watches ends after so long."""
    session_lead_s: Seconds = 2
    """A live session is made so far, and a chunk more, ahead of viewers who play it as it comes; then it
    waits, because a prompt changes only what is not made yet."""
    session_start_timeout_s: Seconds = 10
    """For the first message of a live socket."""
    ticket_s: Seconds = 60
    """How long a ticket for a socket or a download can be used."""


class ServerConfig(Strict):
    """One server."""

    host: Text = "127.0.0.1"
    port: int = Field(default=8711, ge=0, le=65535)
    """0 takes a free one."""
    data: Place = Path("vidgen-data")
    """The folder that holds everything: queue, videos, inputs."""
    models: dict[Name, ModelConfig] = {
        "builtin": ModelConfig(job={"output": {"upscale": 8}}, session={"num_inference_steps": 8})
    }
    """By name; the first is taken where a client names none."""
    replicas: int = Field(default=1, ge=1, le=1024)
    """Workers: how many videos are made at once."""
    keys: tuple[KeyConfig, ...] = ()
    allowed_origins: tuple[Annotated[str, AfterValidator(_check_origin)], ...] = ()
    """Web pages of other hosts that may call the server from a browser."""
    allowed_hosts: tuple[Text, ...] = ()
    """Names, beside `host`, under which the server may be reached."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    limits: LimitsConfig = LimitsConfig()
    timings: TimingsConfig = TimingsConfig()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.models:
            raise ValueError('models: none given; name at least one, for example {"builtin": {}}')
        names = [key.name for key in self.keys]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"keys: {twice} is there twice; give each key a name of its own")
        if not self.keys and not self.is_loopback:
            raise ValueError(
                f"host={self.host}: can be reached from other machines and there are no keys; add keys or "
                "use 127.0.0.1"
            )
        return self

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach the server."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host.strip("[]")).is_loopback
        except ValueError:
            return False

    @property
    def default_model(self) -> str:
        """The name of the model that is taken where a client names none."""
        return next(iter(self.models))

    def key(self, owner: str) -> KeyConfig | None:
        """An owner's key; None for "local"."""
        return next((key for key in self.keys if key.name == owner), None)

    def running_limits(self) -> dict[str, int]:
        """Owners with a number of their own of videos in progress at once."""
        return {key.name: key.max_running for key in self.keys if key.max_running is not None}


def load_server_config(path: Path | None = None, overrides: dict[str, Any] | None = None) -> ServerConfig:
    """A server's settings from a YAML file and others that win over it, section by section.

    ValueError in one line that names the key, what was given and what is allowed.
    """
    source = "server" if path is None else str(path)
    values = {} if path is None else read_yaml(path)
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise ValueError(f"{source}: need a mapping of settings, found {values!r:.100}")
    try:
        return ServerConfig.model_validate(merged(values, overrides or {}))
    except ValidationError as error:
        lines = "; ".join(explain(one, ServerConfig) for one in error.errors()[:3])
        raise ValueError(f"{source}: {lines}") from error


def merged(values: dict[str, Any], wins: dict[str, Any]) -> dict[str, Any]:
    """Both mappings in one; where both have a value that of `wins` stays, mappings within are merged."""
    both = dict(values)
    for name, value in wins.items():
        mine = both.get(name)
        both[name] = merged(mine, value) if isinstance(mine, dict) and isinstance(value, dict) else value
    return both


def video_folder(data: Path, id: str) -> Path:
    """Where a video's files lie. ValueError for what is not exactly an id, so no path comes from a client."""
    return data / "videos" / _checked(id)


def input_file(data: Path, id: str, suffix: str) -> Path:
    """Where the picture that a video begins with is kept; see Record.input_suffix."""
    assert suffix in (".png", ".jpg", ".webp")
    return data / "inputs" / f"{_checked(id)}{suffix}"


def store_file(data: Path) -> Path:
    """The durable queue's file."""
    return data / "server.sqlite"


def _checked(id: str) -> str:
    if not is_id(id):
        raise ValueError(f"id={id!r:.100}: is no id of a video")
    return id
