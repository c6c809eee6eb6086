"""The command line as a function: argv in, exit code and both outputs out, in a folder of the test's own."""

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from vidgen.cli import main


@dataclass(frozen=True, kw_only=True)
class Ran:
    code: int
    out: str
    err: str


Run = Callable[..., Ran]


@pytest.fixture
def run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., Ran]:
    """Runs `vidgen` in this process; the working folder is tmp_path."""
    monkeypatch.chdir(tmp_path)

    def call(*argv: object) -> Ran:
        capfd.readouterr()
        code = main([str(part) for part in argv])
        captured = capfd.readouterr()
        return Ran(code=code, out=captured.out, err=captured.err)

    return call


@pytest.fixture
def listing(tmp_path: Path) -> Callable[[], dict[str, str]]:
    """Everything under tmp_path: path -> SHA-256, or "" of a folder."""

    def read() -> dict[str, str]:
        return {
            os.path.relpath(path, tmp_path): hashlib.sha256(path.read_bytes()).hexdigest()
            if path.is_file()
            else ""
            for path in tmp_path.rglob("*")
        }

    return read


@pytest.fixture
def refused(run: Run, listing: Callable[[], dict[str, str]]) -> Callable[..., str]:
    """Runs a command that must be refused without a trace on the disk; its one line."""

    def check(*argv: object) -> str:
        before = listing()
        ran = run(*argv)
        assert ran.code == 2, ran
        lines = [line for line in ran.err.splitlines() if line.strip() and not line.startswith("warning: ")]
        assert len(lines) == 1 and lines[0].startswith("vidgen: error: "), ran.err
        assert "Traceback" not in ran.err and not ran.out
        assert listing() == before
        return lines[0]

    return check
