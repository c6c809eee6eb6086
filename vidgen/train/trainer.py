"""Flow-matching training of the built-in model: resumable, on a CPU or a CUDA device.

A run is a folder: `config.json`, `log.jsonl`, `latest.pt` (everything that resuming needs) and
`model.safetensors` (the averaged weights, ready for `vidgen`).
"""

import json
import os
import random
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vidgen.builtin import SmallModel, load_small
from vidgen.codec.dct import DctCodec, DctConfig
from vidgen.conditioning.text import WordEncoder, WordEncoderConfig
from vidgen.measure.report import measure_adherence
from vidgen.model.dit import DiT, DiTConfig
from vidgen.train.levels import draw_levels
from vidgen.train.muon import Muon
from vidgen.types import Recommended
from vidgen.world import WORLDS, draw_caption, render_clips


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """One training run. `latent_frames` and `clip_weights` say how long the clips are and how often."""

    world: str = "small"
    size: int = 32
    seed: int = 0
    start_from: str | None = None  # a checkpoint of the same sizes whose weights to begin with
    num_steps: int = 18500
    decay_share: float = 0.35  # of the steps, at the end, over which the learning rate falls to zero
    tokens_per_step: int = 1024
    latent_frames: tuple[int, ...] = (4, 8)
    clip_weights: tuple[float, ...] = (0.5, 0.5)
    width: int = 128
    num_layers: int = 6
    num_heads: int = 4
    codec_channels: int = 128
    rope_theta: float = 100.0
    matrix_rate: float = 0.02  # Muon's learning rate
    other_rate: float = 2e-3  # AdamW's
    text_rate: float = 5e-4  # AdamW's for the text path, whose GELU dies at a higher one
    warmup_steps: int = 200
    average_decay: float = 0.999
    caption_dropout: float = 0.1
    level_shift: float = 6.0
    queue_share: float = 0.4  # of the clips: noise rises block by block, as in a queue
    cut_share: float = 0.0  # of the clips: another scene begins or ends in them, as where a prompt changes
    pixel_weight: float = 0.0  # 0: all latent channels alike, 2: by their share of the pixels' energy
    compile: bool = True
    device: str = "cpu"
    save_every_s: float = 240.0
    log_every: int = 50
    measure_every: int = 2000  # steps; a multiple of log_every
    measured_prompts: int = 32


def build_model(config: TrainConfig) -> SmallModel:
    """A fresh model of the run's sizes, its codec fitted to the run's world."""
    torch.manual_seed(config.seed)
    codec = DctCodec(DctConfig(num_channels=config.codec_channels))
    rng = random.Random(config.seed)
    scenes = rng.choices(WORLDS[config.world].scenes(), k=256)
    codec.fit(render_clips(scenes, num_frames=16, size=config.size, rng=rng))
    dit = DiT(
        DiTConfig(
            latent_channels=config.codec_channels,
            width=config.width,
            num_layers=config.num_layers,
            num_heads=config.num_heads,
            ffn_width=4 * config.width,
            text_width=config.width,
            patch=(1, 1),
            rope_theta=config.rope_theta,
            convolutions=True,
            linear_skip=True,
        )
    )
    dit.variance.copy_(codec.variance)
    text = WordEncoder(WordEncoderConfig(content_words=WORLDS[config.world].words, width=config.width))
    return SmallModel(
        dit=dit, codec=codec, text=text, recommended=Recommended(height=config.size, width=config.size)
    )


def _start(config: TrainConfig) -> SmallModel:
    """A fresh model, or the one to start from. ValueError when that has other sizes or words."""
    model = build_model(config)
    if config.start_from is None:
        return model
    given = load_small(Path(config.start_from))
    for name, part in model.parts().items():
        if part.config != given.parts()[name].config:  # type: ignore[union-attr]
            raise ValueError(f"start_from={config.start_from}: its {name} has other sizes than this run")
        part.load_state_dict(given.parts()[name].state_dict())
    return model


class Trainer:
    """Holds a run's state: model, average, optimisers, step, random streams."""

    def __init__(self, config: TrainConfig, folder: Path) -> None:
        self.config, self.folder = config, folder
        self.device = torch.device(config.device)
        self.model, self.average = _start(config), _start(config)
        for part in (*self.model.parts().values(), *self.average.parts().values()):
            part.to(self.device)
        for part in self.average.parts().values():
            part.requires_grad_(False)
        self.optimisers = _optimisers(self.model, config)
        self.rates = [group["lr"] for optimiser in self.optimisers for group in optimiser.param_groups]
        self.rng = random.Random(config.seed)
        self.generator = torch.Generator().manual_seed(config.seed)
        # noise is most of what is drawn: on a GPU it is drawn there
        on_device = torch.Generator(self.device).manual_seed(config.seed)
        self.noise_generator = self.generator if self.device.type == "cpu" else on_device
        self.trained_scenes = WORLDS[config.world].split()[0]
        self.step, self.seconds = 0, 0.0
        if config.compile:
            for layer in self.model.dit.layers:
                layer.compile(dynamic=False)

    def run(
        self, report: Callable[[dict[str, Any]], None], should_stop: Callable[[], bool] = lambda: False
    ) -> None:
        """Train to `num_steps`, saving every few minutes; `report` gets each row of the log.

        When `should_stop` says so, save and return.
        """
        started, saved, losses = time.monotonic() - self.seconds, time.monotonic(), []
        while self.step < self.config.num_steps:
            losses.append(self.train_step())
            self.seconds = time.monotonic() - started
            if self.step % self.config.log_every == 0:
                row: dict[str, Any] = {
                    "step": self.step,
                    "loss": round(sum(losses) / len(losses), 5),
                    "rate": round(self._rate_factor(), 4),
                    "seconds": round(self.seconds, 1),
                }
                if self.step % self.config.measure_every == 0:
                    row["adherence"] = self.measure()
                losses.clear()
                with (self.folder / "log.jsonl").open("a") as log:
                    log.write(json.dumps(row) + "\n")
                report(row)
            stop = should_stop() or self.step == self.config.num_steps
            if stop or time.monotonic() - saved > self.config.save_every_s:
                self.save()
                saved = time.monotonic()
            if stop:
                return

    def measure(self) -> dict[str, str]:
        """Right clips of the averaged model, of trained and held-out prompts."""
        self.average.dit.eval()
        found = measure_adherence(
            self.average, num_prompts=self.config.measured_prompts, seed=0, world=self.config.world
        )
        return found["all"]

    def train_step(self) -> float:
        """One optimiser step on freshly drawn clips; the loss."""
        config = self.config
        for group, rate in zip(
            (group for optimiser in self.optimisers for group in optimiser.param_groups),
            self.rates,
            strict=True,
        ):
            group["lr"] = rate * self._rate_factor()
        loss = self.loss(*self.draw_batch())
        loss.backward()
        nn.utils.clip_grad_norm_([p for part in self.model.parts().values() for p in part.parameters()], 1.0)
        for optimiser in self.optimisers:
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        self.step += 1
        decay = min(config.average_decay, (1 + self.step) / (10 + self.step))
        for name, part in self.average.parts().items():
            targets: list[Tensor] = list(part.parameters())
            sources = list(self.model.parts()[name].parameters())
            if targets:
                torch._foreach_lerp_(targets, [source.detach() for source in sources], 1 - decay)
        return loss.item()

    def draw_batch(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """(clean latents, noise, noise levels, word numbers, frames that count [B, F]) of random clips."""
        config, codec = self.config, self.model.codec
        frames = self.rng.choices(config.latent_frames, config.clip_weights)[0]
        tokens = frames * (config.size // codec.spatial_stride) ** 2
        scenes = self.rng.choices(self.trained_scenes, k=max(1, config.tokens_per_step // tokens))
        captions = [
            "" if self.rng.random() < config.caption_dropout else draw_caption(s, self.rng) for s in scenes
        ]
        clean = codec.encode(
            render_clips(
                scenes,
                num_frames=frames * codec.temporal_stride,
                size=config.size,
                rng=self.rng,
                device=self.device,
            )
        )
        counts = self._cut(clean)
        noise = torch.randn(clean.shape, generator=self.noise_generator, device=self.device)
        levels = draw_levels(len(scenes), frames, config.level_shift, self.generator, config.queue_share).to(
            self.device
        )
        return clean, noise, levels, self.model.text.ids(captions).to(self.device), counts

    def _cut(self, clean_BCFYX: Tensor) -> Tensor:
        """Put frames of the next clip before or after some clips' own; 1 where frames are their own, [B, F].

        So a window looks where a prompt changes: its text tells of its own frames, which alone count.
        """
        num_clips, frames = clean_BCFYX.shape[0], clean_BCFYX.shape[2]
        counts = torch.ones(num_clips, frames, device=self.device)
        if not self.config.cut_share or min(num_clips, frames) < 2:
            return counts
        others = clean_BCFYX.roll(1, dims=0)
        for clip in range(num_clips):
            if self.rng.random() < self.config.cut_share:
                at = self.rng.randrange(1, frames)
                foreign = slice(0, at) if self.rng.random() < 0.5 else slice(at, frames)
                clean_BCFYX[clip, :, foreign] = others[clip, :, foreign]
                counts[clip, foreign] = 0
        return counts

    def loss(self, clean: Tensor, noise: Tensor, levels: Tensor, words: Tensor, counts: Tensor) -> Tensor:
        """Velocity error of the frames that count, weighted by channel with scale ** pixel_weight."""
        level = levels.view(levels.shape[0], 1, -1, 1, 1)
        mixed = (1 - level) * clean + level * noise
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            velocity = self.model.dit(mixed, levels, self.model.text(words))
        weight = self.model.codec.scale**self.config.pixel_weight
        weight = weight / weight.mean()
        error = ((velocity.float() - (noise - clean)).square() * weight.view(1, -1, 1, 1, 1)).mean((1, 3, 4))
        return (error * counts).sum() / counts.sum()

    def _rate_factor(self) -> float:
        """Warm-up, constant, then linear to zero."""
        config = self.config
        left = (config.num_steps - self.step) / max(1, config.decay_share * config.num_steps)
        return min(1.0, (self.step + 1) / config.warmup_steps, max(0.0, left))

    def save(self) -> None:
        """Write `latest.pt` and `model.safetensors`; a cut leaves the previous ones."""
        state = {
            "config": asdict(self.config),
            "step": self.step,
            "seconds": self.seconds,
            "model": {name: part.state_dict() for name, part in self.model.parts().items()},
            "average": {name: part.state_dict() for name, part in self.average.parts().items()},
            "optimisers": [optimiser.state_dict() for optimiser in self.optimisers],
            "rng": self.rng.getstate(),
            "generator": self.generator.get_state(),
            "noise_generator": self.noise_generator.get_state(),
        }
        torch.save(state, self.folder / "latest.tmp")
        os.replace(self.folder / "latest.tmp", self.folder / "latest.pt")
        self.average.training = {
            "config": asdict(self.config),
            "step": self.step,
            "seconds": round(self.seconds),
        }
        self.average.save(self.folder / "model.tmp")
        os.replace(self.folder / "model.tmp", self.folder / "model.safetensors")

    def restore(self) -> None:
        """Go on from `latest.pt`."""
        state = torch.load(self.folder / "latest.pt", map_location=self.device, weights_only=True)
        for models, name in ((self.model, "model"), (self.average, "average")):
            for part, tensors in state[name].items():
                models.parts()[part].load_state_dict(tensors)
        for optimiser, saved in zip(self.optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)
        self.rng.setstate(state["rng"])
        self.generator.set_state(state["generator"].cpu())
        if self.noise_generator is not self.generator:
            self.noise_generator.set_state(state["noise_generator"].cpu())
        self.step, self.seconds = state["step"], state["seconds"]


def _optimisers(model: SmallModel, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """Muon (arXiv 2502.16982) for the layers' matrices, AdamW for everything else."""
    matrices = [p for p in model.dit.layers.parameters() if p.ndim == 2 and min(p.shape) > 6]
    text = [*model.text.parameters(), *model.dit.text_in.parameters()]
    chosen = {id(p) for p in (*matrices, *text)}
    others = [p for p in model.dit.parameters() if id(p) not in chosen]
    groups = [{"params": others, "lr": config.other_rate}, {"params": text, "lr": config.text_rate}]
    return [
        Muon(matrices, lr=config.matrix_rate),
        torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]


def train(
    config: TrainConfig,
    folder: Path,
    report: Callable[[dict[str, Any]], None],
    should_stop: Callable[[], bool] = lambda: False,
) -> Trainer:
    """Start the run in `folder`, or go on with the one that is there. See Trainer.run."""
    folder.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(config, folder)
    if (folder / "latest.pt").exists():
        trainer.restore()
    (folder / "config.json").write_text(json.dumps(asdict(config), indent=2) + "\n")
    trainer.run(report, should_stop)
    return trainer
