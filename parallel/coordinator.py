"""A render on ranks from beginning to end: one gang after another until every tick is done.

It never touches tensors of the pipeline. What it hands on is safe to commit in the order in which it comes: a
state follows the blocks that were finished before it.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

from torch import Tensor

from vidgen.denoise.loop import LoopState
from vidgen.parallel.cluster import offered_ranks
from vidgen.parallel.evidence import Evidence, SpanFile
from vidgen.parallel.first import OfferedChange
from vidgen.parallel.gang import POLL_EVERY_S, Gang, GangConfig, GangFailed
from vidgen.parallel.rank import Blueprint
from vidgen.parallel.standing import Gangs
from vidgen.parallel.steps import Decode, Hooks, Step, blocks_before

LAST_POLL_S = 0.04  # ranks end soon after the last block
SETTLE_S = 5.0  # how long a cluster may take to notice what has been freed


class RanksFailed(RuntimeError):
    """Too many attempts failed. What was committed is kept."""


class Coordinator:
    """Runs gangs. With `min_ranks` an attempt after a failure goes on with fewer, if there are no more."""

    def __init__(
        self, config: GangConfig, blueprint: Blueprint, load_decode: Callable[[Tensor | None], Decode], *,
        max_restarts: int, min_ranks: int | None = None, spans: SpanFile | None = None,
        gangs: Gangs | None = None,
    ) -> None:  # fmt: skip
        self.config, self.blueprint, self.load_decode = config, blueprint, load_decode
        self.max_restarts, self.min_ranks, self.spans = max_restarts, min_ranks, spans
        self.evidence = Evidence(blueprint.task)
        self._gangs = gangs or Gangs()
        self._offered: list[OfferedChange] = []  # and not taken up yet
        self._num_told = 0  # of those, that the gang has been told

    def offer(self, change: OfferedChange) -> None:
        """Another prompt, as soon as the ranks can take it up: see Step.taken_up, one for each in order."""
        self._offered.append(change)

    def steps(self, hooks: Hooks) -> Iterator[Step]:
        """Everything to commit, until the last tick or until asked to stop. RanksFailed, see the class."""
        attempt = 0
        while True:
            state = hooks.load_state()
            if state.next_tick >= self.blueprint.task.timetable.num_ticks:
                return
            warm_up = hooks.latents_before(blocks_before(self.blueprint.task.timetable, state.next_tick))
            try:
                load = partial(self.load_decode, warm_up)
                with self._gangs.gang(self._config(attempt)) as gang:
                    gang.start(self.blueprint, load, state)
                    self._num_told = 0
                    assert gang.topology is not None
                    hooks.placed(gang.places())
                    self.evidence.begin(gang.topology, state.next_tick, gang.places()[:-1])
                    yield from self._follow(gang, state, hooks, attempt)
                return
            except GangFailed as failure:
                attempt += 1
                self.evidence.failures.append(str(failure))
                if attempt > self.max_restarts:
                    raise RanksFailed(
                        f"{failure}; gave up after {self.max_restarts} restarts (max_restarts)"
                    ) from failure
                hooks.note(f"{failure}; restart {attempt} of at most {self.max_restarts}")
            if hooks.should_stop():
                return

    def _follow(self, gang: Gang, state: LoopState, hooks: Hooks, attempt: int) -> Iterator[Step]:
        """One gang's steps, in an order that is safe to commit."""
        task = self.blueprint.task
        num_decoded = blocks_before(task.timetable, state.next_tick)
        waiting: list[LoopState] = []
        ticks_done = state.next_tick
        while True:
            hooks.check()
            gang.offer(self._offered[self._num_told :])
            self._num_told = len(self._offered)
            is_all_decoded = num_decoded == task.timetable.num_blocks
            news = gang.look(
                stop=hooks.should_stop(), committed_blocks=hooks.committed_blocks(),
                timeout_s=LAST_POLL_S if is_all_decoded else POLL_EVERY_S,
            )  # fmt: skip
            for decoded in news.decoded:
                assert decoded.block == num_decoded, f"block {decoded.block} came instead of {num_decoded}"
                num_decoded += 1
            waiting.extend(news.states)
            safe = [
                saved for saved in waiting if blocks_before(task.timetable, saved.next_tick) <= num_decoded
            ]
            waiting = waiting[len(safe) :]
            ticks_done = max(ticks_done, news.ticks_done)
            self.evidence.update(gang.stats(), gang.decoder_stats())
            if self.spans is not None:
                self.spans.write(attempt, news.spans)
            del self._offered[: len(news.taken_up)]
            self._num_told -= len(news.taken_up)
            yield Step(ticks_done, news.decoded, safe[-1] if safe else None, tuple(news.taken_up))
            if (
                news.ended_at is not None
                and num_decoded == blocks_before(task.timetable, news.ended_at)
                and not waiting
            ):
                return

    def _config(self, attempt: int) -> GangConfig:
        """The gang to start: as asked for, or after a failure with what there is."""
        config = replace(self.config, name=f"{self.config.name}-{attempt}")
        if attempt == 0 or self.min_ranks is None:
            return config
        asked, deadline = self.config.needs.num_ranks, time.monotonic() + SETTLE_S
        # what the last gang held comes back in a moment
        while (offered := offered_ranks(self.config.needs.device)) < asked and time.monotonic() < deadline:
            time.sleep(0.2)
        num_ranks = max(self.min_ranks, min(asked, offered))
        return replace(config, needs=replace(config.needs, num_ranks=num_ranks))
