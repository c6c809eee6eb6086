"""Training goes on where it stopped, and learns."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from vidgen.builtin import load_small
from vidgen.train.levels import draw_levels
from vidgen.train.trainer import TrainConfig, Trainer, train
from vidgen.world import WORLDS

SMALL: dict[str, Any] = {
    "width": 24,
    "num_layers": 1,
    "num_heads": 2,
    "codec_channels": 24,
    "tokens_per_step": 128,
    "latent_frames": (1, 2),
    "compile": False,
    "log_every": 1,
    "measure_every": 1000,
    "warmup_steps": 2,
}


def test_a_run_stopped_and_resumed_ends_in_the_same_weights(tmp_path: Path) -> None:
    config = TrainConfig(**SMALL, num_steps=6)
    whole = train(config, tmp_path / "whole", lambda row: None)
    steps = iter(range(100))
    train(config, tmp_path / "cut", lambda row: None, should_stop=lambda: next(steps) == 2)
    resumed = train(config, tmp_path / "cut", lambda row: None)
    assert resumed.step == whole.step == 6
    for name, tensor in whole.average.dit.state_dict().items():
        assert torch.equal(tensor, resumed.average.dit.state_dict()[name]), name


def test_it_learns(tmp_path: Path) -> None:
    trainer = Trainer(TrainConfig(**SMALL, num_steps=1000), tmp_path)
    batches = [trainer.draw_batch() for _ in range(8)]

    def mean_loss() -> float:
        with torch.no_grad():
            return sum(trainer.loss(*batch).item() for batch in batches) / len(batches)

    before = mean_loss()
    for _ in range(120):
        trainer.train_step()
    assert mean_loss() < 0.85 * before


def test_the_log_has_loss_and_adherence_and_the_model_says_how_it_was_made(tmp_path: Path) -> None:
    settings = {**SMALL, "measure_every": 2, "measured_prompts": 2}
    train(TrainConfig(**settings, num_steps=2), tmp_path, lambda row: None)
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 2 and "loss" in rows[-1]
    assert set(rows[-1]["adherence"]) == {"colour", "shape", "motion", "background", "all"}
    model = load_small(tmp_path / "model.safetensors")
    assert model.training["step"] == 2 and model.training["config"]["world"] == "small"


def test_a_run_may_start_from_a_checkpoint_of_its_sizes(tmp_path: Path) -> None:
    first = train(TrainConfig(**SMALL, num_steps=2), tmp_path / "first", lambda row: None)
    given = str(tmp_path / "first" / "model.safetensors")
    second = Trainer(TrainConfig(**SMALL, num_steps=2, start_from=given), tmp_path / "second")
    for name, tensor in first.average.dit.state_dict().items():
        assert torch.allclose(tensor, second.model.dit.state_dict()[name], atol=1e-3), name
    with pytest.raises(ValueError, match="start_from=.*other sizes"):
        Trainer(TrainConfig(**{**SMALL, "width": 32}, num_steps=2, start_from=given), tmp_path / "third")


def test_held_out_scenes_are_never_drawn(tmp_path: Path) -> None:
    trainer = Trainer(TrainConfig(**SMALL, num_steps=1), tmp_path)
    held_out = WORLDS["small"].split()[1]
    assert len(held_out) >= 64
    assert not set(trainer.trained_scenes) & set(held_out)


@pytest.mark.parametrize("shift", [1.0, 6.0])
def test_levels_are_shared_rising_or_independent(shift: float) -> None:
    levels = draw_levels(4000, 8, shift, torch.Generator().manual_seed(0))
    assert levels.shape == (4000, 8) and levels.min() >= 0 and levels.max() <= 1
    steps = levels.diff(dim=1)
    shared = (steps == 0).all(1).float().mean().item()
    rising = (steps >= 0).all(1).float().mean().item() - shared
    assert abs(shared - 0.5) < 0.05 and abs(rising - 0.4) < 0.06


def test_a_cut_clip_counts_its_own_frames_only_and_keeps_them(tmp_path: Path) -> None:
    trainer = Trainer(TrainConfig(**SMALL, num_steps=1, cut_share=1.0), tmp_path)
    before = torch.randn(5, 24, 6, 4, 4)
    clean = before.clone()
    counts = trainer._cut(clean)
    for clip in range(5):
        own = counts[clip] == 1
        assert 0 < own.sum() < 6 and own.int().diff().abs().sum() == 1
        assert torch.equal(clean[clip][:, own], before[clip][:, own])
        assert torch.equal(clean[clip][:, ~own], before[clip - 1][:, ~own])
