"""From a request to a video in the queue, or one line that says why not: what fails here reaches no rank.

What the client says goes over what the operator has set for the model, and that over the model's own
(`VideoRequest.model_fields_set`). No path ever comes from a client. Call `load_facts` once, off the event
loop, before the first request: what a model can do is then known without it.
"""

import time
from typing import Any

from vidgen.config import JobConfig, parse_job, resolve
from vidgen.serve.config import LimitsConfig, ServerConfig
from vidgen.serve.errors import invalid, over_limit, shown
from vidgen.serve.facts import ModelFacts, facts_of
from vidgen.serve.pictures import check_image as check_image
from vidgen.serve.pictures import read_data_url as read_data_url
from vidgen.serve.records import Kind, Record, make_id
from vidgen.serve.schema import VideoRequest
from vidgen.serve.settings import (
    EXTRA_PARAMS,
    asking,
    fitted,
    make_job,
    num_blocks,
    operators_job,
    work_per_frame,
)


def load_facts(config: ServerConfig) -> dict[str, ModelFacts]:
    """What every model of the server can do, by name; takes seconds the first time.

    ValueError in one line for a model that cannot be opened, or settings that it cannot do.
    """
    found = {}
    for name, model in config.models.items():
        try:
            facts = found[name] = facts_of(operators_job(model, Kind.VIDEO))
            for kind in Kind:
                values = {**operators_job(model, kind), "prompt": "a"}
                num_blocks(fitted(values, facts, kind)[1], facts)
        except ValueError as error:
            raise ValueError(f"models.{name}: {error}") from error
    return found


def make_record(
    request: VideoRequest,
    config: ServerConfig,
    owner: str,
    kind: Kind = Kind.VIDEO,
    input_suffix: str | None = None,
) -> Record:
    """The video that a request asks for, queued and complete but for its place on the disk.

    `input_suffix` is `check_image`'s of the picture that it begins with, which the caller keeps at
    `config.input_file`. ApiError (400) for what this server, or the model, will not do.
    """
    name = request.model or config.default_model
    if name not in config.models:
        raise invalid(
            f"model={shown(name)}: this server has {', '.join(config.models)}", "model", "model_not_found"
        )
    model, limits = config.models[name], config.limits
    facts = facts_of(operators_job(model, Kind.VIDEO))
    given = {field: getattr(request, field) for field in request.model_fields_set}
    given = {field: value for field, value in given.items() if value not in (None, ())}
    _check_texts(request, limits)
    _check_picture(name, facts, has_one=input_suffix is not None)
    values, job = make_job(given, model, facts, kind, limits)
    _check_limits(given, job, limits)
    key = config.key(owner)
    assert job.width and job.height and job.num_frames and job.fps
    kept = request.model_dump(mode="json", exclude_unset=True, exclude={"input_reference"})
    return Record(
        id=make_id(kind),
        kind=kind,
        owner=owner,
        model=name,
        priority=key.priority if key else 0,
        created_at=int(time.time()),
        prompt=request.prompt or job.timeline()[0].prompt,
        request=kept if input_suffix is None else {**kept, "input_suffix": input_suffix},
        job=values,
        width=job.width * job.output.upscale,
        height=job.height * job.output.upscale,
        num_frames=job.num_frames,
        fps=job.fps,
        seed=job.seed,
        chunks_total=asking(num_blocks, job, facts),
    )


def describe(name: str, config: ServerConfig) -> dict[str, Any]:
    """What GET /v1/models says of a model; see schema.ModelObject, without `created`."""
    model = config.models[name]
    values = operators_job(model, Kind.VIDEO)
    facts = facts_of(values)
    job = resolve(parse_job({**values, "prompt": "a"}), facts.recommended)
    assert job.width and job.height
    width, height = job.width * job.output.upscale, job.height * job.output.upscale
    shown_settings = ("num_frames", "fps", "num_inference_steps", "guidance_scale")
    return {
        "id": name,
        "object": "model",
        "owned_by": "vidgen",
        "loras": list(model.loras),
        "extra_params": list(EXTRA_PARAMS),
        "takes_image": facts.pictures != "none",
        "defaults": {
            "size": f"{width}x{height}",
            **{field: getattr(job, field) for field in shown_settings},
            "flow_shift": job.shift,
        },
    }


def check_prompt(prompt: str, limits: LimitsConfig, param: str = "prompt") -> None:
    """ApiError for a prompt that is empty or too long."""
    if not prompt.strip():
        raise invalid(f"{param}: is empty; say what the video shows", param)
    if len(prompt) > limits.max_prompt_characters:
        allowed = f"{limits.max_prompt_characters} characters are allowed"
        message = f"{param}: has {len(prompt)} characters, {allowed}; make it shorter"
        raise invalid(message, param, "over_limit")


def _check_texts(request: VideoRequest, limits: LimitsConfig) -> None:
    """ApiError for texts that are missing, empty or too long."""
    segments = request.segments or ()
    if request.prompt is None and not segments:
        raise invalid("prompt: is missing; say what the video shows", "prompt", "missing_field")
    if len(segments) > limits.max_segments:
        raise over_limit("segments", len(segments), limits.max_segments, "join some")
    if request.prompt is not None:
        check_prompt(request.prompt, limits)
    if request.negative_prompt:
        check_prompt(request.negative_prompt, limits, "negative_prompt")
    for index, segment in enumerate(segments):
        check_prompt(segment.prompt, limits, f"segments.{index}.prompt")


def _check_picture(name: str, facts: ModelFacts, *, has_one: bool) -> None:
    if has_one and facts.pictures == "none":
        raise invalid(f"input_reference: {name} takes no picture; leave it out", "input_reference")
    if not has_one and facts.pictures == "must":
        raise invalid(f"input_reference: {name} begins with a picture; give one", "input_reference")


def _check_limits(given: dict[str, Any], job: JobConfig, limits: LimitsConfig) -> None:
    """ApiError for more than the operator allows."""
    assert job.width and job.height and job.num_frames and job.num_inference_steps
    frames = job.num_frames
    width, height = job.width * job.output.upscale, job.height * job.output.upscale
    if width * height > limits.max_pixels:
        param = "size" if "size" in given else "width"
        raise over_limit(param, f"{width}x{height}", f"{limits.max_pixels} pixels a frame", "make it smaller")
    if frames > limits.max_frames:
        param = next((name for name in ("seconds", "segments") if name in given), "num_frames")
        raise over_limit(param, f"{frames} frames", f"{limits.max_frames} frames", "make it shorter")
    if job.num_inference_steps > limits.max_steps:
        advice = "take fewer"
        raise over_limit("num_inference_steps", job.num_inference_steps, limits.max_steps, advice)
    work = work_per_frame(job) * frames
    if work > limits.max_work:
        raise over_limit(
            "num_frames",
            f"{frames}, {work:.2g} pixels x frames x steps",
            f"{limits.max_work:.2g}",
            "make it shorter, smaller or of fewer steps",
        )
