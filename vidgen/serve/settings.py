"""Settings of a job from a request's fields: the client's over the operator's over the model's own."""

import re
import secrets
from collections.abc import Callable
from typing import Any, TypeVar

from vidgen.config import JobConfig, parse_job, resolve
from vidgen.denoise.timetable import autoregressive, dualparal, fifo, moving_buffer, pipefusion
from vidgen.serve.config import LimitsConfig, ModelConfig, merged
from vidgen.serve.errors import invalid, shown
from vidgen.serve.facts import ModelFacts
from vidgen.serve.records import Kind

Made = TypeVar("Made")
DRAWN_SEEDS = 2**31  # a number that JavaScript keeps whole
# extra_params -> where it stands in a job; nothing that names a file, a device or a kernel
EXTRA_PARAMS: dict[str, tuple[str, ...]] = {
    "solver": ("solver",),
    "timetable": ("queue", "timetable"),
    "block_frames": ("queue", "block_frames"),
    "context_frames": ("queue", "context_frames"),
    "context_mode": ("queue", "context_mode"),
    "anchor_frames": ("queue", "anchor_frames"),
    "stride": ("queue", "stride"),
    "noise": ("queue", "noise"),
    "guidance": ("queue", "guidance"),
    "transition_blocks": ("queue", "transition_blocks"),
    "residual_guidance": ("queue", "residual_guidance"),
    "static_threshold": ("queue", "static_threshold"),
    "speed": ("speed",),
}
SAME_NAMES = ("negative_prompt", "fps", "num_inference_steps", "guidance_scale", "guidance_scale_2", "seed")
# a job's setting -> the request's field
FIELDS = {
    "shift": "flow_shift",
    **{".".join(path): f"extra_params.{name}" for name, path in EXTRA_PARAMS.items()},
    **{name: f"extra_params.{name}" for name in EXTRA_PARAMS},
}


def operators_job(model: ModelConfig, kind: Kind) -> dict[str, Any]:
    """Settings of a job that says nothing of its own."""
    values = merged(model.job, model.session) if kind == Kind.SESSION else model.job
    return {**values, "model": model.model}


def make_job(
    given: dict[str, Any], model: ModelConfig, facts: ModelFacts, kind: Kind, limits: LimitsConfig
) -> tuple[dict[str, Any], JobConfig]:
    """(settings of the job that these fields of a request ask for, the same resolved).

    ApiError (400) naming the field for what the model cannot do; `limits` only decide the length of a session
    that says nothing of its own.
    """
    clients = _clients_job(given, model, facts)
    values = merged(operators_job(model, kind), clients)
    values.setdefault("seed", secrets.randbelow(DRAWN_SEEDS))
    return _timed(given, values, facts, kind, limits, has_stride="stride" in clients.get("queue", {}))


def num_blocks(job: JobConfig, facts: ModelFacts) -> int:
    """Into how many chunks a resolved job is cut. ValueError for sizes that make no queue.

    The same as planning.make_timetable, which needs torch.
    """
    assert job.num_frames and job.num_inference_steps
    queue, steps = job.queue, job.num_inference_steps
    frames = facts.num_latent_frames(job.num_frames)
    if queue.timetable in ("full", "lockstep"):
        return 1
    assert queue.block_frames and queue.context_frames is not None and queue.context_mode
    if queue.timetable == "pipefusion":
        return pipefusion(frames, steps, block_frames=queue.block_frames).num_blocks
    if queue.timetable == "fifo":
        return fifo(frames, steps, context_frames=min(1, queue.context_frames)).num_blocks
    sizes: dict[str, Any] = {
        "block_frames": queue.block_frames,
        "context_frames": queue.context_frames,
        "mode": queue.context_mode,
        "anchor_frames": queue.anchor_frames,
    }
    if queue.timetable == "autoregressive":
        if queue.stride not in (1, steps):
            raise ValueError(f"stride={queue.stride}: timetable=autoregressive has its own; leave it out")
        return autoregressive(frames, steps, **sizes).num_blocks
    make = moving_buffer if queue.timetable == "buffer" else dualparal
    return make(frames, steps, stride=queue.stride, **sizes).num_blocks


def _clients_job(given: dict[str, Any], model: ModelConfig, facts: ModelFacts) -> dict[str, Any]:
    """What a client's fields say as settings of a job; sizes and times follow in `_job`."""
    for first, others in (("size", ("width", "height")), ("segments", ("num_frames", "seconds"))):
        clash = next((other for other in others if other in given), None)
        if first in given and clash:
            raise invalid(f"both {first} and {clash} are given: give one of them", clash)
    if "seconds" in given and "num_frames" in given:
        raise invalid("both seconds and num_frames are given: give one of them", "seconds")
    if "guidance_scale_2" in given and facts.num_experts == 1:
        raise invalid("guidance_scale_2: this model has one expert; leave it out", "guidance_scale_2")
    job: dict[str, Any] = {name: given[name] for name in SAME_NAMES if name in given}
    if "flow_shift" in given:
        job["shift"] = given["flow_shift"]
    if "output" in given and given["output"].crf is not None:
        job["output"] = {"crf": given["output"].crf}
    if "lora" in given:
        job["loras"] = [_lora(wanted.name, wanted.scale, model) for wanted in given["lora"]]
    extra = dict(given.get("extra_params", {}))
    if given.get("transition_chunks"):
        extra.setdefault("transition_blocks", given["transition_chunks"])
    for name, value in extra.items():
        if name not in EXTRA_PARAMS:
            param = f"extra_params.{shown(name)}"
            raise invalid(f"{param}: is not one; there are {', '.join(EXTRA_PARAMS)}", param, "unknown_field")
        for part in reversed(EXTRA_PARAMS[name]):
            value = {part: value}
        job = merged(job, value)
    return job


def _lora(name: str, scale: float, model: ModelConfig) -> dict[str, Any]:
    if name not in model.loras:
        there = f"there are {', '.join(model.loras)}" if model.loras else "this model has none"
        raise invalid(f"lora={shown(name)}: {there}", "lora")
    lora = model.loras[name]
    return {**lora.model_dump(mode="json"), "scale": lora.scale * scale}


def _timed(
    given: dict[str, Any],
    values: dict[str, Any],
    facts: ModelFacts,
    kind: Kind,
    limits: LimitsConfig,
    has_stride: bool,
) -> tuple[dict[str, Any], JobConfig]:
    """(a job's settings with sizes, prompts and length, the same resolved)."""
    if "segments" in given:
        values = {name: value for name, value in values.items() if name != "num_frames"}
        values["segments"] = [segment.model_dump() for segment in given["segments"]]
    else:
        values = {**values, "prompt": given["prompt"]}
    upscale = asking(parse_job, values).output.upscale
    values |= _sides(given, facts, upscale)
    values, job = asking(fitted, values, facts, kind, has_stride)
    assert job.fps
    if "segments" in given:
        return values, job
    if "seconds" in given:
        values["num_frames"] = max(1, round(float(given["seconds"]) * job.fps))
    elif "num_frames" in given:
        values["num_frames"] = given["num_frames"]
    elif kind == Kind.SESSION and "num_frames" not in values:
        longest = limits.max_work // work_per_frame(job)
        wanted = round(limits.session_seconds * job.fps)
        values["num_frames"] = max(1, min(wanted, limits.max_frames, longest))
    else:
        values["num_frames"] = job.num_frames
    return asking(fitted, values, facts, kind, has_stride)


def _sides(given: dict[str, Any], facts: ModelFacts, upscale: int) -> dict[str, int]:
    """Width and height of the model's frames from those asked for. ApiError where it cannot make them."""
    wanted = {name: given[name] for name in ("width", "height") if name in given}
    if "size" in given:
        wanted = dict(zip(("width", "height"), map(int, given["size"].split("x")), strict=True))
    steps = {
        "height": upscale * facts.spatial_stride * facts.patch[0],
        "width": upscale * facts.spatial_stride * facts.patch[1],
    }
    nearest = {
        name: max(steps[name], round(side / steps[name]) * steps[name]) for name, side in wanted.items()
    }
    for name, side in wanted.items():
        if side == nearest[name]:
            continue
        need = f"need a multiple of {steps[name]} for the {name}"
        if "size" in given:
            advice = f"try {nearest['width']}x{nearest['height']}"
            raise invalid(f"size={given['size']}: {need}; {advice}", "size")
        raise invalid(f"{name}={side}: {need}; try {nearest[name]}", name)
    return {name: side // upscale for name, side in wanted.items()}


def fitted(
    values: dict[str, Any], facts: ModelFacts, kind: Kind, has_stride: bool = False
) -> tuple[dict[str, Any], JobConfig]:
    """(a job's settings with those that a record shows, the same resolved). ValueError when they do not fit.

    A session is made a block at a time, unless the operator or the client has set a timetable or stride.
    """
    job = resolve(parse_job(values), facts.recommended)
    assert job.width and job.height and job.num_inference_steps
    for name, side, patch in (("height", job.height, facts.patch[0]), ("width", job.width, facts.patch[1])):
        if side % (facts.spatial_stride * patch):
            raise ValueError(f"{name}={side}: need a multiple of {facts.spatial_stride * patch}")
    queue = dict(values.get("queue") or {})
    if kind == Kind.SESSION:
        queue["timetable"] = queue.get("timetable") or (
            "dualparal" if "stride" in queue else "autoregressive"
        )
        if queue["timetable"] == "full":
            raise ValueError("queue.timetable=full: a session is made in blocks; leave it out")
    if not has_stride and "stride" in queue:
        queue["stride"] = min(queue["stride"], job.num_inference_steps)
    named = ("width", "height", "fps", "num_inference_steps")
    values = {**values, **{name: getattr(job, name) for name in named}}
    if queue:
        values["queue"] = queue
    return values, resolve(parse_job(values), facts.recommended)


def asking(check: Callable[..., Made], *given: Any) -> Made:
    """What `check` makes; its ValueError as a refusal that names the request's field."""
    try:
        return check(*given)
    except ValueError as error:
        text = str(error).removeprefix("job: ")
        match = re.match(r"([\w.]+)(?=[=:])", text)
        setting = match[0] if match else ""
        field = FIELDS.get(setting, setting)
        raise invalid(field + text[len(setting) :], field or None) from None


def work_per_frame(job: JobConfig) -> int:
    """Pixels that the model makes of a frame, times steps."""
    assert job.width and job.height and job.num_inference_steps
    return job.width * job.height * job.num_inference_steps
