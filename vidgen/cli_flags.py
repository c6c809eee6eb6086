"""The flags of a render, one row each, and the job that they, a config file and the defaults make together.

Flags are taken as text and checked by the same models as a file, so that both get the same messages.
"""

import inspect
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from vidgen.config import JobConfig


@dataclass(frozen=True, slots=True)
class Flag:
    """A field of the job as flags: the canonical name first, then what other tools call it."""

    field: str  # dots lead into the rooms of the config
    names: str
    value: str  # what help shows for it
    text: str
    kind: type = str

    @property
    def parameter(self) -> str:
        return self.field.replace(".", "__")


FLAGS = (
    Flag("negative_prompt", "--negative-prompt --neg-prompt", "TEXT", "what to steer away from"),
    Flag("num_frames", "--num-frames --frame_num --video-length", "N", "frames of the video (default: 65)"),
    Flag("height", "--height", "PX", "of a frame, before upscaling (default: the model's)"),
    Flag("width", "--width", "PX", "of a frame, before upscaling (default: the model's)"),
    Flag("fps", "--fps", "N", "frames per second (default: the model's)"),
    Flag("num_inference_steps", "--num-inference-steps --sample_steps --infer-steps", "N", "denoising steps"),
    Flag("guidance_scale", "--guidance-scale --sample_guide_scale --cfg-scale", "X", "1 is no guidance"),
    Flag("guidance_scale_2", "--guidance-scale-2", "X", "of the second expert, in models with two"),
    Flag("shift", "--shift --sample_shift --flow-shift", "X", "pushes noise levels toward 1"),
    Flag("seed", "--seed --base_seed", "N", "the same seed gives the same frames (default: 0)"),
    Flag("solver", "--solver --sample_solver", "euler|unipc|dpm++", "default: the checkpoint's own"),
    Flag("model", "--model --ckpt_dir", "NAME|PATH", "see `vidgen models` (default: builtin)"),
    Flag("dtype", "--dtype", "fp32|bf16|fp16|fp8", "of the weights (default: the model's)"),
    Flag("loras", "--lora", "FILE[:SCALE]", "merge a LoRA into the weights; may be repeated", list[str]),
    Flag("compile", "--compile/--no-compile", "", "compile the layers: a slower start, faster steps", bool),
    Flag("tile", "--tile", "PX", "decode in squares of this side: less memory, about the same frames"),
    Flag("offload.encoders", "--offload-encoders/--no-offload-encoders", "", "encode on the CPU", bool),
    Flag("offload.codec", "--offload-codec/--no-offload-codec", "", "decode on the CPU", bool),
    Flag("text_cache", "--text-cache", "DIR", "keep encoded prompts here, for all renders"),
    Flag("input.image", "--image", "FILE", "the first frame"),
    Flag("input.last_image", "--last-image", "FILE", "the last frame, for models trained for one"),
    Flag("input.video", "--video", "FILE", "a clip to go on from"),
    Flag("input.video_frames", "--video-frames", "N", "how many of its last frames (default: 5)"),
    Flag("device", "--device", "auto|cpu|cuda", "where the model runs (default: a GPU if there is one)"),
    Flag("threads", "--threads", "N", "CPU threads; they decide the last bits (default: the model's)"),
    Flag("state_every", "--state-every", "TICKS", "between two saved states (default: 8)"),
    Flag(
        "queue.timetable",
        "--timetable",
        "autoregressive|buffer|dualparal|fifo|full|lockstep|pipefusion",
        "a block at a time, blocks in a window, in a queue, single frames in it, all frames at once, or that "
        "by clips or in patches",
    ),
    Flag("queue.block_frames", "--block-frames", "N", "latent frames of a block"),
    Flag("queue.context_frames", "--context-frames", "N", "latent frames a block sees on each side"),
    Flag("queue.stride", "--stride", "TICKS", "between two admissions; 1 is DualParal (default: 1)"),
    Flag("queue.context_mode", "--context-mode", "recompute|cache", "how the frames before are seen"),
    Flag(
        "queue.anchor_frames", "--anchor-frames", "N", "of the first block, which all later see (default: 0)"
    ),
    Flag("queue.global_frames", "--global-frames", "N", "of the video, seen by all (lockstep; default: 4)"),
    Flag("queue.warm_up_steps", "--warm-up-steps", "N", "exact ones at first (pipefusion; default: 1)"),
    Flag("queue.noise", "--noise", "pool|independent", "where a block's noise comes from"),
    Flag("queue.guidance", "--guidance", "split|stacked", "guidance branches one by one, or as a batch"),
    Flag(
        "queue.residual_guidance",
        "--residual-guidance",
        "none|onetime|self",
        "approximation: a virtual negative branch (default: none)",
    ),
    Flag(
        "queue.static_threshold",
        "--static-threshold",
        "X",
        "approximation: repeat blocks of a still scene (autoregressive only)",
    ),
    Flag("queue.transition_blocks", "--transition-blocks", "N", "over which prompts blend (default: 0)"),
    Flag(
        "attention.backend", "--attention-backend", "NAME", "see `vidgen doctor` (default: fixed by device)"
    ),
    Flag(
        "attention.sparsity.policy",
        "--sparsity",
        "NAME",
        "adaspa, svg2, ...: an approximation (default: none)",
    ),
    Flag(
        "attention.sparsity.density",
        "--density",
        "X",
        "adaspa: share of key blocks kept, instead of a recall",
    ),
    Flag("attention.sparsity.recall", "--recall", "X", "adaspa: share of attention kept (default: 0.95)"),
    Flag(
        "cache.method",
        "--cache",
        "NAME",
        "tea, taylor, ...: an approximation that skips steps (default: none)",
    ),
    Flag("cache.threshold", "--cache-threshold", "X", "0 skips nothing (default: the method's)"),
    Flag("speed", "--speed", "exact|balanced|fast", "approximations of a known cost (default: exact)"),
    Flag("parallel.ranks", "--ranks --num-gpus", "N|auto", "processes that share the work (default: 1)"),
    Flag("parallel.scheme", "--scheme", "given|auto", "auto: the planner says how ranks share the work"),
    Flag("parallel.hardware", "--hardware", "NAME|FILE", "what the planner takes this machine for"),
    Flag("parallel.ulysses", "--ulysses --ulysses_degree", "N", "ranks that share tokens and heads"),
    Flag("parallel.ring", "--ring --ring_degree", "N", "ranks that share tokens and pass keys around"),
    Flag("parallel.guidance", "--cfg-parallel", "1|2", "2: guidance branches on ranks of their own"),
    Flag("parallel.clip", "--clip-ranks", "N", "ranks that share the clips of --timetable lockstep"),
    Flag("parallel.address", "--address", "HOST:PORT", "of a Ray cluster (default: RAY_ADDRESS, else none)"),
    Flag("parallel.placement", "--placement", "pack|spread", "ranks on few nodes or on many"),
    Flag("parallel.max_restarts", "--max-restarts", "N", "when ranks are lost (default: 3)"),
    Flag("parallel.min_ranks", "--min-ranks", "N", "go on with fewer after a loss, down to this"),
    Flag(
        "output.path", "--output -o --save_file --save-path", "PATH", ".mp4, .gif, .webp, a folder for PNGs"
    ),
    Flag("output.upscale", "--upscale", "N", "every pixel becomes a square of this side (default: 1)"),
    Flag("output.crf", "--crf", "N", "H.264 quality, 0 to 51: lower is better and larger (default: 16)"),
    Flag("output.save_latents", "--save-latents", "FILE", "keep the clean latents (.safetensors)"),
    Flag("output.sheet", "--sheet/--no-sheet", "", "write a contact sheet beside the output", bool),
)
PARALLEL = "parallel"
PARALLEL_FLAGS = tuple(flag for flag in FLAGS if flag.field.startswith(f"{PARALLEL}."))
SIZE = re.compile(r"(\d+)\s*[x*]\s*(\d+)", re.IGNORECASE)


Command = Callable[..., Any]


def takes_job_flags(command: Command) -> Command:
    """The command with every row of FLAGS as an option of its own, in place of its `**flags`."""
    return _with_flags(command, FLAGS)


def takes_parallel_flags(command: Command) -> Command:
    """The command with the flags of the `parallel` section, in place of its `**flags`."""
    return _with_flags(command, PARALLEL_FLAGS)


def parallel_changes(flags: dict[str, Any]) -> dict[str, Any]:
    """What such flags change in the `parallel` section."""
    return {
        flag.field.removeprefix(f"{PARALLEL}."): flags[flag.parameter]
        for flag in PARALLEL_FLAGS
        if flags[flag.parameter] is not None
    }


def _with_flags(command: Command, flags: Sequence[Flag]) -> Command:
    own = [p for p in inspect.signature(command).parameters.values() if p.kind is not p.VAR_KEYWORD]
    added = [
        inspect.Parameter(
            flag.parameter,
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=Annotated[
                flag.kind | None,
                typer.Option(
                    *flag.names.split(),
                    metavar=flag.value or None,
                    help=flag.text,
                    show_default=False,
                ),
            ],
        )
        for flag in flags
    ]
    command.__signature__ = inspect.Signature([*own, *added])  # type: ignore[attr-defined]
    return command


def parse_size(text: str) -> dict[str, str]:
    """Width and height of `832x480` or `832*480`. ValueError when it is neither."""
    found = SIZE.fullmatch(text.strip())
    if not found:
        raise ValueError(f"--size {text!r}: need WIDTHxHEIGHT or WIDTH*HEIGHT, for example 832x480")
    return {"width": found[1], "height": found[2]}


def build_job(
    flags: dict[str, Any], *, config: Path | None, segments: Path | None, size: dict[str, str]
) -> "JobConfig":
    """The job of a command line: flags over the file over the defaults. ValueError in one line."""
    from vidgen.config import parse_job, read_yaml

    values: dict[str, Any] = {}
    if config is not None:
        values = read_yaml(config)
        parse_job(values, str(config))  # what is wrong in the file is said with the file's name
    given = {flag.field: flags[flag.parameter] for flag in FLAGS if flags[flag.parameter] is not None}
    given |= {"prompt": flags["prompt"]} if flags["prompt"] is not None else {}
    for name, number in size.items():
        if name in given:
            raise ValueError(f"--{name} {given[name]} and a size of {number}: give one of them")
        given[name] = number
    values = dict(values)
    if segments is not None:
        given["segments"] = _read_segments(segments)
        # a frame count beside a prompt is that prompt's; segments bring their own
        values = {key: value for key, value in values.items() if key not in ("prompt", "num_frames")}
    if "prompt" in given:
        values.pop("segments", None)
    return parse_job(_put(given, values), "command line")


def build_values(flags: dict[str, Any], *, config: Path | None) -> dict[str, Any]:
    """Settings of a file and of flags over it, for jobs that say the rest. ValueError in one line."""
    from vidgen.config import parse_job, read_yaml

    values = dict(read_yaml(config)) if config is not None else {}
    given = {flag.field: flags[flag.parameter] for flag in FLAGS if flags[flag.parameter] is not None}
    values = _put(given, values)
    parse_job(values, str(config or "command line"))
    return values


def _put(given: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """Values with what flags say, by the dotted names of settings."""
    for field, value in given.items():
        *rooms, name = field.split(".")
        inner = values
        for room in rooms:
            inner[room] = dict(inner.get(room) or {})
            inner = inner[room]
        inner[name] = value
    return values


def _read_segments(path: Path) -> list[Any]:
    """The segments of a file, checked. ValueError in one line."""
    from vidgen.config import parse_job, read_yaml

    values = read_yaml(path)
    if not isinstance(values, list) or not values:
        found = "nothing" if not values else type(values).__name__
        raise ValueError(f"{path}: need a list of {{prompt, num_frames}}, found {found}")
    parse_job({"segments": values}, str(path))
    return values
