"""Many jobs, some at a time: the replica axis. Each is a process of its own, and each video what it is alone.

A batch is a folder: what is finished in it is left as it is, what was begun goes on, so the same call made
again goes on where it was stopped.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from vidgen.config import JobConfig, dump_job, parse_job, read_yaml

LOOK_EVERY_S = 0.1
LET_GO_S = 60.0  # after asking: a render finishes its tick


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One job of a batch."""

    name: str
    job: JobConfig
    folder: Path  # of the batch

    @property
    def job_folder(self) -> Path:
        return self.folder / f"{self.name}.job"

    @property
    def is_finished(self) -> bool:
        from vidgen.journal import Journal

        if not self.job.output.path.exists() or not (self.job_folder / "job.yaml").exists():
            return False
        with Journal(self.job_folder) as journal:
            return bool(journal.fact("finished"))


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a job ended. `message` is the last line that it wrote when it failed."""

    entry: Entry
    code: int
    seconds: float
    message: str = ""


def read_batch(path: Path, base: Mapping[str, Any], folder: Path) -> list[Entry]:
    """The jobs of a file: one prompt a line, or (.yaml) a list of settings, each over `base`.

    Videos are FOLDER/NAME.mp4; names are numbers, or `name` of a setting. ValueError in one line.
    """
    if path.suffix in (".yaml", ".yml"):
        wanted: Any = read_yaml(path) or []
        if not isinstance(wanted, list) or not all(isinstance(values, dict) for values in wanted):
            raise ValueError(f"{path}: need a list of mappings, such as '- prompt: a red circle'")
    else:
        lines = path.read_text(encoding="utf-8").splitlines()
        wanted = [{"prompt": line.strip()} for line in lines if line.strip()]
    if not wanted:
        raise ValueError(f"{path}: holds no job; write one prompt a line")
    entries = []
    for number, values in enumerate(wanted):
        name = str(values.get("name", f"{number:04d}"))
        if Path(name).name != name or name.startswith("."):
            raise ValueError(f"{path}: name={name!r}: need a plain file name")
        own: dict[str, Any] = {key: value for key, value in values.items() if key != "name"}
        if "prompt" in own or "segments" in own:
            base = {key: value for key, value in base.items() if key not in ("prompt", "segments")}
        output = {**(base.get("output") or {}), **(own.get("output") or {}), "path": folder / f"{name}.mp4"}
        job = parse_job({**base, **own, "output": output}, f"{path}: job {number + 1}")
        job.timeline()
        entries.append(Entry(name=name, job=job, folder=folder))
    names = [entry.name for entry in entries]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"{path}: two jobs are named {twice}; give each a name of its own")
    return entries


def run_batch(
    entries: Sequence[Entry],
    num_replicas: int,
    *,
    ended: Callable[[Outcome], None] = lambda outcome: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> list[Entry]:
    """Render what is not finished yet, `num_replicas` at a time; the jobs that are not finished after it.

    `ended` is told of each as it ends. When asked to stop, those at work finish their tick and can be gone on
    with. One that fails leaves the others untouched.
    """
    waiting = [entry for entry in entries if not entry.is_finished]
    waiting.reverse()
    free, at_work = list(range(num_replicas)), list[_Render]()
    try:
        while waiting or at_work:
            stops = should_stop()
            while waiting and free and not stops:
                at_work.append(_Render(waiting.pop(), free.pop(0)))
            for render in [render for render in at_work if render.has_ended]:
                at_work.remove(render)
                free.append(render.replica)
                ended(render.outcome())
            if stops and not at_work:
                break
            if stops:
                for render in at_work:
                    render.ask_to_stop()
            time.sleep(LOOK_EVERY_S)
    finally:
        for render in at_work:
            render.end()
    return [entry for entry in entries if not entry.is_finished]


class _Render:
    """A process that renders a job, or goes on with it."""

    def __init__(self, entry: Entry, replica: int) -> None:
        self.entry, self.replica = entry, replica
        self._started, self._is_asked = time.monotonic(), False
        folder = entry.job_folder
        if (folder / "job.yaml").exists():
            command = ["resume", str(folder)]
        else:
            entry.folder.mkdir(parents=True, exist_ok=True)
            config = entry.folder / f"{entry.name}.yaml"
            config.write_text(dump_job(entry.job), encoding="utf-8")
            command = ["render", "--config", str(config), "--job", str(folder), "--overwrite"]
        self._log: IO[bytes] = (entry.folder / f"{entry.name}.log").open("ab")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "vidgen", *command, "--json"],
            stdout=self._log, stderr=subprocess.STDOUT, env=self._environment(), start_new_session=True,
        )  # fmt: skip

    @property
    def has_ended(self) -> bool:
        return self._process.poll() is not None

    def outcome(self) -> Outcome:
        self._log.close()
        code, message = self._process.returncode, ""
        if code:
            lines = (self.entry.folder / f"{self.entry.name}.log").read_text(errors="replace").splitlines()
            message = lines[-1] if lines else ""
        seconds = time.monotonic() - self._started
        return Outcome(entry=self.entry, code=code, seconds=seconds, message=message)

    def ask_to_stop(self) -> None:
        if not self._is_asked:
            self._is_asked = True
            with suppress(ProcessLookupError):
                self._process.send_signal(signal.SIGINT)

    def end(self) -> None:
        self.ask_to_stop()
        try:
            self._process.wait(LET_GO_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()

    def _environment(self) -> dict[str, str]:
        """With a GPU of its own, where there are several and the job takes one rank."""
        listed = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        if self.entry.job.parallel.ranks != 1 or len(listed) < 2:
            return dict(os.environ)
        return {**os.environ, "CUDA_VISIBLE_DEVICES": listed[self.replica % len(listed)]}
