"""`vidgen plan`: every way to render a video on some ranks, and which one to take."""

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vidgen.cli_exit import OK, write_line
from vidgen.cli_flags import build_job, parse_size, takes_job_flags

if TYPE_CHECKING:
    from vidgen.config import JobConfig
    from vidgen.parallel.planner.plan import Planned
    from vidgen.parallel.planner.reasons import Reason
    from vidgen.parallel.planner.schemes import Scheme
    from vidgen.parallel.planner.work import Film

GIB = 2**30
MUCH_DECODING = 0.5


@takes_job_flags
def plan(
    *,
    size: Annotated[str | None, typer.Option("--size", metavar="WxH", help="832x480 or 832*480")] = None,
    top: Annotated[int, typer.Option("--top", metavar="K", help="plans to show", min=1)] = 12,
    lossy: Annotated[bool, typer.Option("--lossy", help="also approximations, such as pipefusion")] = False,
    decode: Annotated[
        bool, typer.Option("--decode/--no-decode", help="leave out what turning latents to frames takes")
    ] = True,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object with every plan")] = False,
    **flags: Any,
) -> int:
    """Compare every way to render a video on --ranks ranks: time, memory, messages; and choose one.

    With --timetable only plans of that video are compared. Nothing is rendered and no weights are read:
    --model wan-1.3b and wan-14b are sizes that need no checkpoint.
    """
    from vidgen.parallel.planner.hardware import load_hardware
    from vidgen.parallel.planner.plan import best, plans
    from vidgen.parallel.planner.reasons import reasons

    asked = {**flags, "prompt": flags.get("prompt") or "any"}
    job = build_job(asked, config=None, segments=None, size=parse_size(size) if size is not None else {})
    if job.parallel.ranks == "auto":
        raise ValueError("--ranks auto: a plan is for a number of ranks; give one, such as --ranks 8")
    machine = load_hardware(job.parallel.hardware or "cpu")
    film, wanted = _film_and_schemes(job, lossy)
    if not decode:
        film = replace(film, pixels_per_frame=0)
    found = plans(film, machine, job.parallel.ranks, wanted)
    choice = best(found)
    why, sparsity = reasons(found, choice), job.attention.sparsity.policy
    shown = {
        "model": job.model,
        "latents": f"{film.num_frames}x{film.latent_rows}x{film.latent_columns}",
        "num_inference_steps": film.num_steps,
        "dtype": film.dit.dtype,
        "ranks": job.parallel.ranks,
        "hardware": machine.name,
        **({"cache": _skipped(film, choice)} if film.cache is not None else {}),
        **({"sparsity": f"{sparsity} (times are those of dense attention)"} if sparsity != "none" else {}),
    }
    if as_json:
        write_line("stdout", json.dumps(_as_data(shown, found, choice, why), indent=2))
        return OK
    write_line("stdout", ", ".join(f"{name} {value}" for name, value in shown.items()))
    for line in _lines(found, choice, why, top):
        write_line("stdout", line)
    if not machine.measured:
        write_line("stdout", f"rates of {machine.name}: {machine.source}")
    return OK


def _skipped(film: "Film", choice: "Planned") -> str:
    """What a step cache leaves out of the chosen plan."""
    assert film.cache is not None
    method = film.cache.settings.method
    if choice.steps is None or not choice.steps.is_known:
        return f"{method} (which steps it skips is not known beforehand: times are those without it)"
    skipped, in_part = choice.steps.num_skipped, choice.steps.num_in_part
    told = [f"{count} of {film.num_steps} steps {how}" for count, how in
            ((skipped, "skipped"), (in_part, "run in part")) if count]  # fmt: skip
    return f"{method} ({', '.join(told) or 'no step skipped'})"


def _film_and_schemes(job: "JobConfig", lossy: bool) -> "tuple[Film, Sequence[Scheme]]":
    from vidgen.known_sizes import KNOWN, film_like, schemes_like

    if job.model in KNOWN:
        film = film_like(job.model, job)
        return film, schemes_like(job.model, job, film, lossy=lossy)
    from vidgen.choosing import film_of, own_scheme, schemes_of
    from vidgen.engine import Engine
    from vidgen.planning import resolve_job

    engine = Engine.from_pretrained(job.model, dtype=job.dtype, with_dit=False)
    resolved = resolve_job(engine.family, job, engine.sparsity)
    is_any = job.queue.timetable is None
    found = (
        schemes_of(engine.family, resolved, lossy=lossy) if is_any else [own_scheme(engine.family, resolved)]
    )
    return film_of(engine.family, resolved), found


def row(plan: "Planned") -> dict[str, Any]:
    """A plan as a row of the table: text, ready to be read."""
    lanes = " x ".join(f"{axis} {size}" for axis, size in plan.axes.items() if size > 1)
    return {
        "video": plan.scheme.label + (" (lossy)" if plan.scheme.is_lossy else ""),
        "ranks": lanes or "one process",
        "time": _time(plan.seconds),
        "first frame": _time(plan.first_frame_s),
        "GiB a rank": f"{plan.memory_bytes / GIB:.1f}",
        "use": f"{plan.utilisation:.0%}",
        "sent GiB": f"{plan.sent_bytes / GIB:.2f}",
    }


def _lines(found: "list[Planned]", choice: "Planned", why: "list[Reason]", top: int) -> list[str]:
    from vidgen.bench.machine import table

    fitting = [plan for plan in found if plan.fits]
    lines = [table([row(plan) for plan in fitting[:top]])]
    hidden, unfit = len(fitting) - top, len(found) - len(fitting)
    if hidden > 0:
        lines.append(f"... and {hidden} slower plans (--top)")
    if unfit:
        lines.append(f"{unfit} plans do not fit")
    settings = " ".join(
        f"{section}.{name}={value}"
        for section, values in choice.job_settings().items()
        for name, value in values.items()
    )
    lines.append(f"choice: {choice.scheme.label} by {choice.kind}: {settings}")
    if choice.decoding_share > MUCH_DECODING:
        lines.append(f"its decoder is at work for {choice.decoding_share:.0%} of the time: ranks wait for it")
    lines.append("rows with the same `video` give the same frames; the others did not win because:")
    return lines + [f"  {reason.name}: {reason.text}" for reason in why]


def _as_data(
    shown: dict[str, Any], found: "list[Planned]", choice: "Planned", why: "list[Reason]"
) -> dict[str, Any]:
    return {
        **shown,
        "plans": [_plan_as_data(plan) for plan in found],
        "choice": _plan_as_data(choice),
        "why_not": {reason.name: reason.text for reason in why},
    }


def _plan_as_data(plan: "Planned") -> dict[str, Any]:
    figures = {
        "seconds": plan.seconds,
        "first_frame_s": plan.first_frame_s,
        "utilisation": plan.utilisation,
        "waiting_share": plan.waiting_share,
        "decoding_share": plan.decoding_share,
        "sent_bytes": plan.sent_bytes,
        "flops": plan.flops,
    }
    return {
        "video": plan.scheme.label,
        "lossy": plan.scheme.is_lossy,
        "axes": plan.axes,
        "layers_per_stage": list(plan.topology.layers_per_stage),
        "fits": plan.fits,
        "does_not_fit": plan.does_not_fit,
        "memory_bytes": plan.memory_bytes,
        **{name: value if plan.fits else None for name, value in figures.items()},
        "settings": plan.job_settings(),
    }


def _time(seconds: float) -> str:
    """1 h 02 min, 3 min 20 s, 4.52 s."""
    if seconds < 60:
        return f"{seconds:.2f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02} min"
