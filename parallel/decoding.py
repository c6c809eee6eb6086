"""The rank that turns clean latents into frames, so that they come out while denoising goes on."""

import queue
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from vidgen.parallel.rank import Failure, Whereabouts, peak_memory_bytes, threads
from vidgen.parallel.steps import Decode, Decoded


@dataclass(frozen=True, kw_only=True)
class DecodeReport:
    """A decoder's answer to a poll."""

    decoded: list[Decoded] = field(default_factory=list)
    failure: Failure | None = None
    peak_memory_bytes: int = 0


class Decoder:
    """Decodes blocks in the order given. How many may wait here is the first rank's business."""

    def __init__(self, load: Callable[[], Decode], num_threads: int, whereabouts: Whereabouts) -> None:
        self._load, self._num_threads, self._whereabouts = load, num_threads, whereabouts
        self._waiting: queue.SimpleQueue[tuple[int, Tensor]] = queue.SimpleQueue()
        self._decoded: queue.SimpleQueue[Decoded] = queue.SimpleQueue()
        self._failure: Failure | None = None
        threading.Thread(target=self._guarded, daemon=True).start()

    def where(self) -> Whereabouts:
        return self._whereabouts

    def put(self, block: int, latents: Tensor) -> None:
        """Decode this block when those before it are done."""
        self._waiting.put((block, latents))

    def poll(self) -> DecodeReport:
        """What has been decoded since the last call."""
        failure, decoded = self._failure, []
        while not self._decoded.empty():
            decoded.append(self._decoded.get())
        return DecodeReport(decoded=decoded, failure=failure, peak_memory_bytes=peak_memory_bytes())

    def _guarded(self) -> None:
        try:
            with threads(self._num_threads):
                decode = self._load()
                while True:
                    block, latents = self._waiting.get()
                    frames = decode(latents)
                    self._decoded.put(Decoded(block=block, latents=latents, frames=frames))
        except BaseException as error:
            message = f"decoder: {type(error).__name__}: {error}"
            self._failure = Failure(message=message, trace=traceback.format_exc())
