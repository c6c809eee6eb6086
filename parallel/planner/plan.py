"""Every way to render a video on some ranks, what each would take, which is best, and why the others are not.

A plan is a scheme (which decides the video) on a topology (which does not). Nothing is proposed that does not
fit into memory. Times are those of a render that has begun: starting processes and loading are not in them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from vidgen.denoise.timetable import Timetable
from vidgen.parallel.first import default_in_flight
from vidgen.parallel.links import DEPTH_BYTES, DEPTHS
from vidgen.parallel.planner.cost_model import CostModel
from vidgen.parallel.planner.flops import render_flops
from vidgen.parallel.planner.hardware import Hardware
from vidgen.parallel.planner.memory_model import Memory, rank_memory
from vidgen.parallel.planner.schemes import Scheme
from vidgen.parallel.planner.steps import Steps, item_counts, steps_of
from vidgen.parallel.planner.work import Film
from vidgen.parallel.simulation.simulate import Item, Link, Run, Work, simulate
from vidgen.parallel.simulation.workload import WHOLE
from vidgen.parallel.topology import AXES, Lanes, Topology

SETTLING = 3  # rounds until how busy ranks are and how much they slow each other agree
GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A plan and what it would take. Seconds are infinite where it does not fit."""

    scheme: Scheme
    topology: Topology
    memory: tuple[Memory, ...]  # of each stage of a lane, and of the decoder if it is apart
    does_not_fit: str | None  # why
    seconds: float = float("inf")
    first_frame_s: float = float("inf")
    utilisation: float = 0.0  # share of the ranks' time in which they have work
    waiting_share: float = 0.0  # share of a rank's work that is waiting for other lanes
    decoding_share: float = 0.0  # of the time, that the decoder is at work
    sent_bytes: int = 0  # by all ranks, of the whole render
    flops: float = 0.0  # of all runs of the model, on all ranks
    steps: Steps | None = None  # what of the model runs at each

    @property
    def timetable(self) -> Timetable:
        return self.scheme.timetable

    @property
    def fits(self) -> bool:
        return self.does_not_fit is None

    @property
    def memory_bytes(self) -> int:
        """Of the fullest rank."""
        return max(memory.total for memory in self.memory)

    @property
    def axes(self) -> dict[str, int]:
        """How many ways each kind of work is shared; the product is the number of ranks."""
        lanes = self.topology.lanes
        return {**{axis: getattr(lanes, axis) for axis in AXES}, "stages": self.topology.num_stages}

    @property
    def kind(self) -> str:
        """Which axes it uses, such as `stages+ulysses`."""
        return "+".join(axis for axis, size in self.axes.items() if size > 1) or "one process"

    def job_settings(self) -> dict[str, dict[str, Any]]:
        """The settings of a job that renders so: of its sections `parallel` and `queue`."""
        lanes = {axis: size for axis, size in self.axes.items() if axis in AXES and size > 1}
        parallel = {"ranks": self.topology.num_ranks, **lanes}
        return {"parallel": parallel, "queue": self.scheme.settings()}


def plans(film: Film, hardware: Hardware, num_ranks: int, schemes: Sequence[Scheme]) -> list[Planned]:
    """All plans of these schemes on exactly so many ranks: those that fit first, the quickest first.

    ValueError for a dtype that the hardware has no rates for.
    """
    found = [
        examine(film, hardware, scheme, lanes, num_stages)
        for scheme in schemes
        for lanes, num_stages in topologies(film, scheme, num_ranks)
    ]
    return sorted(found, key=_rank)


def best(found: Sequence[Planned]) -> Planned:
    """The quickest plan that fits. ValueError that says what is missing when there is none."""
    fitting = [plan for plan in found if plan.fits]
    if fitting:
        return min(fitting, key=_rank)
    if not found:
        raise ValueError("no way to share the work of this video among so many ranks; take fewer")
    least = min(found, key=lambda plan: plan.memory_bytes)
    raise ValueError(
        f"no plan fits; the smallest is {least.scheme.label} by {least.kind}: {least.does_not_fit}; take "
        "more ranks, a smaller size or other hardware"
    )


def topologies(film: Film, scheme: Scheme, num_ranks: int) -> Iterator[tuple[Lanes, int]]:
    """(lanes, stages) that so many ranks can be and this scheme can use."""
    most = {
        "clip": scheme.clips.num_clips if scheme.clips is not None else 1,
        "guidance": film.branches,
        "ring": film.tokens_per_frame,
        "ulysses": min(film.dit.num_heads, film.tokens_per_frame),
    }
    most |= dict.fromkeys(film.closed_axes, 1)
    for clip in _divisors(num_ranks, most["clip"]):
        for guidance in _divisors(num_ranks // clip, most["guidance"]):
            left = num_ranks // clip // guidance
            for ring in _divisors(left, most["ring"]):
                for ulysses in _divisors(left // ring, most["ulysses"]):
                    num_stages = left // ring // ulysses
                    if num_stages <= film.dit.num_layers and ring * ulysses <= film.tokens_per_frame:
                        yield Lanes(clip=clip, guidance=guidance, ring=ring, ulysses=ulysses), num_stages


def examine(film: Film, hardware: Hardware, scheme: Scheme, lanes: Lanes, num_stages: int) -> Planned:
    """One plan: whether it fits, and what it takes if it does."""
    num_ranks = lanes.num_lanes * num_stages
    model = CostModel(film, hardware, lanes, num_ranks, scheme.clips)
    steps = steps_of(film, scheme.timetable)
    counts = item_counts(scheme.timetable, steps, model.runs)
    whole = [item for item in counts if item.part == WHOLE]
    typical = max(whole, key=lambda item: (counts[item], item.window))
    topology = model.cut(num_stages, typical)
    memory = rank_memory(model, topology, scheme.timetable, steps)
    too_much = _too_much(hardware, topology, memory)
    if too_much is not None:
        return Planned(scheme=scheme, topology=topology, memory=memory, does_not_fit=too_much)
    run = _run(model, topology, scheme.timetable, typical, steps)
    layer, num_layers = model.layer(typical), film.dit.num_layers
    sent = sum(run.bytes_per_link) + sum(
        count * model.layer(item).sent_bytes * (num_layers - len(item.part.left_out))
        for item, count in counts.items()
    )
    sent += sum(count * model.step_bytes(item) for item, count in counts.items())
    return Planned(
        scheme=scheme,
        topology=topology,
        memory=memory,
        does_not_fit=None,
        seconds=run.makespan_s,
        first_frame_s=run.first_frame_s,
        utilisation=run.utilisation,
        waiting_share=layer.exchange_s / layer.seconds,
        decoding_share=scheme.timetable.num_blocks * _decode_s(model, scheme.timetable, 1) / run.makespan_s,
        sent_bytes=round(sent * lanes.num_lanes),
        flops=render_flops(film, scheme, steps=steps),
        steps=steps,
    )


def _run(model: CostModel, topology: Topology, timetable: Timetable, typical: Item, steps: Steps) -> Run:
    """The render simulated, ranks slowing each other as much as they are at work at once."""
    hardware, num_ranks = model.hardware, topology.num_ranks
    run, slow = None, hardware.slowdown(num_ranks)
    for _ in range(SETTLING if hardware.busy else 1):
        run = simulate(timetable, _work(model, topology, timetable, typical, steps, slow))
        num_busy = sum(run.busy_s) * topology.lanes.num_lanes / run.makespan_s
        num_busy += _decode_s(model, timetable, 1) * timetable.num_blocks / run.makespan_s * (num_ranks > 1)
        settled = hardware.slowdown(num_busy)
        if abs(settled - slow) < 0.02 * slow:
            break
        slow = (slow + settled) / 2
    assert run is not None
    return run


def _work(
    model: CostModel, topology: Topology, timetable: Timetable, typical: Item, steps: Steps, slow: float
) -> Work:
    """What the simulator is told."""
    num_ranks, lanes, runs = topology.num_ranks, topology.lanes, steps.runs(model.runs)
    hop, result = model.hop_bytes(typical), model.result_bytes(typical)
    depth = max(DEPTHS[0], min(DEPTHS[1], DEPTH_BYTES // hop))
    rate = model.hardware.hop(num_ranks)
    link = Link(rate.latency_s, rate.bytes_per_s)
    return Work(
        stage_s=lambda item: [slow * seconds for seconds in model.stage_s(topology, item)],
        runs_at=lambda step: runs[step],
        part_at=lambda step: steps.parts[step],
        solver_s=slow * model.solver_s(typical),
        hop=link,
        hop_bytes=hop,
        back=link,
        back_bytes=result,
        max_in_flight=default_in_flight(topology.num_stages, depth),
        decode_s=_decode_s(model, timetable, slow),
        decodes_apart=num_ranks > 1,
        num_lanes=lanes.num_lanes,
    )


def _decode_s(model: CostModel, timetable: Timetable, slow: float) -> float:
    """Of a block: its frames, and making it durable."""
    own = min(timetable.block_frames, timetable.num_frames)
    pixels, hardware = own * model.film.pixels_per_frame, model.hardware
    decode = hardware.decode if model.num_ranks > 1 else hardware.decode_alone
    return slow * (decode.seconds_of(pixels) + hardware.write.seconds_of(pixels))


def _too_much(hardware: Hardware, topology: Topology, memory: Sequence[Memory]) -> str | None:
    """Why a plan does not fit, in numbers; None when it does."""
    stages, others = memory[: topology.num_stages], memory[topology.num_stages :]
    has = hardware.memory_bytes
    if not hardware.shares_memory:  # the decoder's is the host's, which is not known
        fullest = max(stages, key=lambda held: held.total)
        if fullest.total <= has:
            return None
        largest = fullest.largest
        return (
            f"a rank needs {fullest.total / GIB:.1f} GiB of {has / GIB:.1f}, "
            f"{getattr(fullest, largest) / GIB:.1f} for {largest}"
        )
    needed = topology.lanes.num_lanes * sum(held.total for held in stages) + sum(o.total for o in others)
    num_nodes = -(-topology.num_ranks // hardware.ranks_per_node) if hardware.ranks_per_node else 1
    if needed <= has * num_nodes:
        return None
    return f"all ranks together need {needed / GIB:.1f} GiB of {has * num_nodes / GIB:.1f}"


def _rank(plan: Planned) -> tuple[bool, float, int, int]:
    """The order of plans: fitting, quick, with little memory, with few bytes."""
    return not plan.fits, plan.seconds, plan.memory_bytes, plan.sent_bytes


def _divisors(number: int, most: int) -> list[int]:
    return [divisor for divisor in range(1, min(number, most) + 1) if number % divisor == 0]
