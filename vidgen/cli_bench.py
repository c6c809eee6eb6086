"""`vidgen bench`: figures of this machine."""

import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vidgen.cli_exit import OK, write_line

if TYPE_CHECKING:
    from vidgen.parallel.planner.hardware import Hardware

bench = typer.Typer(help="Measure this machine.", no_args_is_help=True)
Json = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="also write the figures here")]


@bench.command()
def render(
    lengths: Annotated[
        str, typer.Option("--lengths", metavar="N,N,...", help="frames of the renders")
    ] = "65,257,1025",
    json_file: Json = None,
) -> int:
    """Time renders end to end: seconds per frame, time to the first frame, peak memory."""
    from vidgen.bench.rendering import bench_render

    return _show(bench_render(_numbers("--lengths", lengths)), json_file)


@bench.command()
def pipeline(
    ranks: Annotated[str, typer.Option("--ranks", metavar="N,N,...", help="to compare")] = "1,2,4",
    num_frames: Annotated[
        int, typer.Option("--num-frames", metavar="N", help="long: at least 4 blocks per step", min=1)
    ] = 1297,
    repeats: Annotated[int, typer.Option("--repeats", metavar="N", help="medians are shown", min=1)] = 3,
    side: Annotated[int, typer.Option("--side", metavar="PX", help="of the square frames", min=8)] = 32,
    lengths: Annotated[
        str | None, typer.Option("--lengths", metavar="N,N,...", help="instead: one number of ranks, these")
    ] = None,
    json_file: Json = None,
) -> int:
    """Time renders on several numbers of ranks: speed-up, use of slots, memory and bytes per rank."""
    from vidgen.bench.pipeline import bench_lengths, bench_pipeline

    counts = _numbers("--ranks", ranks)
    if lengths is not None:
        return _show(bench_lengths(_numbers("--lengths", lengths), counts[-1], side), json_file)
    return _show(bench_pipeline(num_frames, counts, repeats, side), json_file)


@bench.command()
def model(json_file: Json = None) -> int:
    """Hold one forward of the built-in model against plain PyTorch, and against its matrix products alone."""
    from vidgen.bench.forward import bench_model

    return _show(bench_model(), json_file)


@bench.command()
def kernels(
    tokens: Annotated[int, typer.Option("--tokens", metavar="N", help="of the sequence", min=1)] = 8192,
    heads: Annotated[int, typer.Option("--heads", metavar="N", min=1)] = 2,
    head_dim: Annotated[int, typer.Option("--head-dim", metavar="N", min=8)] = 64,
    block: Annotated[int, typer.Option("--block", metavar="N", help="tokens", min=16)] = 128,
    device: Annotated[str, typer.Option("--device", metavar="cpu|cuda")] = "cpu",
    dtype: Annotated[str, typer.Option("--dtype", metavar="float32|bfloat16|...")] = "float32",
    json_file: Json = None,
) -> int:
    """Time attention kernels: dense and sparse, as a share of what their density allows."""
    from vidgen.bench.kernels import KernelCase, absent_backends, bench_kernels

    case = KernelCase(tokens=tokens, heads=heads, head_dim=head_dim, block=block, device=device, dtype=dtype)
    done = _show(bench_kernels(case), json_file)
    for name, reason in absent_backends().items():
        write_line("stdout", f"not measured: {name}, which {reason}")
    return done


@bench.command()
def attention(
    prompts: Annotated[int, typer.Option("--prompts", metavar="N", help="clips of each policy", min=1)] = 32,
    speed: Annotated[bool, typer.Option("--speed/--no-speed", help="also time 8,192 tokens; minutes")] = True,
    picture: Annotated[
        Path | None, typer.Option("--picture", metavar="FILE", help="draw the layouts that were chosen (PNG)")
    ] = None,
    json_file: Json = None,
) -> int:
    """Hold sparsity policies against dense attention: density, recall, quality, adherence, time."""
    from vidgen.bench.attention import LargeCase, bench_quality, bench_speed, draw_layouts

    rows, policies = bench_quality(prompts)
    _show(rows, json_file)
    for name, sparsity in policies.items():
        for layer in sparsity.tally.layers():
            facts = "  ".join(f"{key} {value}" for key, value in layer.items())
            write_line("stdout", f"{name}: {facts}")
    if picture is not None:
        write_line("stdout", f"layouts {draw_layouts(policies, picture)}")
    if speed:
        fast = json_file.with_stem(f"{json_file.stem}_speed") if json_file else None
        return _show(bench_speed(LargeCase()), fast)
    return OK


@bench.command()
def peers(
    rounds: Annotated[int, typer.Option("--rounds", metavar="N", help="readings of each side", min=1)] = 3,
    threads: Annotated[int, typer.Option("--threads", metavar="N", help="of the CPU", min=1)] = 2,
    compiled: Annotated[
        bool, typer.Option("--compile/--no-compile", help="also with compiled layers; minutes more")
    ] = True,
    json_file: Json = None,
) -> int:
    """Hold a Wan model's steps against diffusers' pipeline, and what a rank reads to load its layers."""
    from vidgen.bench.peers import PeersCase, bench_peers, rows

    return _show(rows(bench_peers(PeersCase(rounds=rounds, threads=threads, compile=compiled))), json_file)


@bench.command()
def calibrate(
    model: Annotated[
        str, typer.Option("--model", metavar="NAME|PATH", help="whose work is timed")
    ] = "builtin",
    out: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="FILE", help="where the profile goes (YAML)")
    ] = None,
) -> int:
    """Measure this machine's profile for `vidgen plan --hardware FILE`; best while nothing else runs."""
    from vidgen.bench.calibrate import calibrate as measured

    found = measured(model)
    if out is None:
        write_line("stdout", _as_yaml(found))
    else:
        _save_profile(found, out)
    return OK


def _save_profile(hardware: "Hardware", out: Path) -> None:
    try:
        out.write_text(_as_yaml(hardware))
    except OSError as error:
        raise ValueError(f"--output {out}: cannot be written: {error.strerror}; choose another") from error
    write_line("stdout", f"profile {out}")


def _as_yaml(hardware: "Hardware") -> str:
    import yaml

    from vidgen.parallel.planner.hardware import dump_hardware

    return yaml.safe_dump(dump_hardware(hardware), sort_keys=False, default_flow_style=None, width=100)


@bench.command()
def plans(
    hardware: Annotated[
        str | None,
        typer.Option("--hardware", metavar="NAME|FILE", help="default: measured, a pass before each repeat"),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="FILE", help="where that profile goes (YAML)")
    ] = None,
    num_frames: Annotated[int, typer.Option("--num-frames", metavar="N", min=9)] = 513,
    repeats: Annotated[int, typer.Option("--repeats", metavar="N", help="medians are shown", min=1)] = 1,
    lanes: Annotated[bool, typer.Option("--lanes/--no-lanes", help="also ranks that share forwards")] = True,
    caches: Annotated[bool, typer.Option("--caches", help="instead plans with step caches")] = False,
    json_file: Json = None,
) -> int:
    """Hold the planner against renders of the built-in model: predicted and measured seconds of each plan."""
    from vidgen.bench.plans import CACHED, LANES, STAGES_ONLY, bench_plans, verdict
    from vidgen.parallel.planner.hardware import load_hardware

    machine = None if hardware is None else load_hardware(hardware)
    cases = CACHED if caches else (*STAGES_ONLY, *(LANES if lanes else ()))
    machine, rows = bench_plans(machine, num_frames, cases, repeats)
    if out is not None:
        _save_profile(machine, out)
    done = _show(rows, json_file)
    write_line("stdout", ", ".join(f"{name}: {value}" for name, value in verdict(rows).items()))
    return done


@bench.command()
def redundancy(
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="DIR", help="of redundancy.json and redundancy.png")
    ],
    model: Annotated[str, typer.Option("--model", metavar="NAME|PATH", help="what is watched")] = "builtin",
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", metavar="TEXT", help="may be repeated; a video each")
    ] = None,
    num_frames: Annotated[
        int | None, typer.Option("--num-frames", metavar="N", help="of each video", min=1)
    ] = None,
    num_inference_steps: Annotated[
        int | None, typer.Option("--num-inference-steps", metavar="N", help="not the model's own", min=2)
    ] = None,
    timetable: Annotated[
        str | None, typer.Option("--timetable", metavar="NAME", help="as of `vidgen render`")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="of the first video", min=0)] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace these two files in DIR")] = False,
) -> int:
    """Plot how alike features are over steps and layers, by which a step cache or sparsity is chosen."""
    from vidgen.bench.machine import machine_facts, table
    from vidgen.bench.redundancy import bench_redundancy, make_jobs
    from vidgen.bench.redundancy_report import check_folder, rows, sentences, write_files

    given = {"num_frames": num_frames, "num_inference_steps": num_inference_steps}
    settings: dict[str, object] = {name: value for name, value in given.items() if value is not None}
    settings |= {} if timetable is None else {"queue": {"timetable": timetable}}
    jobs = make_jobs(prompt or [], {"model": model, "seed": seed, **settings})
    check_folder(output, overwrite)
    found = {"machine": machine_facts(), **bench_redundancy(jobs, partial(write_line, "stderr"))}
    found["says"] = sentences(found)
    written = write_files(found, output)
    write_line("stdout", table(rows(found)))
    for line in (*found["says"], *(f"written  {path}" for path in written)):
        write_line("stdout", line)
    return OK


def _numbers(flag: str, text: str) -> list[int]:
    try:
        numbers = [int(number) for number in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise ValueError(f"{flag}={text}: need whole numbers above 0 with commas, such as 65,257")
    return numbers


def _show(rows: list[dict[str, object]], json_file: Path | None) -> int:
    from vidgen.bench.machine import machine_facts, table

    machine = machine_facts()
    write_line("stdout", ", ".join(f"{name} {value}" for name, value in machine.items()))
    write_line("stdout", table(rows))
    if json_file:
        json_file.write_text(json.dumps({"machine": machine, "rows": rows}, indent=2) + "\n")
    return OK
