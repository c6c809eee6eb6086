"""A worker process: holds loaded models and makes one video after the other, as its parent says.

The main thread renders, one thread listens to the parent, one tells it every second that all is well. Nothing
here lives longer than the parent. torch is imported when the process works, so the parent can import this.
"""

import ctypes
import logging
import os
import signal
import threading
import time
from contextlib import suppress
from glob import glob
from multiprocessing.connection import Connection
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING

from vidgen.serve.config import ServerConfig
from vidgen.serve.work.messages import Beat, CannotStart, Order, Ready, Report, Run

if TYPE_CHECKING:
    from vidgen.serve.work.worker import Worker

BEAT_EVERY_S = 1.0
TEND_EVERY_S = 1.0
BEHIND_THE_SERVER = 5  # niceness of a worker that computes on the CPU: requests are answered first
PR_SET_PDEATHSIG = 1
LOG = logging.getLogger(__name__)


def main(index: int, config: ServerConfig, pipe: Connection, parent: int) -> None:
    """The process, from its start to its end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, who then says what to do
    _die_with(parent)
    take_share(index, config)
    body = Body(config, pipe)
    for work in (body.listen, body.beat):
        threading.Thread(target=work, name=work.__name__, daemon=True).start()
    body.work()


class Body:
    """The process's threads and what they share."""

    def __init__(self, config: ServerConfig, pipe: Connection) -> None:
        self._config, self._pipe = config, pipe
        self._sending = threading.Lock()
        self._orders: SimpleQueue[Run] = SimpleQueue()
        self._worker: Worker | None = None  # once it is loaded

    def send(self, report: Report) -> None:
        """Tell the parent. Without one there is nothing left to do."""
        try:
            with self._sending:
                self._pipe.send(report)
        except OSError:
            _end_at_once()

    def work(self) -> None:
        """Load the models, then make videos until killed."""
        started = time.monotonic()
        try:
            from vidgen.serve.work.worker import Worker

            worker = Worker(self._config, self.send)
            worker.warm_up()
        except Exception as error:
            LOG.exception("a worker cannot start")
            self.send(CannotStart(message=f"{type(error).__name__}: {error}".splitlines()[0]))
            return
        self._worker = worker
        self.send(Ready(device=worker.device, seconds=time.monotonic() - started))
        while True:
            try:
                self._orders.get(timeout=TEND_EVERY_S)
            except Empty:
                worker.tend()
                continue
            worker.work()

    def listen(self) -> None:
        """Hand on what the parent says; a worker without a parent ends."""
        while True:
            try:
                order: Order = self._pipe.recv()
            except (EOFError, OSError):
                _end_at_once()
                return
            if self._worker is None:
                continue
            if isinstance(order, Run):
                self._worker.begin(order)  # here, so that an order right behind it finds it
                self._orders.put(order)
            else:
                self._worker.hear(order)

    def beat(self) -> None:
        """Tell every second how far this process is."""
        while True:
            worker = self._worker
            self.send(worker.beat() if worker else Beat(video_id=None, num_forwards=0, is_held=False))
            time.sleep(BEAT_EVERY_S)


def _die_with(parent: int) -> None:
    """Have the kernel end this process with the thread that started it, where it can (Linux)."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        _end_at_once()  # it was gone before


def _end_at_once() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def take_share(index: int, config: ServerConfig) -> None:
    """This worker's share of the machine, by variables that libraries read when they are imported."""
    if not _gpu_files():
        os.nice(BEHIND_THE_SERVER)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // config.replicas)))
    if config.replicas == 1 or any(_ranks(model.job) != 1 for model in config.models.values()):
        return  # ranks find their GPUs by Ray
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = listed.split(",") if listed else [str(i) for i in range(len(_gpu_files()))]
    if gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus[index % len(gpus)]


def _gpu_files() -> list[str]:
    return glob("/dev/nvidia[0-9]*")


def _ranks(job: dict[str, object]) -> object:
    parallel = job.get("parallel")
    return parallel.get("ranks", 1) if isinstance(parallel, dict) else 1
