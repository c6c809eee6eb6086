"""Who runs a job's ticks: this process, or ranks under Ray. Both hand on the same steps."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch

from vidgen.conditioning.prompts import BlockTexts
from vidgen.config import JobConfig
from vidgen.denoise.loop import run_tick
from vidgen.engine import Engine
from vidgen.kernels.attention.api import AUTO, check_name, choose
from vidgen.kernels.attention.backends import BY_NAME_ONLY, Need, Request
from vidgen.parallel.steps import Decoded, Hooks, Step, blocks_before
from vidgen.planning import Plan
from vidgen.sharing import check_lanes, lanes_of

if TYPE_CHECKING:
    from vidgen.parallel.standing import Gangs

Device = Literal["cpu", "cuda"]


class Executor(Protocol):
    """Runs a job's ticks from its last state on."""

    @property
    def device(self) -> Device:
        """Where the model runs."""
        ...

    def steps(self, hooks: Hooks) -> Iterator[Step]:
        """What there is to commit, in order, until the last tick or until asked to stop."""
        ...

    def offer(self, prompt: str, transition_blocks: int) -> None:
        """Another prompt, whose text is encoded, for all blocks that are not admitted yet.

        When it holds a step says from which block on; then the task is to be told (`Step.taken_up`).
        """
        ...

    def evidence(self) -> dict[str, Any] | None:
        """What running it took; None when there is nothing to tell."""
        ...


class InOneProcess:
    """The loop itself."""

    def __init__(self, engine: Engine, plan: Plan, device: Device) -> None:
        self.engine, self.plan = engine, plan
        self.device: Device = device
        self._num_repeated = self._num_offered = 0

    def offer(self, prompt: str, transition_blocks: int) -> None:
        """See Executor.offer."""
        self._num_offered += 1

    def steps(self, hooks: Hooks) -> Iterator[Step]:
        """See Executor.steps."""
        task = self.plan.task
        self.engine.load_dit(self.device)
        if self.plan.job.compile:
            self.engine.compile()
        state = hooks.load_state()
        decode = self.engine.decoder(hooks.latents_before(blocks_before(task.timetable, state.next_tick)))
        while state.next_tick < task.timetable.num_ticks:
            if self._num_offered:
                first = -(-state.next_tick // task.timetable.stride)
                taken_up = (first if first < task.timetable.num_blocks else None,) * self._num_offered
                self._num_offered = 0
                yield Step(state.next_tick, taken_up=taken_up)
            decoded = [
                Decoded(
                    block=finished.block.index,
                    latents=finished.latents_BCFYX.cpu(),
                    frames=decode(finished.latents_BCFYX),
                )
                for finished in run_tick(task, state, hooks.check)
            ]
            self._num_repeated = state.still.total
            stop = hooks.should_stop()
            is_saved = stop or state.next_tick % self.plan.job.state_every == 0
            yield Step(state.next_tick, decoded, state if is_saved else None)
            if stop:
                return

    def evidence(self) -> dict[str, Any] | None:
        """What was left out of attention, which steps were skipped and blocks repeated; else nothing."""
        task, told = self.plan.task, {}
        if task.sparsity is not None:
            told["attention"] = task.sparsity.tally.layers()
        if task.cache is not None:
            told["cache"] = task.cache.tally.as_dict()
        if task.still is not None:
            told["repeated_blocks"] = self._num_repeated
        return told or None


class OnRanks:
    """Ranks under Ray, which is connected."""

    def __init__(
        self, engine: Engine, plan: Plan, folder: Path, num_ranks: int, device: Device,
        gangs: "Gangs | None" = None,
    ) -> None:  # fmt: skip
        from vidgen.parallel.cluster import Needs, check_room
        from vidgen.parallel.gang import GangConfig

        self.engine, self.plan, self.folder, self._gangs = engine, plan, folder, gangs
        self.device: Device = device
        parallel = plan.job.parallel
        check_lanes(plan.task, lanes_of(parallel))
        self.needs = Needs(num_ranks=num_ranks, device=device)
        check_room(self.needs)
        self.config = GangConfig(
            needs=self.needs,
            name=f"vidgen-{folder.absolute().name}-{os.getpid()}",
            placement=parallel.placement.upper(),
            layers_per_rank=parallel.layers_per_rank,
            lanes=lanes_of(parallel),
            heartbeat_timeout_s=parallel.heartbeat_timeout_s,
        )
        self._coordinator: Any = None

    def steps(self, hooks: Hooks) -> Iterator[Step]:
        """See Executor.steps. RuntimeError after too many restarts."""
        from vidgen.parallel.coordinator import Coordinator
        from vidgen.parallel.evidence import SpanFile
        from vidgen.parallel.rank import Blueprint

        job = self.plan.job
        blueprint = Blueprint(
            task=self.plan.task,
            weights=self.engine.family.weights()[: len(self.plan.task.models)],
            compile=job.compile,
            threads=job.threads or 1,
            state_every=job.state_every,
            link_timeout_s=job.parallel.link_timeout_s,
            links=job.parallel.links,
            queue_blocks=job.parallel.queue_blocks,
            trace=job.parallel.trace,
            device=self.needs.device,
        )
        self._coordinator = Coordinator(
            self.config,
            blueprint,
            self.engine.family.load_decode(),
            max_restarts=job.parallel.max_restarts,
            min_ranks=job.parallel.min_ranks,
            spans=SpanFile(self.folder / "trace.jsonl") if job.parallel.trace else None,
            gangs=self._gangs,
        )
        yield from self._coordinator.steps(hooks)

    def offer(self, prompt: str, transition_blocks: int) -> None:
        """See Executor.offer."""
        from vidgen.parallel.first import OfferedChange

        texts = self.plan.task.texts
        assert isinstance(texts, BlockTexts)
        text = texts.encoded[prompt]
        self._coordinator.offer(
            OfferedChange(prompt=prompt, transition_blocks=transition_blocks, text_1NT=text)
        )

    def evidence(self) -> dict[str, Any] | None:
        """Slots, bubbles, bytes, memory, times and restarts."""
        return self._coordinator.evidence.as_dict() if self._coordinator is not None else None


def choose_device(wanted: Literal["auto", "cpu", "cuda"], *, cluster_has_gpus: bool | None = None) -> Device:
    """What `auto` is here. ValueError for a GPU where there is none; by default this machine is asked."""
    if wanted == "cpu":
        return "cpu"
    has_gpus = torch.cuda.is_available() if cluster_has_gpus is None else cluster_has_gpus
    if wanted == "cuda" and not has_gpus:
        raise ValueError("device=cuda: torch finds no GPU here; leave it out, or see `vidgen doctor`")
    return "cuda" if has_gpus else "cpu"


def check_backend(job: JobConfig, head_dim: int, device: Device) -> None:
    """ValueError in one line for an attention backend that cannot be used there."""
    name = job.attention.backend
    if name is None or check_name(name) == AUTO:
        return
    if device == "cuda" and not torch.cuda.is_available():
        return  # the ranks are elsewhere, and what they have cannot be known here
    needs = frozenset() if job.attention.sparsity.policy == "none" else frozenset({Need.BLOCKS})
    request = Request(device=device, dtype=torch.float32, head_dim=head_dim, needs=needs)
    if choose(request, name).name in BY_NAME_ONLY:
        logging.getLogger(__name__).warning("attention backend %s: for comparing, not for speed", name)


def _planned(engine: Engine, plan: Plan) -> Plan:
    """The plan on ranks that share the work as the planner chooses, on this machine or at the address."""
    from vidgen.choosing import choose
    from vidgen.parallel.cluster import local_ranks, wanted_address
    from vidgen.parallel.planner.hardware import load_hardware, profile_of

    job, parallel = plan.job, plan.job.parallel
    if parallel.ranks == "auto" and wanted_address(parallel.address) is not None:
        raise ValueError(
            "ranks=auto with scheme=auto and an address: say how many ranks the cluster is to give"
        )
    most = local_ranks() if parallel.ranks == "auto" else parallel.ranks
    hardware = load_hardware(parallel.hardware or profile_of(choose_device(job.device)))
    choice = choose(engine.family, job, most, hardware)
    logging.getLogger(__name__).warning(
        "plan: %d ranks by %s, about %.0f s on %s", choice.topology.num_ranks, choice.kind, choice.seconds,
        hardware.name,
    )  # fmt: skip
    chosen = parallel.model_copy(update=choice.job_settings()["parallel"])
    return replace(plan, job=job.model_copy(update={"parallel": chosen}))


@contextmanager
def executor(engine: Engine, plan: Plan, folder: Path, gangs: "Gangs | None" = None) -> Iterator[Executor]:
    """Who runs the plan; Ray is connected within, if it takes more than one rank. ValueError in one line.

    Ranks are those of `gangs`, where Ray is connected already.
    """
    from vidgen.parallel.cluster import connected, has_gpus, local_ranks, offered_ranks, wanted_address

    if plan.job.parallel.scheme == "auto":
        plan = _planned(engine, plan)
    parallel, dit = plan.job.parallel, engine.config
    num_layers, head_dim = dit.num_layers, dit.width // dit.num_heads
    address, ranks = wanted_address(parallel.address), parallel.ranks
    num_lanes = lanes_of(parallel).num_lanes

    def all_of(offered: int) -> int:
        """As many ranks as there are, and can be used."""
        return max(1, min(offered // num_lanes, num_layers)) * num_lanes

    if ranks == "auto" and address is None:
        ranks = all_of(local_ranks())
    if ranks == 1:
        device = choose_device(plan.job.device)
        check_backend(plan.job, head_dim, device)
        yield InOneProcess(engine, plan, device)
        return
    with connected(address, None if ranks == "auto" else ranks):
        device = choose_device(plan.job.device, cluster_has_gpus=has_gpus())
        check_backend(plan.job, head_dim, device)
        if ranks == "auto":
            ranks = all_of(offered_ranks(device))
        if ranks > 1:
            yield OnRanks(engine, plan, folder, ranks, device, gangs)
        else:
            yield InOneProcess(engine, plan, device)
