"""The Python face: a model, and videos from it in memory.

engine = vidgen.Engine.from_pretrained("builtin")
frames = engine("a red circle moving left over a gray background", num_frames=257).frames[0]
for block in engine.stream(prompt, num_frames=257): ...
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from vidgen.config import JobConfig, LoraConfig, OffloadConfig, parse_job
from vidgen.denoise.given import Inputs
from vidgen.denoise.loop import denoise
from vidgen.families.family import Decoding, Family, Frames
from vidgen.families.opening import NO_OFFLOAD, open_model
from vidgen.model.dit import DiTConfig
from vidgen.planning import Plan, make_plan, resolve_job
from vidgen.sparsity.settings import SparsitySettings
from vidgen.stepcache.settings import CacheSettings
from vidgen.video import Callback, OutputType, Video, as_output, check_output_type, follow

GIVEN_PROMPT, GIVEN_NEGATIVE = "(given embeddings)", "(given negative embeddings)"


class Engine:
    """A loaded model. Calls are independent of each other; the same arguments give the same frames."""

    def __init__(self, family: Family) -> None:
        self.family = family
        self.sparsity, self.cache = SparsitySettings(), CacheSettings()
        self._is_compiled = False

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path = "builtin",
        *,
        dtype: str | torch.dtype | None = None,
        device: str = "cpu",
        loras: Sequence[LoraConfig | str | Path] = (),
        tile: int | None = None,
        offload: OffloadConfig = NO_OFFLOAD,
        text_cache: Path | None = None,
        with_dit: bool = True,
    ) -> Self:
        """The model of that name, file or folder. ValueError in one line when there is none.

        `dtype` is torch's or one of fp32, bf16, fp16, fp8. Without its DiT it can plan, encode and decode,
        and ranks read the DiT's layers for themselves.
        """
        named = {"dtype": _dtype_name(dtype), "loras": [_lora(lora) for lora in loras], "tile": tile}
        settings = parse_job({"model": str(path), **named}, "from_pretrained")
        family = open_model(
            settings.model, dtype=settings.dtype, loras=settings.loras, tile=settings.tile,
            offload=offload, text_cache=text_cache,
        )  # fmt: skip
        engine = cls(family)
        if with_dit:
            engine.load_dit(device)
        return engine

    @property
    def config(self) -> DiTConfig:
        """The DiT's sizes."""
        return self.family.dits[0].config

    def load_dit(self, device: str) -> None:
        """Read the DiT's weights onto a device, if that was left out at first."""
        if self.family.dits[0].device.type == "meta":
            self.family.load_dits(device)

    def compile(self) -> None:
        """Compile the DiT's layers, once: faster steps after a slower first one."""
        if not self._is_compiled:
            self._is_compiled = True
            for dit in self.family.dits:
                dit.compile_layers()

    def sha256(self) -> str:
        """Of the checkpoint: what a job remembers of its model."""
        return self.family.sha256()

    def __call__(
        self,
        prompt: str | None = None,
        *,
        generator: torch.Generator | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        image: Any = None,
        last_image: Any = None,
        output_type: OutputType = "np",
        callback_on_step_end: Callback | None = None,
        **settings: Any,
    ) -> Video:
        """A whole video, as diffusers' pipelines give it: `.frames[0]` are its frames.

        `frames` is float [1, F, H, W, 3] in [0, 1] ("np"), [1, F, 3, H, W] ("pt"), a list with a list of
        pictures ("pil"), or clean latents [1, C, F, Y, X] ("latent"). `settings` are those of a job file
        (vidgen/config.py). `latents` are the noise, [1, C, F, Y, X]; with a `generator` it is drawn from
        that, all at once; else from `seed`, block by block. Embeddings [1, N, T] take the place of texts.
        `callback_on_step_end(engine, step, timestep, {"latents": ...})` is called after every step of every
        block, with its block's latents, and may give others back.
        """
        check_output_type(output_type)
        embeds = {GIVEN_PROMPT: prompt_embeds, GIVEN_NEGATIVE: negative_prompt_embeds}
        plan = self._plan_of(
            prompt, settings, image=image, last_image=last_image,
            embeds={name: embed for name, embed in embeds.items() if embed is not None},
        )  # fmt: skip
        if latents is None and generator is not None:
            latents = torch.randn(plan.latents_shape, generator=generator, device=generator.device)
        if latents is not None:
            plan = plan.with_noise(latents)
        told = callback_on_step_end
        finished = denoise(plan.task) if told is None else follow(self, plan.task, told)
        clean = torch.cat([block.latents_BCFYX for block in finished], dim=2)
        if output_type == "latent":
            return Video(frames=clean)
        pixels = self.family.codec().stream().decode(clean)
        return as_output(pixels[:, :, : plan.job.num_frames], output_type)

    def stream(self, prompt: str | None = None, **settings: Any) -> Iterator[Frames]:
        """Frames [F, H, W, 3], uint8, of each block as soon as it is clean; all together `num_frames`."""
        plan = self._plan_of(prompt, settings)
        decode = self.decoder()
        return (plan.cut(decode(done.latents_BCFYX), done.block) for done in denoise(plan.task))

    def decoder(self, warm_up: Tensor | None = None) -> Decoding:
        """What turns the latents of one block after the other into frames; see Family.load_decode."""
        return Decoding(self.family.codec(), warm_up)

    def plan(self, job: JobConfig, inputs: Inputs | None = None) -> Plan:
        """Everything that decides the video. ValueError in one line for a job that this model cannot do.

        `inputs` are what a plan of this very job had before.
        """
        return make_plan(self.family, resolve_job(self.family, job, self.sparsity, self.cache), inputs)

    def _plan_of(self, prompt: str | None, settings: dict[str, Any], **given: Any) -> Plan:
        """The plan of a call's arguments; embeddings have names in the place of their texts."""
        embeds = given.get("embeds", {})
        named: dict[str, Any] = {"prompt": prompt} if prompt is not None else {}
        if prompt is None and GIVEN_PROMPT in embeds:
            named["prompt"] = GIVEN_PROMPT
        if GIVEN_NEGATIVE in embeds:
            named["negative_prompt"] = GIVEN_NEGATIVE
        job = resolve_job(self.family, parse_job({**named, **settings}), self.sparsity, self.cache)
        if job.compile:
            self.compile()
        return make_plan(self.family, job, **given)

    def enable_sparsity(self, **settings: Any) -> None:
        """Sparse attention for all jobs from here on that say nothing of their own. See SparsitySettings.

        ValueError for settings that cannot be, or when it is enabled already.
        """
        if self.sparsity.policy != "none":
            raise ValueError(
                f"sparsity is enabled already ({self.sparsity.policy}): call disable_sparsity() first"
            )
        self.sparsity = parse_job({"attention": {"sparsity": settings}}).attention.sparsity

    def disable_sparsity(self) -> None:
        """Dense attention again."""
        self.sparsity = SparsitySettings()

    def enable_cache(self, config: CacheSettings | None = None, **settings: Any) -> None:
        """A step cache for all jobs from here on that say nothing of their own: of a config, or by settings.

        ValueError for settings that cannot be, or when one is enabled already. See CacheSettings.
        """
        if self.cache.method != "none":
            raise ValueError(f"a cache is enabled already ({self.cache.method}): call disable_cache() first")
        if config is not None and settings:
            raise ValueError(f"a config and {', '.join(settings)} are given: give one of them")
        cache = config or parse_job({"cache": settings}).cache
        if cache.method == "none":
            raise ValueError("method=none: name a method, or leave the cache disabled")
        self.cache = cache

    def disable_cache(self) -> None:
        """Every step runs again."""
        self.cache = CacheSettings()


def _dtype_name(dtype: str | torch.dtype | None) -> str | None:
    names = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
    return names.get(dtype, str(dtype)) if isinstance(dtype, torch.dtype) else dtype


def _lora(lora: LoraConfig | str | Path) -> Any:
    return lora.model_dump() if isinstance(lora, LoraConfig) else str(lora)
