"""Ranks as Ray actors: started together, watched, and ended together.

The gang only starts, watches and collects; ranks talk to each other by themselves (rank.py). A rank that
died, failed, or does not answer ends the attempt with GangFailed, which names it. A gang whose attempt ended
well can be given the next render (standing.py).
"""

import os
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from vidgen.denoise.loop import LoopState
from vidgen.parallel.actors import DecoderActor, RankActor
from vidgen.parallel.cluster import Needs
from vidgen.parallel.decoding import DecodeReport
from vidgen.parallel.first import OfferedChange
from vidgen.parallel.members import DECODER, Member, first_line, is_cause, why
from vidgen.parallel.rank import Blueprint, Report
from vidgen.parallel.shapes import Shapes
from vidgen.parallel.shares import join, share
from vidgen.parallel.steps import Decode, Decoded
from vidgen.parallel.topology import Lanes, Topology, balanced, by_hand

POLL_EVERY_S = 0.2
POLLS = "polls"  # a concurrency group of the decoder's
ANSWER_S = 0.02  # between the end of a decoder's waiting and its answer's being here
BLAME_WITHIN_S = 2.0  # after a first failure: how long the true cause may take to show


class GangFailed(Exception):
    """An attempt that cannot go on. The message names the rank and what happened to it."""


@dataclass(frozen=True, kw_only=True)
class GangConfig:
    """How the ranks are placed and watched."""

    needs: Needs
    name: str  # of the placement group
    placement: str = "PACK"
    layers_per_rank: tuple[int, ...] | None = None
    lanes: Lanes = Lanes()
    heartbeat_timeout_s: float = 15.0
    start_timeout_s: float = 120.0


@dataclass
class News:
    """What has come in since the last look."""

    decoded: list[Decoded] = field(default_factory=list)
    states: list[LoopState] = field(default_factory=list)
    spans: list[tuple[int, tuple[float, ...]]] = field(default_factory=list)  # (rank, span)
    taken_up: list[int | None] = field(default_factory=list)  # see rank.Report
    ticks_done: int = 0
    ended_at: int | None = None


class Gang:
    """Ranks and their decoder. Use as a context manager: leaving it ends every process of it."""

    def __init__(self, config: GangConfig) -> None:
        self.config = config
        self._group: PlacementGroup | None = None
        self.members: list[Member] = []
        self.topology: Topology | None = None
        self._measured_cuts: dict[str, Topology] = {}  # by what they were measured for
        self._decoder_memory_bytes = 0
        self._parts: dict[int, dict[int, LoopState]] = {}  # next tick -> rank -> its part of the state

    @property
    def ranks(self) -> list[Member]:
        return [member for member in self.members if member.index != DECODER]

    def __enter__(self) -> "Gang":
        try:
            self._place()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self, blueprint: Blueprint, load_decode: Callable[[], Decode], state: LoopState) -> None:
        """Cut the layers, and set every rank to work from this state. GangFailed when one cannot."""
        self._parts = {}
        for member in self.members:
            member.report = None
        decoder = self.members[-1]
        shared = ray.put(blueprint)
        begun = [(decoder, decoder.actor.begin.remote(load_decode, blueprint.threads))]
        begun += [(member, member.actor.begin.remote(shared)) for member in self.ranks]
        self._ask_all(begun)
        self.topology = self._cut(blueprint)
        first, topology = self.ranks[0], self.topology
        tokens_per_frame = Shapes.of(blueprint.task).tokens_per_frame
        meet_at = self._ask(first.actor.open_door.remote(), first)
        self._ask_all(
            [
                (member, member.actor.start.remote(
                    topology, share(state, topology.stage(member.index), tokens_per_frame), meet_at
                ))
                for member in self.ranks
            ]
        )  # fmt: skip

    def _cut(self, blueprint: Blueprint) -> Topology:
        """Which rank holds what."""
        given, lanes = self.config.layers_per_rank, self.config.lanes
        num_layers, num_ranks = blueprint.task.model.config.num_layers, len(self.ranks)
        if num_ranks % lanes.num_lanes:
            lanes = Lanes()  # fewer ranks than were asked for: a single lane takes any number
        num_stages = num_ranks // lanes.num_lanes
        if given is not None and len(given) == num_stages:
            return Topology(by_hand(given, num_layers).layers_per_stage, lanes)
        if num_stages == 1:
            return Topology((num_layers,), lanes)
        # costs are never measured alike twice, and another cut would have ranks read weights again
        asked = repr((blueprint.weights, blueprint.compile, lanes, num_stages))
        if asked in self._measured_cuts:
            return self._measured_cuts[asked]
        first = self.ranks[0]  # a gang with fewer ranks than were asked for is cut anew
        costs = self._ask(first.actor.measure.remote(), first)
        cut = balanced(num_layers, num_stages, layer=costs.layer, first=costs.first, last=costs.last)
        self._measured_cuts[asked] = Topology(cut.layers_per_stage, lanes)
        return self._measured_cuts[asked]

    def offer(self, changes: Sequence[OfferedChange]) -> None:
        """Tell every first stage of other prompts; the first lane's last, since it decides when they hold."""
        assert self.topology is not None
        firsts = [member for member in self.ranks if self.topology.stage(member.index).is_first]
        for change in changes:
            self._ask_all([(member, member.actor.offer.remote(change)) for member in firsts[1:]])
            self._ask(firsts[0].actor.offer.remote(change), firsts[0])

    def give_up(self, timeout_s: float) -> bool:
        """Have every rank give up its part at its next item; whether all of them did in time."""
        until = time.monotonic() + timeout_s
        try:
            ray.get([member.actor.give_up.remote() for member in self.ranks], timeout=timeout_s)
            at_rest = ray.get(
                [member.actor.is_at_rest.remote(max(0.0, until - time.monotonic())) for member in self.ranks],
                timeout=timeout_s,
            )
        except RayError:
            return False
        return all(at_rest)

    def ping(self, timeout_s: float) -> None:
        """Ask members of a gang that is at rest whether they are there. GangFailed when one is not."""
        for member in self.members:
            member.ping = member.ping or member.actor.where.remote()
        waiting = {member.ping: member for member in self.members}
        ready, _ = ray.wait(list(waiting), num_returns=len(waiting), timeout=timeout_s)
        for reference in ready:
            member = waiting[reference]
            member.ping = None
            try:
                ray.get(reference)
            except RayError as error:
                raise GangFailed(f"{member.described()} died") from error
            member.heard_s = time.monotonic()
        silent_s = self.config.heartbeat_timeout_s
        for member in self.members:
            if time.monotonic() - member.heard_s > silent_s:
                raise GangFailed(f"{member.described()} has not answered for {silent_s:g} s")

    def ages_s(self) -> tuple[float, ...]:
        """How long ago each rank was heard, and last the decoder."""
        return tuple(time.monotonic() - member.heard_s for member in self.members)

    def is_well(self, timeout_s: float) -> bool:
        """Whether every member answers in time. For a gang that is not at work."""
        references = [member.actor.where.remote() for member in self.members]
        try:
            ray.get(references, timeout=timeout_s)
        except RayError:
            return False
        return True

    def look(self, *, stop: bool = False, committed_blocks: int = 0, timeout_s: float = POLL_EVERY_S) -> News:
        """Poll everybody, and collect what they answer: until a block is decoded, or for `timeout_s`.

        GangFailed, see the module.
        """
        for member in self.members:
            if member.pending is None and member.lost is None:
                member.asked_s = time.monotonic()
                if member.index == DECODER:
                    polls = member.actor.poll.options(concurrency_group=POLLS)  # beside its other calls
                    member.pending = polls.remote(wait_s=max(0.0, timeout_s - ANSWER_S))
                else:
                    member.pending = member.actor.poll.remote(stop=stop, committed_blocks=committed_blocks)
        news = News()
        self._collect(news, timeout_s)
        failed = self._failed()
        if failed:
            raise GangFailed(self._blame(news))
        self._complete_states(news)
        return news

    def pids(self) -> dict[int, int]:
        """Process of every member, by rank; the decoder's is -1."""
        return {member.index: member.where.pid for member in self.members if member.where is not None}

    def places(self) -> list[dict[str, Any]]:
        """Where each rank and, last, the decoder runs, and what its process held before loading anything."""
        return [
            {
                "name": member.name,
                "pid": member.where.pid,
                "host": member.where.host,
                "memory_at_start_bytes": member.where.peak_memory_bytes,
            }
            for member in self.members
            if member.where is not None
        ]

    def decoder_stats(self) -> dict[str, float]:
        """The decoder's newest figures."""
        return {"peak_memory_bytes": self._decoder_memory_bytes}

    def stats(self) -> dict[int, dict[str, float]]:
        """The newest figures of every rank."""
        return {m.index: m.report.stats for m in self.ranks if m.report is not None}

    def close(self) -> None:
        """End every process of the gang, stopped ones too, and give the resources back."""
        own_node = ray.get_runtime_context().get_node_id() if ray.is_initialized() else None
        for member in self.members:
            with suppress(Exception):
                ray.kill(member.actor)
            if member.where is not None and member.where.node == own_node:
                with suppress(ProcessLookupError, PermissionError):
                    os.kill(member.where.pid, signal.SIGKILL)  # a stopped process does not hear Ray
        if self._group is not None:
            with suppress(Exception):
                remove_placement_group(self._group)
        self.members, self._group = [], None

    def _place(self) -> None:
        needs = self.config.needs
        group = placement_group(needs.bundles(), strategy=self.config.placement, name=self.config.name)
        self._group = group
        if not group.wait(self.config.start_timeout_s):
            free = {name: ray.available_resources().get(name, 0) for name in needs.total()}
            raise GangFailed(
                f"no room for {needs.num_ranks} ranks within {self.config.start_timeout_s:g} s: needed "
                f"{needs.total()}, free {free}"
            )
        gpus = 1 if needs.device == "cuda" else 0

        def options(bundle: int, num_gpus: int) -> dict[str, Any]:
            where = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=bundle)
            return {"num_cpus": 1, "num_gpus": num_gpus, "max_restarts": 0, "scheduling_strategy": where}

        remote: Any = ray.remote  # whose types know only the plain form
        decoder = remote(concurrency_groups={POLLS: 1})(DecoderActor)
        decoder = decoder.options(**options(needs.num_ranks, 0)).remote()
        self.members = [
            Member(index, ray.remote(RankActor).options(**options(index, gpus)).remote(index, decoder))
            for index in range(needs.num_ranks)
        ]
        self.members.append(Member(DECODER, decoder))
        asked = [(member, member.actor.where.remote()) for member in self.members]
        for member, reference in asked:
            member.where, member.heard_s = self._ask(reference, member), time.monotonic()

    def _ask_all(self, asked: Sequence[tuple[Member, Any]]) -> None:
        for member, reference in asked:
            self._ask(reference, member)

    def _ask(self, reference: Any, member: Member) -> Any:
        """An answer, within the time that starting may take."""
        try:
            return ray.get(reference, timeout=self.config.start_timeout_s)
        except RayError as error:
            reason = "did not answer" if isinstance(error, TimeoutError) else first_line(error)
            raise GangFailed(f"{member.described()} could not be started: {reason}") from error

    def _collect(self, news: News, timeout_s: float) -> None:
        """Take the answers that come within the time; note who is lost."""
        waiting = {member.pending: member for member in self.members if member.pending is not None}
        if not waiting:
            return
        ready, _ = ray.wait(list(waiting), num_returns=len(waiting), timeout=timeout_s)
        for reference in ready:
            member = waiting[reference]
            member.pending, member.heard_s = None, time.monotonic()
            try:
                self._take(member, ray.get(reference), news)
            except RayActorError:
                member.lost = f"{member.described()} died"
            except RayError as error:
                member.lost = f"{member.described()} does not answer: {first_line(error)}"
        now = time.monotonic()
        for member in self.members:
            if member.pending is not None and now - member.asked_s > self.config.heartbeat_timeout_s:
                silent = f"has not answered for {self.config.heartbeat_timeout_s:g} s"
                member.lost = f"{member.described()} {silent}: stopped, out of memory, or its node is gone"

    def _take(self, member: Member, report: Report | DecodeReport, news: News) -> None:
        if isinstance(report, DecodeReport):
            news.decoded.extend(report.decoded)
            self._decoder_memory_bytes = report.peak_memory_bytes
            member.report = Report(doing="decoding", doing_s=0, failure=report.failure)
            return
        member.report = report
        news.ticks_done = max(news.ticks_done, report.ticks_done)
        news.spans.extend((member.index, span) for span in report.spans)
        if member.index == 0:
            news.taken_up.extend(report.taken_up)
        for next_tick, part in report.states:
            self._parts.setdefault(next_tick, {})[member.index] = part

    def _complete_states(self, news: News) -> None:
        """States of which every rank's part is here; older ones that never will be are forgotten."""
        for tick in sorted(self._parts):
            parts = self._parts[tick]
            if len(parts) == len(self.ranks):
                assert self.topology is not None
                news.states.append(join(parts, self.topology))
                self._parts = {other: kept for other, kept in self._parts.items() if other > tick}
        ends = {member.report.ended_at if member.report else None for member in self.ranks}
        if len(ends) == 1:
            (news.ended_at,) = ends

    def _failed(self) -> list[Member]:
        return [m for m in self.members if m.lost or (m.report is not None and m.report.failure)]

    def _blame(self, news: News) -> str:
        """Who was first: a rank that is gone or broke by itself, rather than one that lost another."""
        until = time.monotonic() + BLAME_WITHIN_S
        while time.monotonic() < until and not any(is_cause(member) for member in self._failed()):
            for member in self.members:
                if member.pending is None and member.lost is None:
                    member.pending, member.asked_s = member.actor.poll.remote(), time.monotonic()
            self._collect(news, 0.2)
            time.sleep(0.05)
        failed = sorted(self._failed(), key=lambda member: not is_cause(member))
        if is_cause(failed[0]):
            return why(failed[0])
        for member in self.members:  # stopped, or stuck in its work
            if member.pending is not None:
                return f"{member.described()} does not answer; {why(failed[0])}"
            report = member.report
            if report is not None and report.failure is None and report.doing.startswith("computing"):
                return f"{member.described()} has been {report.doing} for {report.doing_s:.0f} s"
        return why(failed[0])
