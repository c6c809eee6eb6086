"""What this machine has of what vidgen can use, and how to get the rest."""

import importlib
import os
import platform
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from vidgen import __version__

REQUIRED = ("torch", "numpy", "safetensors", "pydantic", "PyYAML", "typer", "rich", "av", "pillow")
INSTALL = "pip install vidgen brings it"
ATTENTION = {  # how to get the backends that are not in every installation
    "flex": "needs a C++ compiler on a CPU",
    "triton": "needs CUDA; comes with torch for CUDA: pip install triton",
    "flash": "needs CUDA: pip install flash-attn --no-build-isolation",
    "xformers": "needs CUDA: pip install xformers",
    "sage": "needs CUDA: pip install sageattention",
}
CODECS = {  # encoder, decoder, whether a render needs it
    "H.264": ("libx264", "h264", True),
    "VP9": ("libvpx-vp9", "vp9", False),
    "AV1": ("libsvtav1", "av1", False),
}
LITTLE_DISK_BYTES = LITTLE_MEMORY_BYTES = 2**30


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One thing looked at. `missing` is something required, `absent` something that only some need."""

    group: str
    name: str
    state: Literal["ok", "absent", "missing"]
    detail: str
    advice: str = ""


def examine(folder: Path = Path()) -> list[Finding]:
    """Everything about this machine; disk space is that of `folder`. Nothing is changed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # optional packages warn of each other when imported
        looks = (_versions, _devices, _attention, _codecs, lambda: _space(folder), _checkpoint)
        return [finding for look in looks for finding in look()]


def _versions() -> Iterator[Finding]:
    yield Finding(group="versions", name="vidgen", state="ok", detail=__version__)
    fits = (3, 11) <= sys.version_info < (3, 13)
    yield Finding(
        group="versions",
        name="python",
        state="ok" if fits else "missing",
        detail=f"{platform.python_version()} on {platform.platform()}",
        advice="" if fits else "install Python 3.11 or 3.12",
    )
    for name in REQUIRED:
        yield _package(name, required=True, advice=INSTALL)
    yield _package("ray", required=False, advice="`vidgen render --ranks N` needs it: pip install ray")
    # its last release has wheels for this platform only; PyAV reads videos elsewhere
    decord_fits = sys.platform == "linux" and platform.machine() == "x86_64"
    yield _package("decord", required=decord_fits, advice=INSTALL if decord_fits else "PyAV is used instead")


def _package(name: str, *, required: bool, advice: str) -> Finding:
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        state = "missing" if required else "absent"
        return Finding(group="versions", name=name, state=state, detail="not installed", advice=advice)
    module = {"PyYAML": "yaml", "pillow": "PIL"}.get(name, name)
    broken = _why_not(lambda: importlib.import_module(module))
    if broken:
        state = "missing" if required else "absent"
        detail = f"{version}, but it cannot be imported: {broken}"
        return Finding(
            group="versions", name=name, state=state, detail=detail, advice=f"reinstall it: {advice}"
        )
    return Finding(group="versions", name=name, state="ok", detail=version)


def _why_not(attempt: Callable[[], object]) -> str:
    """The reason why something fails, empty when it works. Broken binary packages raise anything."""
    try:
        attempt()
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return ""


def _devices() -> Iterator[Finding]:
    yield Finding(group="devices", name="cpu", state="ok", detail=f"{os.cpu_count()} cores")
    if _why_not(lambda: importlib.import_module("torch")):
        return
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for index in range(count):
        facts = torch.cuda.get_device_properties(index)
        detail = f"{facts.name}, {facts.total_memory / 2**30:.0f} GiB, capability {facts.major}.{facts.minor}"
        yield Finding(group="devices", name=f"cuda:{index}", state="ok", detail=detail)
    if not count:
        built = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch has no CUDA"
        advice = "the built-in model does not need it"
        yield Finding(
            group="devices", name="cuda", state="absent", detail=f"none found; {built}", advice=advice
        )


def _attention() -> Iterator[Finding]:
    if _why_not(lambda: importlib.import_module("torch")):
        return
    from vidgen.kernels.attention.backends import BACKENDS, absent

    for name, backend in BACKENDS.items():
        reason = absent(name)
        if reason:
            yield Finding(
                group="attention", name=name, state="absent", detail=reason, advice=ATTENTION.get(name, "")
            )
        else:
            does = ", ".join(["dense", *sorted(backend.does)])
            detail = f"on {', '.join(sorted(backend.devices))}: {does}"
            yield Finding(group="attention", name=name, state="ok", detail=detail)


def _codecs() -> Iterator[Finding]:
    for name, (encoder, decoder, required) in CODECS.items():
        lacking = [
            f"{verb} with {codec}: {reason}"
            for verb, codec in (("write", encoder), ("read", decoder))
            if (reason := _why_not(lambda codec=codec, verb=verb: _open_codec(codec, verb)))
        ]
        if lacking:
            yield Finding(
                group="codecs",
                name=name,
                state="missing" if required else "absent",
                detail="cannot " + "; cannot ".join(lacking),
                advice="the wheels of PyAV have it: pip install --force-reinstall --only-binary av av",
            )
        else:
            yield Finding(
                group="codecs", name=name, state="ok", detail=f"writes with {encoder}, reads with {decoder}"
            )


def _open_codec(name: str, verb: str) -> None:
    from av.codec import Codec

    Codec(name, "w" if verb == "write" else "r")


def _space(folder: Path) -> Iterator[Finding]:
    from vidgen.limits import available_memory_bytes, free_disk_bytes, readable

    for name, found, little, advice in (
        ("disk", free_disk_bytes(folder), LITTLE_DISK_BYTES, "free some, or render to another disk"),
        ("memory", available_memory_bytes(), LITTLE_MEMORY_BYTES, "close other programs"),
    ):
        enough = found >= little
        yield Finding(
            group="space",
            name=name,
            state="ok" if enough else "absent",
            detail=f"{readable(found)} free" + (f" at {folder.absolute()}" if name == "disk" else ""),
            advice="" if enough else f"little for long videos: {advice}",
        )


def _checkpoint() -> Iterator[Finding]:
    from vidgen.builtin import BUILTIN_PATH, load_small

    reason = "no such file" if not BUILTIN_PATH.exists() else _why_not(lambda: load_small(BUILTIN_PATH))
    yield Finding(
        group="models",
        name="builtin",
        state="missing" if reason else "ok",
        detail=reason or f"{BUILTIN_PATH}, {BUILTIN_PATH.stat().st_size / 1e6:.1f} MB",
        advice="reinstall vidgen, or train it: vidgen train" if reason else "",
    )
