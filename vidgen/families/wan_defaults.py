"""What Wan's authors use where a job says nothing, per family.

Source: the sample settings of github.com/Wan-Video/Wan2.1 and Wan2.2; a diffusers folder's scheduler wins.
"""

from vidgen.families.wan_folder import WanFolder
from vidgen.model.dit import DiTConfig
from vidgen.types import ContextMode, NoiseKind, Recommended

SMALL_WIDTH = 2000  # below it a model is one of the small ones, which were trained for 480p


def recommended(folder: WanFolder, dit: DiTConfig) -> Recommended:
    """Settings by family; blocks and context of long videos are DualParal's (arXiv 2505.21070)."""
    is_small, has_experts = dit.width < SMALL_WIDTH, len(folder.transformers) > 1
    is_480p = is_small or folder.kind == "i2v"
    height, width, fps, num_frames, steps, guidance, second = 720, 1280, 16, 81, 50, 5.0, None
    shift = 5.0
    if folder.kind == "ti2v":
        height, width, fps, num_frames = 704, 1280, 24, 121
    elif is_480p:
        height, width = 480, 832
    if folder.kind == "i2v":
        steps, shift = 40, 3.0
    if folder.kind == "flf2v":
        shift = 16.0
    if has_experts:
        steps, shift = 40, 5.0
        guidance, second = 3.5, 3.5
        if folder.kind == "t2v":
            shift, guidance, second = 12.0, 4.0, 3.0
    scheduler = folder.scheduler or {}
    return Recommended(
        height=height,
        width=width,
        fps=fps,
        num_frames=num_frames,
        num_inference_steps=steps,
        guidance_scale=guidance,
        guidance_scale_2=second,
        shift=float(scheduler.get("flow_shift") or scheduler.get("shift") or shift),
        block_frames=8,
        context_frames=8,
        context_mode=ContextMode.RECOMPUTE,
        noise=NoiseKind.POOL,
        whole_frames=num_frames,
        dtype="bf16",
        threads=0,
    )
