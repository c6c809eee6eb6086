"""A server of tools/load.py's own."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

RUN = """
import json, sys
from vidgen.serve.app import serve
from vidgen.serve.config import load_server_config
sys.exit(serve(load_server_config(None, json.loads(sys.argv[1]))))
"""
ADDRESS = re.compile(r"serving on (http\S+)")
READY_WITHIN_S, STOP_WITHIN_S = 180.0, 30.0


@contextmanager
def own_server(replicas: int, jobs: int) -> Iterator[tuple[str, int]]:
    """(address, process id) of a server of this run, ready, its data thrown away at the end."""
    with tempfile.TemporaryDirectory(prefix="vidgen-load-", ignore_cleanup_errors=True) as folder:
        settings = {"port": 0, "data": f"{folder}/data", "replicas": replicas}
        settings["limits"] = {"max_running_per_key": max(jobs, 2)}
        log_path = Path(folder, "log")
        with log_path.open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-c", RUN, json.dumps(settings)],
                cwd=Path(__file__).resolve().parent.parent, stdout=log, stderr=subprocess.STDOUT,
            )  # fmt: skip
        try:
            yield _wait_until_ready(process, log_path), process.pid
        finally:
            process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(STOP_WITHIN_S)
            if process.poll() is None:
                process.kill()
                process.wait()


def _wait_until_ready(process: "subprocess.Popen[bytes]", log_path: Path) -> str:
    deadline_s = time.monotonic() + READY_WITHIN_S
    while time.monotonic() < deadline_s and process.poll() is None:
        found = ADDRESS.search(log_path.read_text(errors="replace"))
        with contextlib.suppress(httpx.TransportError):
            if found and httpx.get(f"{found[1]}/ready", trust_env=False).status_code == 200:
                return found[1]
        time.sleep(0.1)
    raise SystemExit(f"no server that is ready:\n{log_path.read_text(errors='replace')}")


def usage(pid: int) -> dict[str, float]:
    """Memory and CPU time of a process alone, without its workers; empty where there is no /proc."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        ticks = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    except OSError:
        return {}
    memory_mb = round(pages * os.sysconf("SC_PAGE_SIZE") / 2**20, 1)
    return {"memory_mb": memory_mb, "cpu_s": round(sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK"), 2)}
