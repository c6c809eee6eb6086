"""What is measured of a cell's videos: each against the exact one, and all together."""

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, median

import torch
from safetensors.torch import load_file
from torch import Tensor

from vidgen.builtin import FAMILY
from vidgen.engine import Engine
from vidgen.measure.adherence import CLIP_FRAMES, FACTORS
from vidgen.measure.apart import NEIGHBOURS, spatial_scores, temporal_score
from vidgen.measure.fidelity import DATA_RANGE
from vidgen.measure.keeping import Row
from vidgen.measure.perceptual import SMALLEST, has_lpips
from vidgen.measure.summary import measure_video
from vidgen.world import Scene, parse_caption

MEANS = ("ssim", "lpips", "flicker", "boundary_jump", "motion_smoothness", "look_drift", "sharpness")
ADHERES = ("all", *FACTORS)


class Eyes:
    """Looks at videos that are kept as clean latents: no encoding of the output is in what is measured."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.judges = engine.family.facts()["family"] == FAMILY
        self.has_lpips = has_lpips()

    @torch.inference_mode()
    def see(self, latents: Path, num_frames: int) -> Tensor:
        """The video [3, F, Y, X] in [-1, 1]."""
        clean = load_file(latents)["latents"]
        return self.engine.family.codec().stream().decode(clean)[0, :, :num_frames].clamp(-1, 1).cpu()

    def measure(self, video: Tensor, exact: Tensor, prompt: str, block_frames: int | None = None) -> Row:
        """Figures of one video, "adherence" only where the prompt is of the built-in model's world.

        With `block_frames`, how much larger steps between frames are where blocks meet.
        """
        return measure_video(
            [video],
            [exact],
            scene=self._scene(prompt),
            block_frames=block_frames,
            with_lpips=self.has_lpips and min(video.shape[-2:]) >= SMALLEST,
        )

    def _scene(self, prompt: str) -> Scene | None:
        try:
            return parse_caption(prompt) if self.judges else None
        except ValueError:
            return None


def cell_figures(rows: Sequence[Row], exact: Sequence[Row]) -> Row:
    """A cell's figures from those of its videos, which are the exact cell's too, in order.

    "speed_up" is the exact cell's seconds over its own, both at the same pace of the machine (pace.py),
    "adherence_points" the share of windows of 16 frames that show what was asked for less the exact cell's,
    in hundredths.
    """
    seconds = [row["seconds"] for row in rows]
    found: Row = {
        "videos": len(rows),
        "seconds": round(median(seconds), 4),
        "speed_up": round(_speed_up(rows, exact), 3),
        "first_frame_s": round(median(row["first_frame_s"] for row in rows), 4),
        "skipped": round(fmean(row["skipped"] for row in rows), 4),
        "density": _mean([row["density"] for row in rows]),
        "tflops": round(fmean(row["tflops"] for row in rows), 5),
        "sent_mib": round(fmean(row["sent_mib"] for row in rows), 3),
        "memory_mib": max(row["memory_mib"] for row in rows),
        "psnr": _psnr([row["psnr"] for row in rows]),
    }
    found |= {name: _mean([row.get(name) for row in rows]) for name in MEANS}
    for name in ADHERES:
        right, of = _counts(rows, name)
        if of:
            found[f"adherence_{name}"] = f"{right}/{of}"
    right, of = _counts(rows, "all")
    if of:
        exact_right, exact_of = _counts(exact, "all")
        found["adherence_points"] = round(100 * (right / of - exact_right / exact_of), 2)
    return found


def _speed_up(rows: Sequence[Row], exact: Sequence[Row]) -> float:
    """The exact cell's seconds over the cell's; at the same pace where that is known of all."""
    knows = all(row.get("pace_s") for row in (*rows, *exact))
    own, others = (
        sum(row["seconds"] / (row["pace_s"] if knows else 1.0) for row in each) for each in (rows, exact)
    )
    return others / own


def set_figures(videos: Sequence[Tensor], exact: Sequence[Tensor]) -> Row:
    """How alike all stretches of 16 frames are to the exact ones, in time and in space, each apart.

    Videos are shrunk ones.
    Nothing for fewer than six of them, which say nothing.
    """
    clips, others = _clips(videos), _clips(exact)
    if min(len(clips), len(others)) <= NEIGHBOURS:
        return {}
    fidelity, diversity = spatial_scores(clips, others)
    return {
        "temporal_score": round(temporal_score(clips, others), 4),
        "spatial_fidelity": round(fidelity, 4),
        "spatial_diversity": round(diversity, 4),
    }


def _clips(videos: Sequence[Tensor]) -> Tensor:
    parts = [clip for v in videos for clip in v.split(CLIP_FRAMES, dim=1) if clip.shape[1] == CLIP_FRAMES]
    return torch.stack(parts) if parts else torch.empty(0, 3, CLIP_FRAMES, 1, 1)


def _counts(rows: Sequence[Row], factor: str) -> tuple[int, int]:
    """Windows that are right, of how many."""
    pairs = [row["adherence"][factor].split("/") for row in rows if "adherence" in row]
    return sum(int(right) for right, _ in pairs), sum(int(of) for _, of in pairs)


def _psnr(each: Sequence[float | str]) -> float | None:
    """Of all pixels of all videos; None when all are equal, to the last bit."""
    error = fmean(DATA_RANGE**2 / 10 ** (float(value) / 10) for value in each)
    return round(10 * math.log10(DATA_RANGE**2 / error), 3) if error else None


def _mean(values: Sequence[float | str | None]) -> float | None:
    """Of those that are numbers; a word stands for one that is not finite."""
    known = [value for value in values if value is not None and not isinstance(value, str)]
    return round(fmean(known), 5) if known else None
