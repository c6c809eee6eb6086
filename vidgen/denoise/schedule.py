"""Noise levels of the denoising steps."""


def shift_noise_level(level: float, shift: float) -> float:
    """A level in [0, 1] pushed toward 1: shift * t / (1 + (shift - 1) * t).

    Source: Stable Diffusion 3 (arXiv 2403.03206), section 5.3.2; Wan and HunyuanVideo call it flow shift.
    """
    return shift * level / (1 + (shift - 1) * level)


def noise_levels(num_inference_steps: int, shift: float = 1.0) -> list[float]:
    """num_inference_steps + 1 levels from 1 (pure noise) down to 0 (clean).

    ValueError for fewer than one step or a shift that is not positive.
    """
    if num_inference_steps < 1:
        raise ValueError(f"num_inference_steps={num_inference_steps}: need at least 1")
    if not shift > 0:
        raise ValueError(f"shift={shift}: need a number above 0; 1 leaves the levels evenly spaced")
    steps = num_inference_steps
    return [shift_noise_level(1 - i / steps, shift) for i in range(steps + 1)]
