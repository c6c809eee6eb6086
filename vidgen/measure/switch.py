"""How soon another prompt shows when it changes mid-way, and whether the one before it was left whole."""

import random
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vidgen.builtin import SmallModel
from vidgen.measure.adherence import FACTORS, MIN_FRAMES, measure_clip
from vidgen.measure.generate import LONG, Queue, generate_segments
from vidgen.measure.keeping import Row, kept_rows
from vidgen.measure.report import pick_scenes, settings_text
from vidgen.types import Recommended, Segment
from vidgen.world import WORLDS, Scene

IN_TIME = 2  # blocks


def measure_switch(
    model: SmallModel,
    *,
    num_prompts: int,
    seed: int,
    blocks_each: int = 6,
    settings: Recommended | None = None,
    queue: Queue = LONG,
    world: str = "small",
    keep: Path | None = None,
) -> dict[str, Any]:
    """Counts of videos whose new prompt shows in time and whose old one is intact before, block by block.

    Each video holds one scene for so many blocks and then, for as many, one that differs in every factor.
    A block is judged by its own frames. "in_time": the new scene shows fully in the first or second block
    that has its prompt; "shown": in which block it first does (1 is the first). "old_before": the last block
    of the old prompt still shows the old scene fully. Blocks go wrong now and then without any switch:
    "old_blocks" and "new_blocks" are the shares of right ones to compare with. It cannot tell a graceful
    change from a cut: see the border's jump for that.
    """
    settings = settings or model.recommended
    block = settings.block_frames * model.codec.temporal_stride
    if block < MIN_FRAMES:
        raise ValueError(f"block_frames={settings.block_frames}: need {MIN_FRAMES} pixel frames to judge one")
    pairs = pick_pairs(num_prompts, seed, world)
    what = {
        "measure": "switch", "prompts": [f"{old.caption()} > {new.caption()}" for old, new in pairs],
        "seed": seed, "blocks_each": blocks_each, "queue": asdict(queue), "settings": settings_text(settings),
        "training_steps": model.training.get("step"), "codec": str(model.codec.config),
    }  # fmt: skip

    def one(index: int) -> Row:
        return _one(model, pairs[index], seed + index, blocks_each * block, settings, queue)

    rows = list(kept_rows(keep, what, num_prompts, one))
    return {**_counts(rows), "settings": what["settings"], "queue": what["queue"]}


def _one(
    model: SmallModel,
    pair: tuple[Scene, Scene],
    seed: int,
    frames_each: int,
    settings: Recommended,
    queue: Queue,
) -> Row:
    """Which factors each block of one video shows, of the scene that it was asked for."""
    segments = tuple(Segment(prompt=scene.caption(), num_frames=frames_each) for scene in pair)
    video = generate_segments(model, segments, seed=seed, settings=settings, queue=queue)
    block = settings.block_frames * model.codec.temporal_stride
    seen = [measure_clip(clip) for clip in video.split(block, dim=1)]
    half = len(seen) // 2
    right = [measured.verdict(pair[index >= half]) for index, measured in enumerate(seen)]
    factors = [[getattr(verdict, factor) for factor in FACTORS] for verdict in right]
    return {"old": factors[:half], "new": factors[half:]}


def _counts(rows: list[Row]) -> dict[str, Any]:
    first = [next((n for n, block in enumerate(row["new"], 1) if all(block)), None) for row in rows]
    shown = Counter("never" if number is None else str(number) for number in first)
    return {
        "prompts": len(rows),
        "in_time": f"{sum(number is not None and number <= IN_TIME for number in first)}/{len(rows)}",
        "shown": dict(sorted(shown.items())),
        "old_before": f"{sum(all(row['old'][-1]) for row in rows)}/{len(rows)}",
        "old_blocks": _by_place(rows, "old"),
        "new_blocks": _by_place(rows, "new"),
        "new_second_block": {
            factor: f"{sum(row['new'][IN_TIME - 1][place] for row in rows)}/{len(rows)}"
            for place, factor in enumerate(FACTORS)
        },
    }


def _by_place(rows: list[Row], part: str) -> list[str]:
    """In how many videos each block of a part is right in every factor."""
    places = zip(*(row[part] for row in rows), strict=True)
    return [f"{sum(map(all, blocks))}/{len(rows)}" for blocks in places]


def pick_pairs(num_prompts: int, seed: int, world: str = "small") -> list[tuple[Scene, Scene]]:
    """Scenes, and for each another of the world that differs in every factor; the same for the same seed."""
    rng = random.Random(seed)
    every = WORLDS[world].scenes()

    def other(scene: Scene) -> Scene:
        differing = [new for new in every if all(getattr(new, f) != getattr(scene, f) for f in FACTORS)]
        return rng.choice(differing)

    return [(scene, other(scene)) for scene in pick_scenes(num_prompts, seed, world)]
