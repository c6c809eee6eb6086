"""How often a model shows what it was asked for, on fixed prompts, seeds and settings."""

import random
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vidgen.builtin import SmallModel
from vidgen.measure.adherence import CLIP_FRAMES as CLIP_FRAMES
from vidgen.measure.adherence import FACTORS, Verdict, judge, windows
from vidgen.measure.fidelity import boundary_jump, steps_by_place
from vidgen.measure.generate import LONG, Queue, generate, generate_segments
from vidgen.measure.keeping import Row, kept_rows
from vidgen.stepcache.cache import StepCache
from vidgen.types import Recommended, Segment
from vidgen.world import WORLDS, Scene


def measure_adherence(
    model: SmallModel,
    *,
    num_prompts: int,
    seed: int,
    settings: Recommended | None = None,
    world: str = "small",
    cache: StepCache | None = None,
) -> dict[str, Any]:
    """Counts of right clips, per factor and in all, for trained and held-out prompts, half of each.

    Prompts are drawn from the world by the seed; clip i is rendered with seed + i.
    """
    settings = settings or model.recommended
    scenes = pick_scenes(num_prompts, seed, world)
    num_trained = (num_prompts + 1) // 2
    started = time.process_time()
    verdicts = []
    for index, scene in enumerate(scenes):
        clip = generate(
            model, scene.caption(), num_frames=CLIP_FRAMES, seed=seed + index, settings=settings, cache=cache
        )
        verdicts.append(judge(clip, scene))
    seconds = time.process_time() - started
    skipping = {} if cache is None else {"cache": {"method": cache.settings.method, **cache.tally.as_dict()}}
    return {
        "prompts": len(scenes),
        "all": _counts(verdicts),
        "trained": _counts(verdicts[:num_trained]),
        "held_out": _counts(verdicts[num_trained:]),
        "cpu_seconds_per_clip": round(seconds / len(scenes), 3),
        **skipping,
        "settings": settings_text(settings),
        "training_steps": model.training.get("step"),
    }


def measure_long(
    model: SmallModel,
    *,
    num_prompts: int,
    num_frames: int,
    seed: int,
    settings: Recommended | None = None,
    queue: Queue = LONG,
    world: str = "small",
    keep: Path | None = None,
) -> dict[str, Any]:
    """Counts of right windows of 16 frames in long block-queue videos, by quarter, and how blocks meet.

    Of a long video every window should show what was asked for, as often at the end as at the beginning.
    "border_jump" is the mean over the videos of the change at block borders over that inside blocks;
    "steps" is the mean change of consecutive frames at each kind of place, of which a codec with chunks of
    frames has a part in those where latent frames meet. Videos are kept in the file `keep` as results only.
    """
    settings = settings or model.recommended
    block = settings.block_frames * model.codec.temporal_stride
    scenes = pick_scenes(num_prompts, seed, world)
    what = {
        "measure": "long", "prompts": [scene.caption() for scene in scenes], "seed": seed,
        "num_frames": num_frames, "queue": asdict(queue), "settings": settings_text(settings),
        "training_steps": model.training.get("step"), "codec": str(model.codec.config),
    }  # fmt: skip

    def one(index: int) -> Row:
        segment = Segment(prompt=scenes[index].caption(), num_frames=num_frames)
        video = generate_segments(model, (segment,), seed=seed + index, settings=settings, queue=queue)
        return {
            "verdicts": [asdict(seen.verdict(scenes[index])) for seen in windows(video, CLIP_FRAMES)],
            "jump": boundary_jump(video, list(range(block, num_frames, block))),
            "steps": steps_by_place(video, block, model.codec.temporal_stride),
        }

    found = _long_counts(list(kept_rows(keep, what, num_prompts, one)))
    named = {"settings": what["settings"], "queue": what["queue"]}
    return {"prompts": num_prompts, "frames": num_frames, **found, **named}


def _long_counts(rows: list[Row]) -> dict[str, Any]:
    """The results of all long videos in one."""
    verdicts = [[Verdict(**verdict) for verdict in row["verdicts"]] for row in rows]
    quarters = [[v for video in verdicts for v in video[_quarter(len(video), q)]] for q in range(4)]
    steps = {place: sum(row["steps"][place] for row in rows) / len(rows) for place in rows[0]["steps"]}
    return {
        "all": _counts([verdict for video in verdicts for verdict in video]),
        "quarters": [_counts(quarter)["all"] for quarter in quarters],
        "border_jump": round(sum(row["jump"] for row in rows) / len(rows), 3),
        "steps": {place: round(step, 5) for place, step in steps.items()},
    }


def settings_text(settings: Recommended) -> dict[str, str]:
    """Settings as they are shown and compared."""
    return {key: str(value) for key, value in asdict(settings).items()}


def _quarter(length: int, number: int) -> slice:
    return slice(number * length // 4, (number + 1) * length // 4)


def pick_scenes(num_prompts: int, seed: int, world: str = "small") -> list[Scene]:
    """Trained scenes, then as many (or one fewer) that were held out, the same for the same seed."""
    trained, held_out = (_pick(part, seed, num_prompts, i) for i, part in enumerate(WORLDS[world].split()))
    return [*trained, *held_out]


def _pick(scenes: list[Scene], seed: int, num_prompts: int, part: int) -> list[Scene]:
    """Half of the prompts (the larger half of an odd number from the first part), repeating if it must."""
    count = (num_prompts + 1 - part) // 2
    order = random.Random(seed).sample(scenes, len(scenes))
    return [order[i % len(order)] for i in range(count)]


def _counts(verdicts: list[Verdict]) -> dict[str, str]:
    names = (*FACTORS, "all")
    return {name: f"{sum(getattr(v, name) for v in verdicts)}/{len(verdicts)}" for name in names}
