"""`vidgen measure`: how good a model is, and what can be said of a video."""

import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vidgen.cli_exit import OK, write_line

if TYPE_CHECKING:
    from torch import Tensor

    from vidgen.builtin import SmallModel
    from vidgen.measure.nearest import Compared
    from vidgen.media.source import VideoSource
    from vidgen.types import Recommended

Json = Annotated[bool, typer.Option("--json", help="JSON on stdout")]
Model = Annotated[str, typer.Option("--model", metavar="NAME|FILE", help="what to measure")]
Prompts = Annotated[int, typer.Option("--prompts", min=1, metavar="N", help="a video each")]
Seed = Annotated[int, typer.Option("--seed", min=0, metavar="N", help="of the first video")]
Keep = Annotated[
    Path | None,
    typer.Option("--keep", metavar="FILE", help="keep each video's results here; goes on if there are some"),
]
Steps = Annotated[
    int | None, typer.Option("--num-inference-steps", min=1, metavar="N", help="instead of the model's own")
]
Context = Annotated[
    int | None,
    typer.Option("--context-frames", min=0, metavar="N", help="latent frames; not the model's own"),
]
Timetable = Annotated[
    str, typer.Option("--timetable", metavar="NAME", help="dualparal, autoregressive or buffer")
]
Stride = Annotated[int, typer.Option("--stride", min=1, metavar="N", help="ticks from block to block")]
Against = Annotated[
    Path | None, typer.Option("--against", metavar="FILE", help="another one, to say how near they are")
]
PIXELS_AT_ONCE = 2**20  # larger tensors cost the system more than the measures take
measure = typer.Typer(help="Measure how good a model is, or a video.")


@measure.command()
def adherence(
    model: Model = "builtin",
    prompts: Prompts = 60,
    seed: Seed = 0,
    steps: Steps = None,
    cache: Annotated[str, typer.Option("--cache", metavar="NAME", help="a step cache")] = "none",
    threshold: Annotated[
        float | None, typer.Option("--cache-threshold", metavar="X", help="not the method's own")
    ] = None,
    as_json: Json = False,
) -> int:
    """Say how often a model's videos show what their prompts ask for."""
    from vidgen.measure.report import measure_adherence
    from vidgen.stepcache.cache import make_cache
    from vidgen.stepcache.calibration import with_calibration
    from vidgen.stepcache.settings import CacheSettings

    small = _small(model)
    settings = _settings(small, num_inference_steps=steps)
    made = make_cache(with_calibration(CacheSettings(method=cache, threshold=threshold), is_builtin=True))
    found = measure_adherence(small, num_prompts=prompts, seed=seed, settings=settings, cache=made)
    return _tell(found, as_json)


@measure.command()
def calibration(
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="the file (.json)")],
    model: Annotated[str, typer.Option("--model", metavar="NAME|PATH", help="what to measure")] = "builtin",
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", metavar="TEXT", help="may be repeated")
    ] = None,
    num_frames: Annotated[int | None, typer.Option("--num-frames", min=1, metavar="N")] = None,
    seed: Seed = 0,
) -> int:
    """Measure what the step caches `mag` and `tea` must know of a model, and write it into a file."""
    from vidgen.config import parse_job
    from vidgen.engine import Engine
    from vidgen.measure.calibration import calibrate
    from vidgen.measure.report import pick_scenes

    if not prompt and model != "builtin":
        raise ValueError(f"model={model}: needs --prompt TEXT, what it is to be measured on")
    prompts = prompt or [scene.caption() for scene in pick_scenes(8, seed)]
    engine = Engine.from_pretrained(model)
    settings: dict[str, Any] = {"model": model} | ({} if num_frames is None else {"num_frames": num_frames})
    jobs = (parse_job({**settings, "prompt": words, "seed": seed + i}) for i, words in enumerate(prompts))
    found = calibrate(engine.plan(job).task for job in jobs)
    output.write_text(json.dumps({**found, "model": model, "prompts": prompts}, indent=1) + "\n")
    write_line("stdout", f"written  {output}")
    return OK


@measure.command()
def long(
    model: Model = "builtin",
    prompts: Prompts = 8,
    num_frames: Annotated[int, typer.Option("--num-frames", min=64, metavar="N", help="of a video")] = 257,
    timetable: Timetable = "dualparal",
    stride: Stride = 1,
    seed: Seed = 0,
    steps: Steps = None,
    context: Context = None,
    keep: Keep = None,
    as_json: Json = False,
) -> int:
    """Say how often stretches of long videos show what was asked for, and whether they drift."""
    from vidgen.measure.generate import Queue
    from vidgen.measure.report import measure_long

    small = _small(model)
    settings = _settings(small, num_inference_steps=steps, context_frames=context)
    found = measure_long(
        small,
        num_prompts=prompts,
        num_frames=num_frames,
        seed=seed,
        settings=settings,
        queue=Queue(timetable=timetable, stride=stride),
        keep=keep,
    )
    return _tell(found, as_json)


@measure.command()
def switch(
    model: Model = "builtin",
    prompts: Prompts = 16,
    blocks: Annotated[int, typer.Option("--blocks", min=2, metavar="N", help="of each prompt")] = 6,
    timetable: Timetable = "dualparal",
    stride: Stride = 1,
    transition: Annotated[
        int, typer.Option("--transition-blocks", min=0, metavar="N", help="that blend both prompts")
    ] = 0,
    seed: Seed = 0,
    steps: Steps = None,
    context: Context = None,
    keep: Keep = None,
    as_json: Json = False,
) -> int:
    """Say how soon another prompt shows when it changes mid-way, and what becomes of the one before."""
    from vidgen.measure.generate import Queue
    from vidgen.measure.switch import measure_switch

    small = _small(model)
    found = measure_switch(
        small,
        num_prompts=prompts,
        seed=seed,
        blocks_each=blocks,
        settings=_settings(small, num_inference_steps=steps, context_frames=context),
        queue=Queue(timetable=timetable, stride=stride, transition_blocks=transition),
        keep=keep,
    )
    return _tell(found, as_json)


@measure.command()
def video(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="a video file")],
    against: Against = None,
    block_frames: Annotated[
        int | None,
        typer.Option("--block-frames", min=1, metavar="N", help="pixel frames from border to border"),
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option("--prompt", metavar="TEXT", help="of the built-in model's world; judged by it"),
    ] = None,
    with_lpips: Annotated[
        bool, typer.Option("--lpips", help="LPIPS too, where its package is installed")
    ] = False,
    as_json: Json = False,
) -> int:
    """Say what can be measured of a video: alone, and against another of the same size and length."""
    from vidgen.measure.summary import measure_video, plain
    from vidgen.world import parse_caption

    if with_lpips and against is None:
        raise ValueError("--lpips: compares two videos; give the other with --against FILE")
    scene = parse_caption(prompt) if prompt is not None else None
    with ExitStack() as opened:
        sources = [_open(path, opened) for path in (file, against) if path is not None]
        shapes = [(source.num_frames, source.height, source.width) for source in sources]
        if shapes[0] != shapes[-1]:
            raise ValueError(
                f"--against {against}: has (frames, height, width) {shapes[-1]}, {file} has {shapes[0]}; "
                "give videos of the same size and length"
            )
        if scene is not None and shapes[0][1] != shapes[0][2]:
            raise ValueError(
                f"--prompt: judges square frames only, and {file} has {shapes[0][1:]}; leave it out"
            )
        found = measure_video(
            *map(_parts, sources), block_frames=block_frames, scene=scene, with_lpips=with_lpips
        )
    return _tell(plain(found), as_json)


@measure.command()
def nearest(
    model: Model = "builtin",
    prompts: Prompts = 16,
    seed: Seed = 0,
    references: Annotated[
        int, typer.Option("--references", min=1, metavar="N", help="training clips")
    ] = 20000,
    sheet: Annotated[
        Path | None, typer.Option("--sheet", metavar="FILE", help="PNG: each sample, then its nearest")
    ] = None,
    as_json: Json = False,
) -> int:
    """Hold samples of scenes never trained on against the nearest training clips: drawn, or remembered?"""
    from vidgen.measure.nearest import compare

    found = compare(_small(model), prompts, references, seed)
    if sheet is not None:
        _save_pairs(found, sheet)
    result = {
        "prompts": len(found.scenes),
        "references": references,
        "sample to nearest, median": round(found.of_samples.distance_N.median().item(), 4),
        "sample to nearest, least": round(found.of_samples.distance_N.min().item(), 4),
        "real clip to nearest, median": round(found.of_real.distance_N.median().item(), 4),
        "real clip to nearest, least": round(found.of_real.distance_N.min().item(), 4),
    }
    return _tell(result, as_json)


def _save_pairs(found: "Compared", target: Path) -> None:
    """A row a sample: six of its frames, then the same six of the nearest training clip."""
    import torch

    from vidgen.media.segments import replacing
    from vidgen.media.sheet import contact_sheet

    shown = [0, 3, 6, 9, 12, 15]
    rows = [
        clip[:, shown]
        for sample, near in zip(found.samples_N3FYX, found.of_samples.clips_N3FYX, strict=True)
        for clip in (sample, near)
    ]
    frames = torch.cat(rows, dim=1).movedim(0, -1).add(1).mul(127.5).round().clamp(0, 255).byte().numpy()
    labels = [
        text for scene in found.scenes for text in (scene.caption(), "nearest training clip") for _ in shown
    ]
    with replacing(target) as path:
        contact_sheet(frames, num_columns=12, num_tiles=len(frames), labels=labels).save(path, "PNG")


def _open(path: Path, opened: ExitStack) -> "VideoSource":
    """ValueError in one line when the file is no video."""
    from vidgen.media.source import VideoSource

    try:
        return opened.enter_context(VideoSource(path))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read as a video ({error}); give another file") from error


def _parts(source: "VideoSource") -> "Iterator[Tensor]":
    """The video [3, F, H, W] in [-1, 1], some frames at a time."""
    import torch

    at_once = max(1, PIXELS_AT_ONCE // (source.height * source.width))
    for start in range(0, source.num_frames, at_once):
        pictures = source.frames(range(start, min(start + at_once, source.num_frames)))
        yield torch.from_numpy(pictures).permute(3, 0, 1, 2).float() / 127.5 - 1


def _small(model: str) -> "SmallModel":
    """The model of that name or file. ValueError when it is of another family than the built-in one."""
    from vidgen.builtin import BUILTIN_PATH, load_small

    path = BUILTIN_PATH if model == "builtin" else Path(model)
    if not path.is_file():
        raise ValueError(f"model={model}: only models of the built-in one's family are measured; give a file")
    return load_small(path)


def _settings(model: "SmallModel", **instead: int | None) -> "Recommended":
    """The model's own settings but for those that are given."""
    given: dict[str, Any] = {name: value for name, value in instead.items() if value is not None}
    return replace(model.recommended, **given)


def _tell(found: dict[str, Any], as_json: bool) -> int:
    if as_json:
        write_line("stdout", json.dumps(found, indent=2))
    else:
        for name, value in found.items():
            write_line("stdout", f"{name}  {value}")
    return OK
