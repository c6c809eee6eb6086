"""A row of stages and links as queues one behind the other, each first come, first served.

A server is done with a thing at max(server free, thing at hand) + duration. Over things in order, and for one
thing over servers in order, that is a running maximum: so a tick takes a few array operations for each of its
items or for each of the servers, whichever are fewer.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vidgen.parallel.simulation.workload import Faults, Item, Work

Times = NDArray[np.int64]  # whole nanoseconds
NS = 1_000_000_000
JITTER, SPELLS, FAILURES = range(3)  # what a draw is for, so that no two share their numbers

# n items in order, w stages, m servers: the stages, each followed by its link if messages may queue for it


def nanoseconds(seconds: float) -> int:
    return round(seconds * NS)


def served(free: int, at_hand_n: Times, duration_n: Times) -> Times:
    """When a server is done with each of some things that it serves in order."""
    total_n = np.cumsum(duration_n)
    return np.maximum(np.maximum.accumulate(at_hand_n - total_n + duration_n), free) + total_n


@dataclass(frozen=True, slots=True)
class Load:
    """How long items take: on the first stage, on the other servers and on the way to each of these."""

    first_n: Times
    total_nm: Times  # sums of durations, over the items or over the servers
    slack_nm: Times  # durations less those sums
    delay_m: Times
    busy_w: Times  # of each stage, all items


class Row:
    """The stages and links for given kinds of items. What is drawn depends on the seed and the tick only."""

    def __init__(self, work: Work, faults: Faults, seed: int, kinds: Sequence[Item]) -> None:
        self.work, self.faults, self.seed = work, faults, seed
        self.stage_kw = np.array([[nanoseconds(s) for s in work.stage_s(kind)] for kind in kinds], np.int64)
        self.num_stages = self.stage_kw.shape[1]
        self.is_noiseless = not (work.jitter or faults.slow_share or faults.slow_link_share)
        hops = self.num_stages - 1
        links = [(work.hop, work.hop_bytes)] * hops + [(work.back, work.back_bytes)] * bool(hops)
        links = links or [(work.hop, 0)]
        self._link_w = np.array([nanoseconds(size / link.bytes_per_s) for link, size in links], np.int64)
        self._latency_w = np.array([nanoseconds(link.latency_s) * bool(hops) for link, _ in links], np.int64)
        slowest_link = self._link_w.max() * (faults.slow_link_factor if faults.slow_link_share else 1)
        # a link that is never slower than the stage before it never has a message waiting
        self._has_queues = slowest_link > self.stage_kw.min() * (1 - work.jitter)
        self._spell = -1, np.ones(self.num_stages), np.ones(self.num_stages)

    def load(self, kinds_n: NDArray[np.int64], tick: int, part: slice) -> Load:
        """What a part of a tick's items takes, without those of no kind, which are skipped."""
        ran_n = np.arange(len(kinds_n))[part]
        ran_n = ran_n[kinds_n[ran_n] >= 0]
        stage_nw = self.stage_kw[kinds_n[ran_n]]
        link_w, latency_w = self._link_w, self._latency_w
        if not self.is_noiseless:
            slow_w, slow_link_w = self._slowness(tick)
            stage_nw = (stage_nw * self._jitter(tick, len(kinds_n))[ran_n] * slow_w).astype(np.int64)
            link_w = (link_w * slow_link_w).astype(np.int64)
        if self._has_queues:
            duration_nm = np.stack([stage_nw, np.broadcast_to(link_w, stage_nw.shape)], axis=2)
            duration_nm = duration_nm.reshape(len(stage_nw), 2 * self.num_stages)[:, 1:]
            delay_m = np.stack([np.zeros_like(latency_w), latency_w], axis=1).ravel()
        else:
            duration_nm, delay_m = stage_nw[:, 1:], link_w + latency_w
        if self._goes_by_item(duration_nm):
            total_nm = np.cumsum(duration_nm + delay_m[:-1], axis=1)
        else:
            total_nm = np.cumsum(duration_nm, axis=0)
        return Load(stage_nw[:, 0].copy(), total_nm, duration_nm - total_nm, delay_m, stage_nw.sum(axis=0))

    def idle_servers(self, since: int) -> Times:
        """When the servers after the first stage are free, if nothing has come yet."""
        return np.full(self.num_stages * 2 - 1 if self._has_queues else self.num_stages - 1, since, np.int64)

    def passed(self, load: Load, first_done_n: Times, free_m: Times) -> Times:
        """When items are back from the last stage; `free_m` becomes when each server has handled them all."""
        if self._goes_by_item(load.total_nm):
            back_n = first_done_n.copy()
            for item, (total_m, slack_m) in enumerate(zip(load.total_nm, load.slack_nm, strict=True)):
                reached_m = np.maximum.accumulate(free_m + slack_m)
                free_m[:] = np.maximum(reached_m, first_done_n[item]) + total_m
                back_n[item] = free_m[-1]
            return back_n + load.delay_m[-1]
        at_n = first_done_n
        for server in range(len(free_m)):
            ready_n = np.maximum.accumulate(at_n + load.delay_m[server] + load.slack_nm[:, server])
            at_n = np.maximum(ready_n, free_m[server]) + load.total_nm[:, server]
            free_m[server] = at_n[-1]
        return at_n + load.delay_m[-1]

    def _goes_by_item(self, values_nm: Times) -> bool:
        return values_nm.shape[0] <= values_nm.shape[1]

    def _jitter(self, tick: int, num_items: int) -> NDArray[np.float64]:
        """Factors [n, w] of mean 1 in a lane: a least time and an exponential rest; of lanes the slowest."""
        if not self.work.jitter:
            return np.ones((num_items, 1))
        drawn = np.random.default_rng([self.seed, JITTER, tick]).random((num_items, self.num_stages))
        rest = -np.log1p(-(drawn ** (1 / self.work.num_lanes)))
        return 1 + self.work.jitter * (rest - 1)

    def _slowness(self, tick: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Factors of stages and of links in a tick; one slow lane makes all wait."""
        faults, spell = self.faults, tick // self.faults.spell_ticks
        if self._spell[0] != spell:
            drawn = np.random.default_rng([self.seed, SPELLS, spell]).random((2, self.num_stages))
            shares = (
                (faults.slow_share, faults.slow_factor),
                (faults.slow_link_share, faults.slow_link_factor),
            )
            stages_w, links_w = (
                np.where(drawn_w < 1 - (1 - share) ** self.work.num_lanes, factor, 1.0)
                for drawn_w, (share, factor) in zip(drawn, shares, strict=True)
            )
            self._spell = spell, stages_w, links_w
        return self._spell[1], self._spell[2]
