"""What the server knows of its models without ever loading one: sizes and recommended settings.

They come from a short-lived process, once per model: opening a model imports torch, and the server does not.
The built-in model's are in its file's header.
"""

import json
import struct
import subprocess
import sys
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import vidgen
from vidgen.config import parse_job
from vidgen.types import ContextMode, NoiseKind, Recommended

TIMEOUT_S = 300
BUILTIN = Path(vidgen.__file__).parent / "assets" / "builtin.safetensors"
Pictures = Literal["none", "may", "must"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelFacts:
    """Of one model. Strides are pixels per latent row, and pixel frames per latent frame."""

    recommended: Recommended
    spatial_stride: int
    temporal_stride: int
    first_frames: int  # pixel frames of a video's first latent frame
    patch: tuple[int, int]  # latents per token: rows, columns
    num_experts: int
    pictures: Pictures  # whether a video may or must begin with one

    def num_latent_frames(self, num_frames: int) -> int:
        """Latent frames that cover so many pixel frames; see codec.protocol.CodecSizes."""
        return 1 + -(-max(0, num_frames - self.first_frames) // self.temporal_stride)


def facts_of(job: dict[str, Any]) -> ModelFacts:
    """Facts of the model that a job's settings name, LoRAs, dtype and all.

    The first call for a model takes seconds and must not be made on an event loop. ValueError in one line
    for a model that cannot be opened.
    """
    named = ("model", "dtype", "loras", "tile", "offload")
    return _facts_of(json.dumps({name: job[name] for name in named if name in job}, sort_keys=True))


@lru_cache(maxsize=256)
def _facts_of(job: str) -> ModelFacts:
    if json.loads(job) == {"model": "builtin"}:
        return _builtin_facts()
    command = [sys.executable, "-m", "vidgen.serve.facts"]
    try:
        run = subprocess.run(command, input=job, capture_output=True, text=True, timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        raise ValueError(f"model: could not be opened within {TIMEOUT_S} s; try again") from None
    try:
        found = json.loads(run.stdout)
    except ValueError:
        last = (run.stderr.strip().splitlines() or [f"exit status {run.returncode}"])[-1]
        raise ValueError(f"model: could not be opened ({last}); see vidgen doctor") from None
    if "error" in found:
        raise ValueError(found["error"])
    return ModelFacts(
        **{**found, "recommended": _recommended(found["recommended"]), "patch": tuple(found["patch"])}
    )


def _builtin_facts() -> ModelFacts:
    """By the header of its file, see vidgen/builtin.py; in milliseconds."""
    with BUILTIN.open("rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        settings = json.loads(json.loads(file.read(size))["__metadata__"]["vidgen"])
    temporal_stride, spatial_stride, _ = settings["codec"]["patch"]
    return ModelFacts(
        recommended=_recommended(settings["recommended"]),
        spatial_stride=spatial_stride,
        temporal_stride=temporal_stride,
        first_frames=temporal_stride,
        patch=tuple(settings["dit"]["patch"]),
        num_experts=1,
        pictures="may",
    )


def _recommended(settings: dict[str, Any]) -> Recommended:
    enums = {"context_mode": ContextMode(settings["context_mode"]), "noise": NoiseKind(settings["noise"])}
    return Recommended(**{**settings, **enums})


def read_facts(job: dict[str, Any]) -> ModelFacts:
    """The same, in this process. It imports torch and reads no weights of a DiT."""
    from vidgen.render import load_engine

    engine = load_engine(parse_job(job))
    family = engine.family
    kinds: dict[str, Pictures] = {"t2v": "none", "i2v": "must", "ti2v": "may"}
    kind = getattr(getattr(family, "folder", None), "kind", "ti2v")  # the built-in family has no folder
    if kind not in kinds:
        raise ValueError(f"model={job['model']}: {kind} needs two pictures, which a request cannot give yet")
    return ModelFacts(
        recommended=family.recommended,
        spatial_stride=family.sizes.spatial_stride,
        temporal_stride=family.sizes.temporal_stride,
        first_frames=family.sizes.first_frames,
        patch=family.dits[0].config.patch,
        num_experts=len(family.dits),
        pictures=kinds[kind],
    )


if __name__ == "__main__":
    try:
        answer = asdict(read_facts(json.load(sys.stdin)))
    except ValueError as error:
        answer = {"error": str(error)}
    sys.stdout.write(json.dumps(answer))
