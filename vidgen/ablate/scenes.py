"""What an ablation's videos show: its own prompts, or scenes of the built-in model's world."""

from vidgen.ablate.settings import AblationConfig
from vidgen.measure.report import pick_scenes


def prompts_of(config: AblationConfig) -> list[str]:
    """A prompt per video; given ones are repeated in turn.

    Scenes that the model was trained on and held-out ones alternate, so that more videos have the prompts of
    fewer, and further ones.
    """
    if config.prompts:
        return [config.prompts[index % len(config.prompts)] for index in range(config.videos)]
    scenes = [scene.caption() for scene in pick_scenes(config.videos, config.seed)]
    trained = (len(scenes) + 1) // 2
    return [scenes[index // 2 + trained * (index % 2)] for index in range(len(scenes))]
