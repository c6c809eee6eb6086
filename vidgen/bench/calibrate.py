"""A profile of this machine for the planner: its rates, measured with the parts that a render is made of.

Work on a CPU is timed by the CPU time of its thread, where there is one: others at work on the machine then
count for little. How much ranks slow each other down is measured apart. On a GPU nothing else may be at work;
between GPUs nothing is measured, but gloo between processes of the node.
"""

import datetime
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from vidgen.bench.books import books_s
from vidgen.bench.busy import among_ranks
from vidgen.bench.items import run_of
from vidgen.bench.machine import machine_facts
from vidgen.bench.output_rates import ENOUGH_S, FRAMES, Clock, decode_rate, latents_of, rate, write_rate
from vidgen.bench.passes import middle
from vidgen.bench.random_wan import Sizes, make_hollow_wan
from vidgen.bench.rendering import PROMPT
from vidgen.bench.two_ranks import gpu_process_bytes, link_rates
from vidgen.config import parse_job
from vidgen.denoise.loop import make_window, take_step
from vidgen.engine import Engine
from vidgen.known_sizes import KNOWN
from vidgen.limits import available_memory_bytes
from vidgen.parallel.place import random_model
from vidgen.parallel.planner.hardware import Hardware, LinkRate, Rate
from vidgen.parallel.planner.work import (
    attention_flops,
    end_flops,
    first_channels,
    linear_flops,
    out_channels,
)
from vidgen.planning import Plan
from vidgen.sections import MAX_RANKS

# B batch, F latent frames, S tokens per frame, D width, N text tokens, H heads

MOST_LAYERS = 8  # of a model that is timed: as many as it has, so that caches are as full as in a render
PASSES = 3  # on a CPU
VAE_WIDTH = 96  # of Wan's
GPU_SHARE = 0.95  # of a GPU's memory: some lies idle between the allocator's blocks
AMONG_LAYERS, AMONG_FRAMES = 2, 8  # of the work that comes before what is timed
PARTS = (4, 2)  # of one frame's tokens, for ranks that share them


@torch.inference_mode()
def calibrate(model: str = "builtin", device: str | None = None, passes: int | None = None) -> Hardware:
    """The profile of this machine for a model; it fits models of other sizes less well.

    `wan-1.3b` and the like need no checkpoint. Everything is measured in several passes, and the middle
    counts: a machine has slow minutes. A GPU has none, and one pass is enough.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    held = gpu_process_bytes() if device == "cuda" else 0  # before anything of the model
    passes = passes or (PASSES if device == "cpu" else 1)
    with _checkpoint(model) as place:
        engine = Engine.from_pretrained(place, with_dit=False)
        plan = engine.plan(parse_job({"model": place, "prompt": PROMPT, "queue": {"timetable": "full"}}))
        threads, before = plan.job.threads or 1, torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            found = [_measured(engine, plan, Clock(device, threads), held) for _ in range(passes)]
        finally:
            torch.set_num_threads(before)
    source = f"vidgen bench calibrate of {model}, torch {torch.__version__}, {threads} threads a rank"
    gloo = "between_nodes is" if device == "cpu" else "link, exchange and between_nodes are"
    source = f"{source}, {datetime.date.today()}; {gloo} gloo on this node"
    return replace(middle(found), source=source)


@contextmanager
def _checkpoint(model: str) -> Iterator[str]:
    """Where the model is; one that is known by its sizes is made, with random weights."""
    if model not in KNOWN:
        yield model
        return
    dit = KNOWN[model].dit
    sizes = Sizes(
        num_heads=dit.num_heads, head_dim=dit.width // dit.num_heads, num_layers=dit.num_layers,
        ffn_width=dit.ffn_width, text_width=dit.text_width, num_frequencies=dit.num_frequencies,
        vae_width=VAE_WIDTH,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        yield str(make_hollow_wan(Path(folder), sizes))


def _measured(engine: Engine, plan: Plan, clock: Clock, process_bytes: int) -> Hardware:
    """One pass; what a process holds is known of a GPU, and measured of a rank on a CPU."""
    device, cores = clock.device, os.cpu_count() or 1
    config = engine.config
    tokens, text = _tokens_per_frame(plan), _num_text_tokens(plan)
    if device == "cpu":
        small = random_model(config, min(config.num_layers, AMONG_LAYERS), device)
        clock = clock.among(run_of(small, AMONG_FRAMES, tokens, text))
    layers, attention, run_s = _layers(plan, clock)
    decode, write = decode_rate(engine, plan, clock), write_rate(plan)
    shared, swapped, gloo = link_rates()
    solver = _solver(plan, clock)
    books = books_s(engine, plan.job.model, solver) if device == "cpu" else shared.latency_s
    facts = machine_facts()
    measured = Hardware(
        name=facts["gpu"] if device == "cuda" else f"{cores} cores of {facts['cpu']}",
        source="",
        measured=True,
        memory_bytes=_gpu_bytes() if device == "cuda" else available_memory_bytes(),
        shares_memory=device == "cpu",
        ranks_per_node=torch.cuda.device_count() if device == "cuda" else MAX_RANKS,
        process_bytes=process_bytes,
        layers={config.dtype: layers},
        attention={config.dtype: attention},
        joining=_joining(plan, clock),
        ends=_ends(plan, clock),
        solver=solver,
        item_s=run_s + books,
        link=gloo if device == "cuda" else shared,
        exchange=gloo if device == "cuda" else swapped,
        between_nodes=LinkRate(gloo.latency_s, gloo.bytes_per_s),
        decode=decode_rate(engine, plan, clock, is_apart=True) if device == "cuda" else decode,
        decode_alone=decode,
        write=write,
    )
    return measured if device == "cuda" else among_ranks(measured, cores)


def _gpu_bytes() -> int:
    return int(GPU_SHARE * torch.cuda.mem_get_info()[1])


def _layers(plan: Plan, clock: Clock) -> tuple[Rate, Rate, float]:
    """(layers without self-attention by FLOPs, self-attention by FLOPs, what a run takes beside its layers).

    Attention is what a run takes more with it: among layers, with cold caches, as in a render.
    """
    config, tokens, text = plan.task.model.config, _tokens_per_frame(plan), _num_text_tokens(plan)
    count = max(2, min(config.num_layers, MOST_LAYERS))
    one, many = (random_model(config, layers, clock.device) for layers in (1, count))
    layers, attentions, overheads = [], [], []
    grids = [(1, max(1, tokens // part)) for part in PARTS] + [(frames, tokens) for frames in FRAMES]
    for frames, per_frame in grids:
        runs = (
            run_of(one, frames, per_frame, text, attends=False),
            run_of(many, frames, per_frame, text, attends=False),
            run_of(many, frames, per_frame, text),
        )
        of_one, of_many, attending = clock.seconds_of_each(runs)
        layer_s, length = max(1e-9, (of_many - of_one) / (count - 1)), frames * per_frame
        layers.append((linear_flops(config, length, text), layer_s))
        attentions.append(
            (attention_flops(config.width, length, length), max(1e-9, (attending - of_many) / count))
        )
        overheads.append(max(0.0, of_one - layer_s))
        if attending > ENOUGH_S:
            break
    return rate(layers), rate(attentions), float(np.median(overheads))


def _joining(plan: Plan, clock: Clock) -> Rate:
    """What a layer takes more for keys of other blocks, by numbers of all its keys."""
    config, tokens, text = plan.task.model.config, _tokens_per_frame(plan), _num_text_tokens(plan)
    points = []
    count = max(1, min(config.num_layers, MOST_LAYERS))
    model = random_model(config, count, clock.device)
    for frames in FRAMES[1:7]:
        others = frames // 2
        without, joined = clock.seconds_of_each(
            [run_of(model, frames, tokens, text, n, attends=False) for n in (0, others)]
        )
        points.append(((frames + others) * tokens * config.width, max(1e-9, (joined - without) / count)))
        if joined > ENOUGH_S:
            break
    return rate(points)


def _ends(plan: Plan, clock: Clock) -> Rate:
    """Embedding and projection by FLOPs, the mean of both."""
    config, tokens = plan.task.model.config, _tokens_per_frame(plan)
    model, points = random_model(config, 1, clock.device), []
    for frames in FRAMES:
        latents = latents_of(plan, frames, clock.device)
        if config.condition_channels:
            more = latents.new_zeros(1, config.condition_channels, *latents.shape[2:])
            latents = torch.cat([latents, more], dim=1)
        noise = torch.randn(1, frames, config.width, device=clock.device, dtype=model.dtype)
        x_BFSD, grid = model.embed(latents), model.token_grid(latents.shape)
        embed_s = clock.seconds(lambda z=latents: model.embed(z))
        project_s = clock.seconds(lambda x=x_BFSD, n=noise, g=grid: model.project(x, n, g))
        channels = (first_channels(config) + out_channels(config)) / 2
        points.append((end_flops(config, frames * tokens, channels), (embed_s + project_s) / 2))
        if embed_s + project_s > ENOUGH_S:
            break
    return rate(points)


def _solver(plan: Plan, clock: Clock) -> Rate:
    """A forward's window, velocities and step, by elements of its latents."""
    task, points = plan.task, []
    model = random_model(task.model.config, 1, clock.device)
    for frames in FRAMES[:7]:
        timetable = replace(task.timetable, num_frames=frames, block_frames=frames)
        own_task = replace(
            task, model=model, second_model=None, timetable=replace(timetable, switch_step=None)
        )
        forward = timetable.forwards(0)[0]
        latents = latents_of(plan, frames, clock.device)
        own = replace(task.new_block(timetable.block(0)), latents_BCFYX=latents)
        window = make_window(own_task, {0: own}, forward, own)
        rows, columns = model.token_grid(latents.shape)[1:]
        out = torch.randn(frames, model.out_channels, rows, columns, device=clock.device, dtype=model.dtype)

        def step(own=own, window=window, forward=forward, out=out, task=own_task) -> None:
            make_window(task, {0: own}, forward, own)
            branches = range(task.branches_at(0))
            velocities = [model.velocity(out, *window.own_frames().repeated(1)) for _ in branches]
            take_step(task, forward, own, velocities)

        points.append((latents.numel(), clock.seconds(step)))
    return rate(points)


def _num_text_tokens(plan: Plan) -> int:
    """With those of an image, where a model takes one."""
    text = plan.task.texts(plan.task.timetable.block(0))[0]
    return text.shape[1] + plan.task.model.config.image_tokens


def _tokens_per_frame(plan: Plan) -> int:
    _, rows, columns = plan.task.model.token_grid(plan.latents_shape)
    return rows * columns
