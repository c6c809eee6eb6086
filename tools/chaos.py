"""A soak: faults drawn from a seed against renders on ranks, `python tools/chaos.py --faults 200 --ranks 3`.

Every render is the command line in processes of its own. Ranks, the decoder and the driver are killed,
stopped or interrupted, and a job without a driver goes on on another number of ranks. The exit code is 1 if
a fault was not named, a process was left, or a render has not the frames of an undisturbed one.
"""

import argparse
import hashlib
import json
import os
import queue
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from vidgen.bench.machine import machine_facts, table  # noqa: E402
from vidgen.media.source import VideoSource  # noqa: E402

JOB: dict[str, Any] = {  # 40 blocks, 43 ticks
    "prompt": "a blue square moving up over a white background",
    "num_frames": 317,
    "num_inference_steps": 4,
    "state_every": 2,
    "queue": {"block_frames": 2, "context_frames": 1, "context_mode": "cache", "anchor_frames": 1},
    # queue_blocks: a block per poll, or this small model is done before many faults can hit it
    "parallel": {"max_restarts": 1000, "heartbeat_timeout_s": 5, "link_timeout_s": 20, "queue_blocks": 1},
    "output": {"sheet": False},
}
KINDS = {
    "rank killed": ("rank", signal.SIGKILL),
    "rank stopped": ("rank", signal.SIGSTOP),
    "decoder killed": ("the decoder", signal.SIGKILL),
    "decoder stopped": ("the decoder", signal.SIGSTOP),
    "driver killed": ("driver", signal.SIGKILL),
    "driver interrupted": ("driver", signal.SIGINT),
}
TICKS_BETWEEN = (1, 4)  # from a recovery to the next fault
MARK = "VIDGEN_CHAOS_RUN"
GONE_WITHIN_S, EVENT_WITHIN_S = 30.0, 300.0
MOST_WRONG = 10  # renders, and it gives up


class Wrong(Exception):
    """Something that must not happen, in one line."""


@dataclass(kw_only=True)
class Fault:
    """One fault and what became of it."""

    kind: str
    render: int
    struck_s: float
    who: tuple[str, str]  # name and process id
    named_s: float | None = None  # of the driver: until none of its processes was left
    recovered_s: float | None = None  # until the render moved on
    is_late: bool = False  # the render was finished before it could tell


class Run:
    """`vidgen ... --json` in a session of its own: its events, and every process that it has started."""

    def __init__(self, folder: Path, *argv: object) -> None:
        self._id = uuid.uuid4().hex
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._errors = folder / "stderr.txt"
        # every process inherits the mark; SPT_NOENV: or Ray's names for its processes overwrite it
        environment = os.environ | {MARK: self._id, "SPT_NOENV": "1"}
        with self._errors.open("w") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "vidgen", *map(str, argv), "--json"],
                cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True,
                start_new_session=True,
            )  # fmt: skip
        threading.Thread(target=self._read, daemon=True).start()

    def next(self) -> dict[str, Any] | None:
        """The next event; None when there is none to come. Wrong when it takes too long or is no JSON."""
        try:
            line = self._lines.get(timeout=EVENT_WITHIN_S)
        except queue.Empty as error:
            raise Wrong(f"silent for {EVENT_WITHIN_S:g} s") from error
        if line is None:
            self._lines.put(None)
            return None
        try:
            return json.loads(line)
        except ValueError as error:
            raise Wrong(f"not JSON on stdout: {line!r}") from error

    def end(self) -> int:
        """The exit code, once nothing of it is left."""
        while self.next() is not None:
            pass
        code = self.process.wait(EVENT_WITHIN_S)
        deadline = time.monotonic() + GONE_WITHIN_S
        while left := self._processes():
            if time.monotonic() > deadline:
                raise Wrong(f"left running: {left}")
            time.sleep(0.05)
        return code

    def last_words(self) -> str:
        return " | ".join(self._errors.read_text().splitlines()[-3:])

    def close(self) -> None:
        """End whatever is left."""
        for pid in self._processes():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait(EVENT_WITHIN_S)

    def _processes(self) -> dict[int, str]:
        """Names of its processes by their ids, whoever is their parent now."""
        found, mark = {}, f"{MARK}={self._id}".encode()
        for folder in Path("/proc").iterdir():
            with suppress(OSError):  # ended meanwhile, or somebody else's
                if folder.name.isdigit() and mark in (folder / "environ").read_bytes().split(b"\0"):
                    found[int(folder.name)] = (folder / "comm").read_text().strip()
        return found

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as lines:
            for line in lines:
                self._lines.put(line)
        self._lines.put(None)


class Soak:
    """Renders one after another, with faults, and keeps what became of them."""

    def __init__(self, folder: Path, max_ranks: int, seed: int, num_faults: int) -> None:
        self.folder, self.max_ranks, self.num_faults = folder, max_ranks, num_faults
        self.faults: list[Fault] = []
        self.wrong: list[str] = []
        self.num_renders = 0  # finished
        self.differing: set[int] = set()  # renders with other frames
        self.notes_without_fault: list[str] = []
        self._rng = random.Random(seed)
        self._run: Run | None = None
        (folder / "job.yaml").write_text(json.dumps(JOB))  # JSON is YAML
        self._whole: list[str] = []

    def to_the_end(self) -> None:
        """Throw all faults; stops early, with the current render ended, on Ctrl-C."""
        try:
            self._start("render", "whole", 1)
            self._finish("whole")
            self._whole = frame_digests(self.folder / "whole.mp4")
            index = 0
            while len(self.faults) < self.num_faults and len(self.wrong) < MOST_WRONG:
                try:
                    self._render(index)
                except Wrong as wrong:
                    assert self._run is not None
                    self.wrong.append(f"render {index}: {wrong}; {self._run.last_words()}")
                    self._run.close()
                index += 1
        finally:
            if self._run is not None:
                self._run.close()

    def _render(self, index: int) -> None:
        """One render from its start to the check of its frames."""
        name, ranks = f"render-{index:03d}", self.max_ranks
        self._start("render", name, ranks)
        driver_fault: Fault | None = None
        while True:
            is_finished = self._advance(self._rng.randint(*TICKS_BETWEEN), driver_fault)
            driver_fault = None
            if is_finished or len(self.faults) >= self.num_faults:
                break
            kind = self._rng.choice([kind for kind in KINDS if ranks > 1 or KINDS[kind][0] == "driver"])
            fault = self._strike(kind, index, name)
            if KINDS[kind][0] != "driver":
                if not self._until_recovered(fault):
                    break
            elif self._driver_ended(fault):
                break
            else:
                ranks = self._other_number(ranks)
                driver_fault = fault
                self._start("resume", name, ranks)
        self._finish(name)
        self.num_renders += 1
        if frame_digests(self.folder / f"{name}.mp4") != self._whole:
            self.differing.add(index)
            self.wrong.append(f"render {index}: other frames, see {self.folder / name}.mp4")
            return
        (self.folder / f"{name}.mp4").unlink()
        shutil.rmtree(self.folder / f"{name}.job")

    def _other_number(self, ranks: int) -> int:
        """Of ranks; seldom 1, because only the driver can fail then."""
        several = [number for number in range(2, self.max_ranks + 1) if number != ranks]
        is_one = ranks > 1 and (not several or self._rng.random() < 0.2)
        return 1 if is_one else self._rng.choice(several)

    def _start(self, command: str, name: str, ranks: int) -> None:
        new = ["--config", "job.yaml", "-o", f"{name}.mp4", "--overwrite"]
        what = new if command == "render" else [f"{name}.job"]
        self._run = Run(self.folder, command, *what, "--ranks", ranks)

    def _event(self) -> dict[str, Any]:
        """The next event of a run that is to go on. Wrong when it has ended."""
        assert self._run is not None
        event = self._run.next()
        if event is None or event["event"] in ("failed", "interrupted"):
            raise Wrong(f"ended early: {event}")
        return event

    def _advance(self, ticks: int, driver_fault: Fault | None) -> bool:
        """Wait for so many ticks more; whether it finished before."""
        first = None
        while True:
            event = self._event()
            if event["event"] == "note":
                self.notes_without_fault.append(event["message"])
            if event["event"] not in ("progress", "finished"):
                continue
            if driver_fault is not None and driver_fault.recovered_s is None:
                driver_fault.recovered_s = time.monotonic() - driver_fault.struck_s
                self._tell(driver_fault, f"resumed, at tick {event.get('ticks_done', 'the last')}")
            if event["event"] == "finished":
                return True
            first = event["ticks_done"] if first is None else first
            if event["ticks_done"] >= first + ticks:
                return False

    def _strike(self, kind: str, index: int, name: str) -> Fault:
        assert self._run is not None
        target, number = KINDS[kind]
        pid, who = self._run.process.pid, target
        if target != "driver":
            places = json.loads((self.folder / f"{name}.job" / "ranks.json").read_text())
            place = self._rng.choice([place for place in places if place["name"].startswith(target)])
            pid, who = place["pid"], place["name"]
        with suppress(ProcessLookupError):  # the render may just have ended
            if number == signal.SIGINT:
                os.killpg(pid, number)  # as a terminal does
            else:
                os.kill(pid, number)
        self.faults.append(Fault(kind=kind, render=index, struck_s=time.monotonic(), who=(who, f"pid {pid}")))
        return self.faults[-1]

    def _until_recovered(self, fault: Fault) -> bool:
        """Wait until the fault is named and the render has moved on; false when it was finished before."""
        others: list[str] = []
        while True:
            event = self._event()
            took_s = time.monotonic() - fault.struck_s
            if event["event"] == "note":
                if fault.named_s is None and all(part in event["message"] for part in fault.who):
                    fault.named_s = took_s
                else:
                    others.append(event["message"])
                    self.notes_without_fault.append(event["message"])
            elif event["event"] == "finished":
                fault.is_late = fault.named_s is None
                if fault.is_late and others:
                    raise Wrong(f"{fault.kind}: {' '.join(fault.who)} was named {others[0]!r}")
                fault.recovered_s = None if fault.is_late else took_s
                self._tell(fault, f"{fault.who[0]}, at the end of the render")
                return False
            elif event["event"] == "progress" and fault.named_s is not None:
                fault.recovered_s = took_s
                self._tell(fault, f"{fault.who[0]}, at tick {event['ticks_done']}")
                return True

    def _driver_ended(self, fault: Fault) -> bool:
        """Wait for the driver's end and that of all it started; whether the render was finished before."""
        assert self._run is not None
        code = self._run.end()
        fault.named_s = time.monotonic() - fault.struck_s
        fault.is_late = code == 0
        if code not in (0, 130 if fault.kind == "driver interrupted" else -signal.SIGKILL):
            raise Wrong(f"{fault.kind}: exit code {code}")
        return fault.is_late

    def _finish(self, name: str) -> None:
        """To the end of a run that should succeed."""
        assert self._run is not None
        code = self._run.end()
        if code or not (self.folder / f"{name}.mp4").exists():
            raise Wrong(f"exit code {code} instead of a finished render")

    def _tell(self, fault: Fault, text: str) -> None:
        named, recovered = (
            "never" if seconds is None else f"{seconds:.1f} s"
            for seconds in (fault.named_s, fault.recovered_s)
        )
        print(
            f"{len(self.faults)}/{self.num_faults} render {fault.render}: {fault.kind}, named in {named}, "
            f"recovered in {recovered} ({text})", file=sys.stderr, flush=True,
        )  # fmt: skip

    def rows(self) -> list[dict[str, Any]]:
        """The table: a row per kind of fault."""
        found = []
        for kind in KINDS:
            mine = [fault for fault in self.faults if fault.kind == kind]
            told = [fault for fault in mine if not fault.is_late]
            row: dict[str, Any] = {"fault": kind, "times": len(mine)}
            for what in ("named", "recovered"):
                values = [getattr(fault, f"{what}_s") for fault in told]
                known = [value for value in values if value is not None]
                row[f"{what}, median s"] = f"{statistics.median(known):.1f}" if known else "-"
                row[f"{what}, max s"] = f"{max(known):.1f}" if known else "-"
            row["after the end"] = len(mine) - len(told)
            row["other frames"] = sum(fault.render in self.differing for fault in mine)
            found.append(row)
        return found


def frame_digests(video: Path) -> list[str]:
    """SHA-256 of each decoded frame."""
    with VideoSource(video) as source:
        return [hashlib.sha256(frame.tobytes()).hexdigest() for frame in source]


def _arguments(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="chaos", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--faults", type=int, default=200, metavar="N", help="how many (default: 200)")
    parser.add_argument("--ranks", type=int, default=3, metavar="N", help="at most, 2 to 6 (default: 3)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of what is drawn (default: 0)")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="for renders (default: a temporary one)")
    given = parser.parse_args(words)
    if given.faults < 1 or not 2 <= given.ranks <= 6:
        parser.error(f"--faults {given.faults} --ranks {given.ranks}: need 1 fault or more, 2 to 6 ranks")
    return given


def main(words: list[str] | None = None) -> int:
    """The exit code: 0, 1 if anything was wrong, 130 after Ctrl-C."""
    given = _arguments(words)
    with tempfile.TemporaryDirectory(prefix="vidgen-chaos-", ignore_cleanup_errors=True) as temporary:
        folder = given.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        start = time.monotonic()
        soak = Soak(folder.absolute(), given.ranks, given.seed, given.faults)
        is_complete = True
        try:
            soak.to_the_end()
        except KeyboardInterrupt:
            is_complete = False
        except Wrong as wrong:
            soak.wrong.append(f"the undisturbed render: {wrong}")
        print(", ".join(f"{name} {value}" for name, value in machine_facts().items()))
        print(table(soak.rows()))
        print(
            f"seed {given.seed}, up to {given.ranks} ranks: {len(soak.faults)} faults in {soak.num_renders} "
            f"finished renders of {JOB['num_frames']} frames, {time.monotonic() - start:.0f} s; other frames "
            f"in {len(soak.differing)}; {len(soak.notes_without_fault)} losses that nobody made"
        )
        for line in soak.notes_without_fault:
            print(f"nobody's: {line}")
        for line in soak.wrong:
            print(f"WRONG: {line}")
    if soak.wrong:
        return 1
    return 0 if is_complete else 130


if __name__ == "__main__":
    sys.exit(main())
