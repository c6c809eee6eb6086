"""What a job is, as people type it: a YAML file, flags, or keyword arguments, checked in one place.

A value left out takes the model's recommended one (`resolve`). The resolved job is stored with its output and
says everything that is needed to repeat it.
"""

import difflib
import hashlib
import json
import os
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, Field, ValidationError

from vidgen.sections import (
    MAX_COUNT,
    AttentionConfig,
    InputConfig,
    LoraConfig,
    OffloadConfig,
    OutputConfig,
    ParallelConfig,
    Place,
    QueueConfig,
    SegmentConfig,
    Strict,
    Text,
)  # fmt: skip
from vidgen.sparsity.settings import SparsitySettings
from vidgen.speeds import with_level
from vidgen.stepcache.settings import CacheSettings
from vidgen.types import ContextMode, NoiseKind, Recommended, Segment

MAX_SHOWN_CHARACTERS = 100
BACKEND_VARIABLE = "VIDGEN_ATTENTION_BACKEND"


class JobConfig(Strict):
    """One render."""

    prompt: Text | None = None
    segments: tuple[SegmentConfig, ...] = ()
    negative_prompt: Text | None = None
    """What to steer away from; by default the model's own."""
    num_frames: int | None = Field(default=None, ge=1, le=MAX_COUNT)
    height: int | None = Field(default=None, ge=1, le=MAX_COUNT)
    width: int | None = Field(default=None, ge=1, le=MAX_COUNT)
    fps: int | None = Field(default=None, ge=1, le=240)
    num_inference_steps: int | None = Field(default=None, ge=1, le=1000)
    guidance_scale: float | None = Field(default=None, ge=0, le=100, allow_inf_nan=False)
    guidance_scale_2: float | None = Field(default=None, ge=0, le=100, allow_inf_nan=False)
    """Of the second expert, for models that have two; by default the model's, else the same."""
    shift: float | None = Field(default=None, gt=0, le=100, allow_inf_nan=False)
    solver: Literal["euler", "unipc", "dpm++"] | None = None
    """By default the checkpoint's own."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    model: Text = "builtin"
    """`builtin` or the path of a checkpoint: a file of vidgen's own, or a folder of Wan's or diffusers'."""
    dtype: Literal["fp32", "bf16", "fp16", "fp8"] | None = None
    """Of the model's weights; by default the model's recommended one."""
    compile: bool = False
    """Compile the model's layers: faster steps after a slower start; last bits differ."""
    loras: tuple[LoraConfig, ...] = ()
    tile: int | None = Field(default=None, ge=32, le=8192)
    """Decode in squares of so many pixels, blended where they meet: less memory, about the same frames."""
    offload: OffloadConfig = OffloadConfig()
    text_cache: Place | None = None
    """A folder where encoded prompts are kept: a prompt seen before needs no text encoder."""
    input: InputConfig = InputConfig()
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the model runs; `auto` takes a GPU where there is one. It decides the last bits, like threads."""
    threads: int | None = Field(default=None, ge=1, le=1024)
    """CPU threads of torch; part of a job because sums of floats depend on it."""
    state_every: int = Field(default=8, ge=1)
    """Ticks between two saved states."""
    queue: QueueConfig = QueueConfig()
    attention: AttentionConfig = AttentionConfig()
    cache: CacheSettings = CacheSettings()
    """Steps at which the model is not run: an approximation, off by default, see stepcache/settings.py."""
    speed: Literal["exact", "balanced", "fast"] | None = None
    """A level of vidgen/speeds.py, which fills in approximations that are not set; by default none are."""
    parallel: ParallelConfig = ParallelConfig()
    output: OutputConfig = OutputConfig()

    def timeline(self) -> tuple[Segment, ...]:
        """The prompts over time. ValueError unless there is exactly one of `prompt` and `segments`."""
        if self.prompt is not None and self.segments:
            raise ValueError("both prompt and segments are given: give one of them")
        segments = tuple(Segment(prompt=s.prompt, num_frames=s.num_frames) for s in self.segments)
        if self.prompt is not None:
            default = Recommended().num_frames
            segments = (Segment(prompt=self.prompt, num_frames=self.num_frames or default),)
        if not segments:
            raise ValueError(
                'no prompt: give one, for example "a red circle moving left over a gray background"'
            )
        for segment in segments:
            if not segment.prompt.strip():
                raise ValueError("the prompt is empty: say what the video is of")
        return segments


def resolve(config: JobConfig, recommended: Recommended) -> JobConfig:
    """The same job with every value filled in. ValueError for a level of speed that its settings gainsay."""
    config = with_level(config, recommended)
    if config.num_frames is None and not config.segments:
        config = config.model_copy(update={"num_frames": recommended.num_frames})
    segments = config.timeline()
    queue = config.queue
    block_frames = queue.block_frames or (1 if queue.timetable == "fifo" else recommended.block_frames)
    context = queue.context_frames
    if context is None:
        context = min(recommended.context_frames, block_frames)
    filled = {
        "num_frames": sum(segment.num_frames for segment in segments),
        "height": recommended.height,
        "width": recommended.width,
        "fps": recommended.fps,
        "num_inference_steps": recommended.num_inference_steps,
        "guidance_scale": recommended.guidance_scale,
        "guidance_scale_2": recommended.guidance_scale_2 if config.guidance_scale is None else None,
        "negative_prompt": recommended.negative_prompt,
        "dtype": recommended.dtype,
        "shift": recommended.shift,
        "threads": recommended.threads or os.cpu_count() or 1,
    }
    missing = {name: value for name, value in filled.items() if getattr(config, name) is None}
    num_frames = missing.get("num_frames", config.num_frames)
    is_whole = num_frames <= recommended.whole_frames and len(segments) == 1
    backend = config.attention.backend or os.environ.get(BACKEND_VARIABLE) or None
    return config.model_copy(
        update={
            **missing,
            "attention": config.attention.model_copy(update={"backend": backend}),
            "queue": queue.model_copy(
                update={
                    "timetable": queue.timetable or ("full" if is_whole else "dualparal"),
                    "block_frames": block_frames,
                    "context_frames": context,
                    # a checkpoint's settings come from JSON, which knows words and no enums
                    "context_mode": ContextMode(queue.context_mode or recommended.context_mode),
                    "noise": NoiseKind(queue.noise or recommended.noise),
                }
            ),
        }
    )


def override_parallel(config: JobConfig, changes: dict[str, Any]) -> JobConfig:
    """The same job with other settings in its `parallel` section. ValueError as by parse_job.

    A cut by hand goes when the number of ranks changes without it.
    """
    if not changes:
        return config
    values = config.parallel.model_dump()
    if "ranks" in changes and "layers_per_rank" not in changes:
        values["layers_per_rank"] = None
    parsed = parse_job({"parallel": {**values, **changes}}, "command line")
    return config.model_copy(update={"parallel": parsed.parallel})


def read_yaml(path: Path) -> Any:
    """What a YAML file says. ValueError in one line when it cannot be read or is broken."""
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a text file; give a YAML file") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ValueError(f"{path}: broken YAML: {place}{getattr(error, 'problem', error)}") from error


def parse_job(values: Any, source: str = "job") -> JobConfig:
    """A job from a mapping. ValueError in one line that names the key, what was given and what is allowed."""
    if not isinstance(values, dict):
        raise ValueError(f"{source}: need a mapping of settings, found {_shown(values)}")
    try:
        return JobConfig.model_validate(values)
    except ValidationError as error:
        raise ValueError(f"{source}: " + "; ".join(_explain(e) for e in error.errors()[:3])) from error


def dump_job(config: JobConfig) -> str:
    """The job as YAML, every value in it."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


NEWER_SETTINGS: dict[str, tuple[Any, ...]] = {
    "attention": (AttentionConfig(),),
    "dtype": (None, "fp32"),
    "solver": (None,),
    "compile": (False,),
    "tile": (None,),
    "loras": ((),),
    "input": (InputConfig(),),
    "guidance_scale_2": (None,),
    "queue.residual_guidance": ("none",),
    "queue.static_threshold": (None,),
    "queue.global_frames": (4,),
    "queue.warm_up_steps": (1,),
    "cache.layers": (None,),
    "cache.boundary": (None,),
    "cache.ratio": (None,),
    "cache.highest": (None,),
    "cache": (CacheSettings(),),
    "speed": (None,),
}


def frames_digest(config: JobConfig) -> str:
    """SHA-256 of all settings that decide a frame or its encoding; the others may change between runs."""
    values = config.model_dump(
        mode="json", exclude={"parallel", "state_every", "device", "offload", "text_cache"}
    )
    values["output"] = {name: values["output"][name] for name in ("upscale", "crf")}
    # jobs begun before there were these settings go on
    for path, default in NEWER_SETTINGS.items():
        *rooms, name = path.split(".")
        config_room, values_room = config, values
        for room in rooms:
            config_room, values_room = getattr(config_room, room), values_room[room]
        if getattr(config_room, name) in default:
            del values_room[name]
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _explain(error: Any) -> str:
    key = ".".join(str(part) for part in error["loc"]) or "job"
    if error["type"] not in ("extra_forbidden", "unexpected_keyword_argument"):
        message = error["msg"].removeprefix("Value error, ")
        if error["type"] == "value_error" and isinstance(error["input"], dict):
            return f"{key}: {message}"  # which names the setting
        return f"{key}={_shown(error['input'])}: {message[0].lower()}{message[1:]}"
    known = _keys(error["loc"][:-1])
    near = difflib.get_close_matches(str(error["loc"][-1]), known, n=1, cutoff=0.5)
    advice = f"did you mean {near[0]}?" if near else f"known keys: {', '.join(known)}"
    return f"unknown key {key}; {advice}"


def _shown(value: Any) -> str:
    """What was given, short enough for one line."""
    text = "nothing" if value is None else repr(value)
    return text if len(text) <= MAX_SHOWN_CHARACTERS else text[: MAX_SHOWN_CHARACTERS - 3] + "..."


def _keys(path: tuple[str | int, ...]) -> list[str]:
    """Keys known at a place of the config."""
    if path[:2] == ("attention", "sparsity"):
        return list(SparsitySettings.__dataclass_fields__)
    if path[:1] == ("cache",):
        return list(CacheSettings.__dataclass_fields__)
    rooms: dict[str | int, type[BaseModel]] = {
        "queue": QueueConfig, "parallel": ParallelConfig, "output": OutputConfig, "segments": SegmentConfig,
        "attention": AttentionConfig, "loras": LoraConfig, "input": InputConfig,
        "offload": OffloadConfig,
    }  # fmt: skip
    model = rooms[path[0]] if path else JobConfig
    return list(model.model_fields)
