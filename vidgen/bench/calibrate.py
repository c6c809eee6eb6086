"""A profile of this machine for the planner: its rates, measured with the parts that a render is made of.

Work on a CPU is timed by the CPU time of its thread, where there is one: others at work on the machine then
count for little. How much ranks slow each other down is measured apart.
"""

import datetime
import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from vidgen.bench.machine import machine_facts
from vidgen.bench.output_rates import ENOUGH_S, FRAMES, Clock, decode_rate, latents_of, rate, write_rate
from vidgen.bench.passes import middle
from vidgen.bench.rendering import PROMPT
from vidgen.bench.two_ranks import link_rates, measured_busy, process_bytes
from vidgen.config import parse_job
from vidgen.denoise.loop import make_window, take_step
from vidgen.engine import Engine
from vidgen.limits import available_memory_bytes
from vidgen.model.context import Context, KeyValue
from vidgen.model.dit import Conditioning, DiT
from vidgen.parallel.place import strip
from vidgen.parallel.planner.hardware import Hardware, LinkRate, Rate
from vidgen.parallel.planner.work import (
    attention_flops,
    end_flops,
    first_channels,
    linear_flops,
    out_channels,
)
from vidgen.parallel.topology import Stage
from vidgen.planning import Plan
from vidgen.sections import MAX_RANKS

# B batch, F latent frames, S tokens per frame, D width, N text tokens, H heads

MOST_LAYERS = 8  # of a model that is timed: as many as it has, so that caches are as full as in a render
PASSES = 3
PARTS = (4, 2)  # of one frame's tokens, for ranks that share them


@torch.inference_mode()
def calibrate(model: str = "builtin", device: str | None = None, passes: int = PASSES) -> Hardware:
    """The profile of this machine for a model; it fits models of other sizes less well.

    Everything is measured in several passes, and the middle counts: a machine has slow minutes.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    engine = Engine.from_pretrained(model, with_dit=False)
    plan = engine.plan(parse_job({"model": model, "prompt": PROMPT, "queue": {"timetable": "full"}}))
    threads, before = plan.job.threads or 1, torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return middle([_measured(engine, plan, Clock(device, threads), threads) for _ in range(passes)])
    finally:
        torch.set_num_threads(before)


def _measured(engine: Engine, plan: Plan, clock: Clock, threads: int) -> Hardware:
    device, cores = clock.device, os.cpu_count() or 1
    config = engine.config
    layers, attention, run_s = _layers(plan, clock)
    decode, write = decode_rate(engine, plan, clock), write_rate(plan)
    shared, gloo = link_rates()
    facts = machine_facts()
    return Hardware(
        name=facts["gpu"] if device == "cuda" else f"{cores} cores of {facts['cpu']}",
        source=f"vidgen bench calibrate of {plan.job.model}, torch {torch.__version__}, {threads} threads a "
        f"rank, {datetime.date.today()}; between_nodes is gloo on this node",
        measured=True,
        memory_bytes=torch.cuda.mem_get_info()[0] if device == "cuda" else available_memory_bytes(),
        shares_memory=device == "cpu",
        ranks_per_node=torch.cuda.device_count() if device == "cuda" else MAX_RANKS,
        process_bytes=process_bytes(),
        layers={config.dtype: layers},
        attention={config.dtype: attention},
        joining=_joining(plan, clock),
        ends=_ends(plan, clock),
        solver=_solver(plan, clock),
        item_s=run_s + shared.latency_s,
        link=gloo if device == "cuda" else shared,
        exchange=gloo,
        between_nodes=LinkRate(gloo.latency_s, gloo.bytes_per_s),
        decode=decode,
        decode_alone=decode,
        write=write,
        busy=()
        if device == "cuda"
        else measured_busy(cores, config.width, config.ffn_width, _tokens_per_frame(plan)),
    )


def _layers(plan: Plan, clock: Clock) -> tuple[Rate, Rate, float]:
    """(layers without self-attention by FLOPs, self-attention by FLOPs, what a run takes beside its layers).

    Attention is what a run takes more with it: among layers, with cold caches, as in a render.
    """
    config, tokens = plan.task.model.config, _tokens_per_frame(plan)
    count = max(2, min(config.num_layers, MOST_LAYERS))
    one, many = (_random(config, layers, clock.device) for layers in (1, count))
    layers, attentions, overheads = [], [], []
    grids = [(1, max(1, tokens // part)) for part in PARTS] + [(frames, tokens) for frames in FRAMES]
    for frames, per_frame in grids:
        runs = (
            _run(plan, one, frames, per_frame),
            _run(plan, many, frames, per_frame),
            _run(plan, many, frames, per_frame, attends=True),
        )
        of_one, of_many, attending = clock.seconds_of_each(runs)
        layer_s, length = max(1e-9, (of_many - of_one) / (count - 1)), frames * per_frame
        layers.append((linear_flops(config, length, _num_text_tokens(plan)), layer_s))
        attentions.append(
            (attention_flops(config.width, length, length), max(1e-9, (attending - of_many) / count))
        )
        overheads.append(max(0.0, of_one - layer_s))
        if attending > ENOUGH_S:
            break
    return rate(layers), rate(attentions), float(np.median(overheads))


def _run(
    plan: Plan, model: DiT, frames: int, per_frame: int, others: int = 0, *, attends: bool = False
) -> Callable[[], object]:
    """A run of a model's layers, without their self-attention unless it `attends`.

    With keys of `others` frames to join.
    """
    config, like = model.config, {"device": model.device, "dtype": model.dtype}
    x_BFSD = torch.randn(1, frames, per_frame, config.width, **like)
    noise = torch.randn(1, frames, config.width, **like)
    text = torch.randn(1, _num_text_tokens(plan), config.width, **like)
    shared = Conditioning(noise, noise.unsqueeze(2).expand(-1, -1, 6, -1).contiguous(), text)
    heads = config.num_heads, config.width // config.num_heads
    kv = KeyValue(*(torch.randn(1, others, per_frame, *heads, **like) for _ in range(2)))
    context = Context(after=(kv,) * len(model.layers)) if others else Context()
    skips = [lambda query, key, value: query] * len(model.layers)
    grid = frames, per_frame, 1
    return lambda: model.run_layers(x_BFSD, shared, grid, context, None if attends else skips, lends=False)


def _joining(plan: Plan, clock: Clock) -> Rate:
    """What a layer takes more for keys of other blocks, by numbers of all its keys."""
    config, tokens, points = plan.task.model.config, _tokens_per_frame(plan), []
    count = max(1, min(config.num_layers, MOST_LAYERS))
    model = _random(config, count, clock.device)
    for frames in FRAMES[1:7]:
        others = frames // 2
        without, joined = clock.seconds_of_each([_run(plan, model, frames, tokens, n) for n in (0, others)])
        points.append(((frames + others) * tokens * config.width, max(1e-9, (joined - without) / count)))
        if joined > ENOUGH_S:
            break
    return rate(points)


def _ends(plan: Plan, clock: Clock) -> Rate:
    """Embedding and projection by FLOPs, the mean of both."""
    config, tokens = plan.task.model.config, _tokens_per_frame(plan)
    model, points = _random(config, 1, clock.device), []
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
    model = _random(task.model.config, 1, clock.device)
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


def _random(config: Any, num_layers: int, device: str) -> DiT:
    """The model with so many layers of random weights."""
    model = strip(replace(config, num_layers=num_layers), Stage(0, 1, range(num_layers))).to_empty(
        device=device
    )
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.randn(tensor.shape, device=device) * 0.02)
    return model.eval().requires_grad_(False)


def _num_text_tokens(plan: Plan) -> int:
    """With those of an image, where a model takes one."""
    text = plan.task.texts(plan.task.timetable.block(0))[0]
    return text.shape[1] + plan.task.model.config.image_tokens


def _tokens_per_frame(plan: Plan) -> int:
    _, rows, columns = plan.task.model.token_grid(plan.latents_shape)
    return rows * columns
