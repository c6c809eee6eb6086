"""What a job leaves on disk, so that nothing finished is ever lost.

JOB/  job.yaml            the resolved job
      journal.sqlite      which blocks are finished, which state is the newest; a row is the commit
      latents/000000.safetensors   clean latents of every finished block
      inputs.safetensors  encoded texts and pictures
      state/TICK.safetensors       everything the next tick needs (the newest two)
      segments/ live.mp4           the sink's (vidgen/media/sink.py)
A file is written beside its place, synced and renamed before the row that names it.
"""

import fcntl
import hashlib
import json
import sqlite3
from contextlib import suppress
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from safetensors import safe_open
from safetensors.torch import load, save
from torch import Tensor

from vidgen.config import JobConfig, dump_job, frames_digest, parse_job, read_yaml
from vidgen.denoise.forwards import Lend, Lender
from vidgen.denoise.given import Given, Inputs
from vidgen.denoise.lending import BranchKeyValues, Lends
from vidgen.denoise.loop import BlockState, LoopState
from vidgen.denoise.state import Stillness
from vidgen.media.blocks import WrittenBlock
from vidgen.media.segments import write_atomically
from vidgen.model.context import KeyValue
from vidgen.stepcache.kept import Kept

STATES_KEPT = 2
DIGEST = "frames_digest"
SCHEMA = """
CREATE TABLE IF NOT EXISTS blocks (
    block INTEGER PRIMARY KEY, first_frame INTEGER NOT NULL, num_frames INTEGER NOT NULL,
    path TEXT NOT NULL, sha256 TEXT NOT NULL, latents_sha256 TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS states (next_tick INTEGER PRIMARY KEY, path TEXT NOT NULL, sha256 TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value TEXT NOT NULL);
"""


class JobInUse(ValueError):
    """Another process holds the job folder."""


def hold(folder: Path) -> IO[str]:
    """A job folder's lock, held until the file is closed. JobInUse when another process holds it."""
    lock = (folder / "lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        lock.close()
        raise JobInUse(f"{folder}: in use by another vidgen process; wait for it or stop it") from error
    return lock


class Journal:
    """An open job folder; one process at a time. Use as a context manager."""

    def __init__(self, folder: Path, *, create: JobConfig | None = None) -> None:
        """Open a job, or create one. ValueError in one line when there is none, or JobInUse."""
        self.folder = folder
        job_file = folder / "job.yaml"
        if create is None and not job_file.exists():
            raise ValueError(f"{folder}: no job here (no job.yaml); give the folder of a vidgen job")
        for room in (folder, folder / "latents", folder / "state"):
            room.mkdir(parents=True, exist_ok=True)
        self._lock = hold(folder)
        if create is not None:
            write_atomically(job_file, dump_job(create).encode())
        self.job = parse_job(read_yaml(job_file), str(job_file))
        self._db = sqlite3.connect(folder / "journal.sqlite", isolation_level=None)
        self._db.execute("PRAGMA synchronous = FULL")
        self._db.executescript(SCHEMA)
        if create is not None:
            self.note(DIGEST, frames_digest(self.job))
        elif self.fact(DIGEST) not in (None, frames_digest(self.job)):
            self.__exit__(None, None, None)
            raise ValueError(
                f"{job_file}: its settings are not those that this job began with; put them back, or start a "
                "new job (settings under `parallel` may change)"
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._db.close()
        self._lock.close()

    def save_inputs(self, inputs: Inputs) -> None:
        """Keep what texts and pictures became: their files may change, their encoders take long."""
        given = inputs.given
        parts = {"pinned": given.pinned_CFYX, "channels": given.channels_CFYX, "image": given.image_BMI}
        tensors = {f"given/{name}": tensor for name, tensor in parts.items() if tensor is not None}
        tensors |= {f"text/{index}": text for index, text in enumerate(inputs.texts.values())}
        header = {"texts": json.dumps(list(inputs.texts))}
        data = save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata=header)
        write_atomically(self._inputs_file, data)

    def load_inputs(self) -> Inputs | None:
        """What `save_inputs` kept; None for a job that has none."""
        if not self._inputs_file.exists():
            return None
        with safe_open(self._inputs_file, "pt") as file:
            texts = json.loads(file.metadata()["texts"])
        tensors = _aligned(self._inputs_file.read_bytes())
        return Inputs(
            texts={text: tensors[f"text/{index}"] for index, text in enumerate(texts)},
            given=Given(
                pinned_CFYX=tensors.get("given/pinned"),
                channels_CFYX=tensors.get("given/channels"),
                image_BMI=tensors.get("given/image"),
            ),
        )

    @property
    def _inputs_file(self) -> Path:
        return self.folder / "inputs.safetensors"

    def written(self) -> list[WrittenBlock]:
        """The finished blocks, in order."""
        rows = self._db.execute(
            "SELECT block, first_frame, num_frames, path, sha256 FROM blocks ORDER BY block"
        ).fetchall()
        return [
            WrittenBlock(block=b, first_frame=f, num_frames=n, path=Path(p), sha256=s)
            for b, f, n, p, s in rows
        ]

    def save_latents(self, block: int, latents: Tensor) -> str:
        """Keep a block's clean latents [1, C, F, Y, X]; their file's SHA-256."""
        data = save({"latents": latents.contiguous()})
        write_atomically(self._latents_file(block), data)
        return hashlib.sha256(data).hexdigest()

    def load_latents(self, block: int) -> Tensor:
        """Clean latents [1, C, F, Y, X] of a finished block."""
        return _aligned(self._latents_file(block).read_bytes())["latents"]

    def commit(self, record: WrittenBlock, latents_sha256: str) -> None:
        """The row that makes a block finished."""
        values = (record.block, record.first_frame, record.num_frames, str(record.path), record.sha256)
        self._db.execute("INSERT OR REPLACE INTO blocks VALUES (?, ?, ?, ?, ?, ?)", (*values, latents_sha256))

    def save_state(self, state: LoopState) -> None:
        """Make a state the one to resume from; older ones but the last go."""
        tensors, header = _flatten(state)
        data = save(tensors, metadata={"state": json.dumps(header)})
        path = self.folder / "state" / f"{state.next_tick:08d}.safetensors"
        write_atomically(path, data)
        row = (state.next_tick, path.name, hashlib.sha256(data).hexdigest())
        self._db.execute("INSERT OR REPLACE INTO states VALUES (?, ?, ?)", row)
        old = self._db.execute(
            "SELECT next_tick, path FROM states ORDER BY next_tick DESC LIMIT -1 OFFSET ?", (STATES_KEPT,)
        ).fetchall()
        for tick, name in old:
            self._db.execute("DELETE FROM states WHERE next_tick = ?", (tick,))
            (self.folder / "state" / name).unlink(missing_ok=True)

    def load_state(self) -> LoopState:
        """The newest undamaged state; the beginning when there is none."""
        rows = self._db.execute("SELECT path, sha256 FROM states ORDER BY next_tick DESC").fetchall()
        for name, sha256 in rows:
            path = self.folder / "state" / name
            if path.exists() and hashlib.sha256(path.read_bytes()).hexdigest() == sha256:
                return _unflatten(path)
        return LoopState()

    def note(self, name: str, value: Any) -> None:
        """A fact worth keeping about the job, as JSON."""
        self._db.execute("INSERT OR REPLACE INTO facts VALUES (?, ?)", (name, json.dumps(value)))

    def fact(self, name: str) -> Any:
        """A fact noted before, or None."""
        row = self._db.execute("SELECT value FROM facts WHERE name = ?", (name,)).fetchone()
        return None if row is None else json.loads(row[0])

    def place(self, processes: list[dict[str, Any]]) -> None:
        """Keep where the ranks run, in JOB/ranks.json: for whoever watches them."""
        with suppress(OSError):
            write_atomically(self.folder / "ranks.json", json.dumps(processes, indent=1).encode())
            self.log("ranks: " + ", ".join(f"{p['name']} pid {p['pid']} on {p['host']}" for p in processes))

    def log(self, text: str) -> None:
        """Add a line to JOB/log.txt, with the time. Never in the way of a render."""
        with suppress(OSError), (self.folder / "log.txt").open("a", encoding="utf-8") as file:
            file.write(f"{datetime.now().astimezone().isoformat(timespec='seconds')} {text}\n")

    def _latents_file(self, block: int) -> Path:
        return self.folder / "latents" / f"{block:06d}.safetensors"


def _flatten(state: LoopState) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors by name, everything else) of a state."""
    tensors: dict[str, Tensor] = {}
    for index, block in state.blocks.items():
        tensors[f"block/{index}"] = block.latents_BCFYX
        tensors |= {f"history/{index}/{i}": value for i, value in enumerate(block.history)}
        if block.negative_BCFYX is not None:
            tensors[f"negative/{index}"] = block.negative_BCFYX
        tensors |= _flatten_kept(f"kept/{index}", block.kept)
    for index, (_, kv) in state.lent.for_later.items():
        tensors |= _flatten_kv(f"later/{index}", kv)
    tensors |= _flatten_kv("anchor", state.lent.anchor)
    for index, (_, lends) in state.lent.last.items():
        for number, kv in enumerate(lends.values()):
            tensors |= _flatten_kv(f"last/{index}/{number}", kv)
    tensors |= {
        f"attention/{block}/{run}/{layer}/{name}": tensor
        for block, runs in state.lent.attention.items()
        for run, layers in enumerate(runs)
        for layer, kept in enumerate(layers)
        for name, tensor in kept.items()
    }
    header = {
        "next_tick": state.next_tick,
        "steps_done": {index: block.steps_done for index, block in state.blocks.items()},
        "history": {index: len(block.history) for index, block in state.blocks.items()},
        "later": {index: step for index, (step, _) in state.lent.for_later.items()},
        "still": asdict(state.still),
        "kept": {index: _kept_header(block.kept) for index, block in state.blocks.items()},
        "last": {
            index: [step, [asdict(lend) for lend in lends]]
            for index, (step, lends) in state.lent.last.items()
        },
        # blocks, runs, layers: those of which nothing is kept have no tensors
        "attention": {
            block: [len(layers) for layers in runs] for block, runs in state.lent.attention.items()
        },
    }
    kept, header["same"] = _once_each(tensors)
    return {name: tensor.contiguous() for name, tensor in kept.items()}, header


def _once_each(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(every tensor under its first name, its other names): K,V that are lent again are one tensor."""
    names = {id(tensor): name for name, tensor in reversed(tensors.items())}
    same = {name: names[id(tensor)] for name, tensor in tensors.items() if names[id(tensor)] != name}
    return {name: tensor for name, tensor in tensors.items() if name not in same}, same


def _flatten_kv(prefix: str, branches: BranchKeyValues) -> dict[str, Tensor]:
    return {
        f"{prefix}/{branch}/{layer}/{name}": tensor
        for branch, layers in enumerate(branches)
        for layer, kv in enumerate(layers)
        for name, tensor in (("key", kv.key_BFSHD), ("value", kv.value_BFSHD))
    }


def _flatten_kept(prefix: str, kept: Kept) -> dict[str, Tensor]:
    outputs = {
        f"{prefix}/output/{age}/{branch}": tensor
        for age, branches in enumerate(kept.outputs)
        for branch, tensor in enumerate(branches)
    }
    return outputs | {f"{prefix}/signal/{age}": tensor for age, tensor in enumerate(kept.signals)}


def _kept_header(kept: Kept) -> dict[str, Any]:
    return {
        "steps": kept.steps,
        "branches": [len(branches) for branches in kept.outputs],
        "signals": len(kept.signals),
        "skips": kept.skips,
        "drift": kept.drift,
    }


def _unflatten_kept(tensors: dict[str, Tensor], prefix: str, header: dict[str, Any]) -> Kept:
    return Kept(
        tuple(header["steps"]),
        tuple(
            tuple(tensors[f"{prefix}/output/{age}/{branch}"] for branch in range(count))
            for age, count in enumerate(header["branches"])
        ),
        tuple(tensors[f"{prefix}/signal/{age}"] for age in range(header["signals"])),
        header["skips"],
        header["drift"],
    )


def _aligned(data: bytes) -> dict[str, Tensor]:
    """Tensors of a safetensors file in memory of torch's own.

    In the file's buffer they lie at any address, and the last bits of a product may depend on that.
    """
    return {name: tensor.clone() for name, tensor in load(data).items()}


def _unflatten(path: Path) -> LoopState:
    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["state"])
    tensors = _aligned(path.read_bytes())
    tensors |= {name: tensors[first] for name, first in header.get("same", {}).items()}
    state = LoopState(next_tick=header["next_tick"], still=Stillness(**header.get("still", {})))
    for index, steps_done in header["steps_done"].items():
        history = tuple(tensors[f"history/{index}/{i}"] for i in range(header["history"][index]))
        negative = tensors.get(f"negative/{index}")
        block = BlockState(tensors[f"block/{index}"], steps_done, history, negative)
        if index in header.get("kept", {}):
            block.kept = _unflatten_kept(tensors, f"kept/{index}", header["kept"][index])
        state.blocks[int(index)] = block
    for index, step in header["later"].items():
        state.lent.for_later[int(index)] = step, _unflatten_kv(tensors, f"later/{index}")
    state.lent.anchor = _unflatten_kv(tensors, "anchor")
    for index, (step, lends) in header.get("last", {}).items():
        lent: Lends = {
            Lend(**lend | {"to": Lender(lend["to"])}): _unflatten_kv(tensors, f"last/{index}/{number}")
            for number, lend in enumerate(lends)
        }
        state.lent.last[int(index)] = step, lent
    for block, num_layers in header.get("attention", {}).items():
        runs: list[list[dict[str, Tensor]]] = [[{} for _ in range(count)] for count in num_layers]
        prefix = f"attention/{block}/"
        for path_name in (name for name in tensors if name.startswith(prefix)):
            run, layer, name = path_name.removeprefix(prefix).split("/")
            runs[int(run)][int(layer)][name] = tensors[path_name]
        state.lent.attention[int(block)] = tuple(tuple(layers) for layers in runs)
    return state


def _unflatten_kv(tensors: dict[str, Tensor], prefix: str) -> BranchKeyValues:
    branches: list[list[KeyValue]] = []
    while f"{prefix}/{len(branches)}/0/key" in tensors:
        layers: list[KeyValue] = []
        stem = f"{prefix}/{len(branches)}"
        while f"{stem}/{len(layers)}/key" in tensors:
            layers.append(
                KeyValue(tensors[f"{stem}/{len(layers)}/key"], tensors[f"{stem}/{len(layers)}/value"])
            )
        branches.append(layers)
    return tuple(tuple(layers) for layers in branches)
