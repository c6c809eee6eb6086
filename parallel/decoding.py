"""The rank that turns clean latents into frames, so that they come out while denoising goes on."""

import queue
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

from torch import Tensor

from vidgen.parallel.memory import peak_memory_bytes
from vidgen.parallel.rank import Failure, Whereabouts, threads
from vidgen.parallel.steps import Decode, Decoded


@dataclass(frozen=True, kw_only=True)
class DecodeReport:
    """A decoder's answer to a poll."""

    decoded: list[Decoded] = field(default_factory=list)
    failure: Failure | None = None
    peak_memory_bytes: int = 0


class Decoder:
    """Decodes blocks in the order given. How many may wait here is the first rank's business."""

    def __init__(self, whereabouts: Whereabouts) -> None:
        self._whereabouts = whereabouts
        self._work: _Work | None = None

    def where(self) -> Whereabouts:
        return self._whereabouts

    def begin(self, load: Callable[[], Decode], num_threads: int) -> None:
        """Decode for this render from now on; what is left of the one before is dropped."""
        if self._work is not None:
            self._work.waiting.put(None)
        self._work = _Work(load, num_threads)
        threading.Thread(target=self._work.run, daemon=True).start()

    def put(self, block: int, latents: Tensor) -> None:
        """Decode this block when those before it are done."""
        assert self._work is not None
        self._work.waiting.put((block, latents))

    def poll(self, wait_s: float = 0.0) -> DecodeReport:
        """What has been decoded since the last call; where that is nothing yet, within `wait_s`."""
        work = self._work
        assert work is not None
        found: list[Decoded | None] = []
        with suppress(queue.Empty):
            found.append(work.decoded.get(timeout=wait_s))
            while True:
                found.append(work.decoded.get_nowait())
        return DecodeReport(
            decoded=[decoded for decoded in found if decoded is not None],
            failure=work.failure,
            peak_memory_bytes=peak_memory_bytes(),
        )


class _Work:
    """One render's decoding, in a thread of its own."""

    def __init__(self, load: Callable[[], Decode], num_threads: int) -> None:
        self._load, self._num_threads = load, num_threads
        self.waiting: queue.SimpleQueue[tuple[int, Tensor] | None] = queue.SimpleQueue()
        self.decoded: queue.SimpleQueue[Decoded | None] = queue.SimpleQueue()  # None: look at `failure`
        self.failure: Failure | None = None

    def run(self) -> None:
        try:
            with threads(self._num_threads):
                decode = self._load()
                while (given := self.waiting.get()) is not None:
                    block, latents = given
                    self.decoded.put(Decoded(block=block, latents=latents, frames=decode(latents)))
        except BaseException as error:
            message = f"decoder: {type(error).__name__}: {error}"
            self.failure = Failure(message=message, trace=traceback.format_exc())
            self.decoded.put(None)
