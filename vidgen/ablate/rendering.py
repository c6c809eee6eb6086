"""The process that renders a cell's videos, seen from the one that wants them."""

import json
import queue
import subprocess
import sys
import tempfile
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from vidgen.ablate.settings import Cell

LET_GO_S = 30.0
SHOWN_CHARACTERS = 500


class CellFailed(Exception):
    """A cell's process ended, or took too long. The message is one line."""


class Worker:
    """Renders videos one by one in a process that is started for the first one."""

    def __init__(self, cell: Cell, timeout_s: float) -> None:
        self.cell, self.timeout_s = cell, timeout_s
        self._process: subprocess.Popen[str] | None = None
        self._listener: threading.Thread | None = None
        self._answers: queue.Queue[str] = queue.Queue()
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed in __exit__

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        process = self._process
        if process is not None:
            assert process.stdin is not None
            with suppress(OSError):
                process.stdin.close()  # it ends its ranks and itself
            try:
                process.wait(LET_GO_S)
            except subprocess.TimeoutExpired:
                process.terminate()
                with suppress(subprocess.TimeoutExpired):
                    process.wait(LET_GO_S)
                process.kill()
                process.wait()
            assert self._listener is not None and process.stdout is not None
            self._listener.join(LET_GO_S)
            process.stdout.close()
        self._errors.close()

    def render(self, prompt: str, seed: int, output: Path) -> dict[str, Any]:
        """One video and what it took; see worker.py. CellFailed when there is none in time."""
        self._ask({"prompt": prompt, "seed": seed, "output": str(output)})
        try:
            answer = self._answers.get(timeout=self.timeout_s)
        except queue.Empty:
            assert self._process is not None
            self._process.kill()
            raise CellFailed(f"no video after {self.timeout_s:g} s (--timeout)") from None
        if not answer:
            raise CellFailed(self._last_words())
        return json.loads(answer)

    def _ask(self, line: dict[str, Any]) -> None:
        if self._process is None:
            self._start()
        assert self._process is not None and self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(line) + "\n")
            self._process.stdin.flush()
        except OSError:
            raise CellFailed(self._last_words()) from None

    def _start(self) -> None:
        # its own session: Ctrl-C is for this process, which lets the video in hand go
        self._process = subprocess.Popen(
            [sys.executable, "-m", "vidgen.ablate.worker"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True, bufsize=1,
            start_new_session=True,
        )  # fmt: skip
        self._listener = threading.Thread(target=self._listen, args=(self._process,), daemon=True)
        self._listener.start()
        self._ask({"name": self.cell.name, "job": self.cell.job.model_dump(mode="json")})

    def _listen(self, process: "subprocess.Popen[str]") -> None:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("{"):
                self._answers.put(line)
        self._answers.put("")

    def _last_words(self) -> str:
        """What the process said last."""
        assert self._process is not None
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(LET_GO_S)
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        said = lines[-1] if lines else f"its process ended with {self._process.returncode}"
        return said[:SHOWN_CHARACTERS]
