"""The video diffusion transformer: latents, noise levels and text in, flow velocity out.

The architecture of Wan 2.1 and 2.2 (arXiv 2503.20314) with two options that small models need: a 3x3
convolution at input and output, and an output that is a correction to the best linear guess. It never asks
for a rank or a file.
A forward is `condition`, `embed`, `run_layers`, `project`, `velocity`: a pipeline stage holds some of the
layers and does its part of these.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from vidgen.kernels.attention.api import attention_backend, check_name, current_backend
from vidgen.kernels.attention.windows import sliding_window_3d
from vidgen.kernels.denormals import flushing_denormals
from vidgen.kernels.modulate.api import norm_modulate
from vidgen.model.conditioning import Conditioning, without_repeats
from vidgen.model.context import Context, LayerKeyValues
from vidgen.model.dtypes import DTYPES, DType, cast
from vidgen.model.layer_run import Change, LayerRun
from vidgen.model.layers import (
    Attend,
    Block,
    ImageProjection,
    NoiseLevelEmbedding,
    Positions,
    TextProjection,
    random_rows,
)
from vidgen.model.part import Part
from vidgen.model.patches import add_linear_estimate, fold, unfold
from vidgen.model.region import Region
from vidgen.model.rope import rotations

# B batch, C latent channels, F latent frames, Y X latent rows and columns,
# S tokens per frame, N text tokens, D width, T text width, M image tokens, I image feature width


@dataclass(frozen=True, kw_only=True, slots=True)
class DiTConfig:
    """Sizes of a DiT. Wan 2.1 1.3B is width 1536, 30 layers, 12 heads, ffn 8960; 14B 5120, 40, 40, 13824."""

    latent_channels: int = 16
    width: int = 1536
    num_layers: int = 30
    num_heads: int = 12
    ffn_width: int = 8960
    text_width: int = 4096
    patch: tuple[int, int] = (2, 2)  # rows, columns of latents per token; a token is one latent frame deep
    num_frequencies: int = 256
    rope_theta: float = 10000.0
    eps: float = 1e-6
    window: tuple[int | None, int | None, int | None] | None = None  # radius in frames, token rows, columns
    convolutions: bool = False
    linear_skip: bool = False  # correct the linear estimate of clean latents; needs their variance
    condition_channels: int = 0  # given beside the latents, as its last input channels
    image_width: int | None = None  # of image features, which every layer attends to; None: it takes no image
    image_tokens: int = 0  # how many features an image has, or a first and a last one together
    image_positions: bool = False  # image features are numbered, so that first and last are told apart
    dtype: DType = "fp32"  # of weights and tokens; fp8: stored in it, computed in bf16

    def __post_init__(self) -> None:
        if (self.image_width is None) != (self.image_tokens == 0):
            raise ValueError(
                f"image_width={self.image_width}, image_tokens={self.image_tokens}: give both or neither"
            )
        if self.width % self.num_heads or (self.width // self.num_heads) % 2:
            raise ValueError(f"width={self.width}: need an even multiple of num_heads={self.num_heads}")


Grid = tuple[int, int, int]  # frames, rows, columns of tokens


class DiT(nn.Module):
    """A video DiT. Latents [B, C, F, Y, X] at noise levels [B, F] in [0, 1] to velocity of the same shape.

    Where the config has condition channels, they come after the latents' own; the velocity has none of them.
    """

    variance: Tensor

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        self.attention_backend: str | None = None
        width, (rows, columns) = config.width, config.patch
        kernel = 3 if config.convolutions else 1
        patch_channels = (config.latent_channels + config.condition_channels) * rows * columns
        self.patch_in = nn.Conv2d(patch_channels, width, kernel, padding=kernel // 2)
        self.text_in = TextProjection(config.text_width, width)
        self.noise_level = NoiseLevelEmbedding(config.num_frequencies, width)
        self.noise_modulation = nn.Linear(width, 6 * width)
        if config.image_width is not None:
            num_positions = config.image_tokens if config.image_positions else 0
            self.image_in = ImageProjection(config.image_width, width, num_positions)
        sizes = width, config.num_heads, config.ffn_width, config.eps, config.image_tokens
        self.layers = nn.ModuleList(Block(*sizes) for _ in range(config.num_layers))
        self.head_modulation = random_rows(2, width)
        self.patch_out = nn.Conv2d(width, self.out_channels, kernel, padding=kernel // 2)
        nn.init.zeros_(self.patch_out.weight)
        nn.init.zeros_(self.patch_out.bias)  # type: ignore[arg-type]
        if config.linear_skip:
            self.register_buffer("variance", torch.ones(config.latent_channels))
        if config.dtype != "fp32":
            cast(self, config.dtype)
        self._sort_weights()

    def to_empty(self, *, device: torch.device | str | int | None, recurse: bool = True) -> Self:
        """On the device, without values; as Module does it torch would import sympy, half a second."""
        self._apply(lambda t: torch.empty(t.shape, dtype=t.dtype, device=device), recurse=recurse)
        self._sort_weights()
        return self

    def _sort_weights(self) -> None:
        """Those of the projection as its input lies: oneDNN would sort them anew in each call."""
        if self.config.convolutions and hasattr(self, "patch_out") and not self.patch_out.weight.is_meta:
            self.patch_out.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(
        self,
        latents_BCFYX: Tensor,
        noise_level_BF: Tensor,
        text_BNT: Tensor,
        context: Context | None = None,
        image_BMI: Tensor | None = None,
    ) -> Tensor:
        """Velocity noise - clean, [B, C, F, Y, X], in the latents' dtype."""
        conditioning = self.condition(noise_level_BF, text_BNT, image_BMI)
        inputs = latents_BCFYX, noise_level_BF, text_BNT, context
        return self.forward_and_lend(*inputs, conditioning=conditioning, lends=False)[0]

    def forward_and_lend(
        self,
        latents_BCFYX: Tensor,
        noise_level_BF: Tensor,
        text_BNT: Tensor,
        context: Context | None = None,
        *,
        first_frame: int = 0,
        conditioning: Conditioning | None = None,
        attends: Sequence[Attend | LayerRun] | None = None,
        lends: bool = True,
        region: Region | None = None,
    ) -> tuple[Tensor, LayerKeyValues]:
        """(velocity of the frames from `first_frame` on, every layer's own keys and values of all frames).

        `conditioning` is what `condition` would make of the levels and the text, where it is known; `attends`
        are the layers' self-attentions, where they are not the plain ones, or all of how they are run;
        `region` are the tokens that run, where not all do.
        """
        conditioning = conditioning or self.condition(noise_level_BF, text_BNT)
        grid, context = self.token_grid(latents_BCFYX.shape), context or Context()
        x_BFSD, noise_BFD = self.embed(latents_BCFYX), conditioning.noise_BFD[:, first_frame:]
        if region is not None:
            x_BFSD, conditioning = region.cut(x_BFSD[:, first_frame:]), conditioning.frames(first_frame)
        x_BFSD, lent = self.run_layers(
            x_BFSD, conditioning, grid, context, attends, lends=lends, region=region
        )
        own_BFSD = x_BFSD if region is not None else x_BFSD[:, first_frame:]
        out = self.project(own_BFSD, noise_BFD, grid)
        return self.velocity(out, latents_BCFYX[:, :, first_frame:], noise_level_BF[:, first_frame:]), lent

    def condition(
        self, noise_level_BF: Tensor, text_BNT: Tensor, image_BMI: Tensor | None = None
    ) -> Conditioning:
        """What all layers share."""
        return Conditioning(*self.condition_noise(noise_level_BF), self.embed_text(text_BNT, image_BMI))

    def embed_text(self, text_BNT: Tensor, image_BMI: Tensor | None = None) -> Tensor:
        """Tokens [B, N, D] for cross-attention, the image's first.

        ValueError for image features that are not wanted, are missing, or are of another shape.
        """
        text_BNT = text_BNT.to(self.text_in.out.weight.dtype)
        kept, repeats = without_repeats(text_BNT)
        text_BND = self.text_in(text_BNT[:, :kept])
        # padding is the same to the last bit, which `run_layers` makes use of
        text_BND = torch.cat((text_BND, text_BND[:, -1:].expand(-1, repeats - 1, -1)), dim=1)
        if self.config.image_width is None and image_BMI is None:
            return text_BND
        wanted = (self.config.image_tokens, self.config.image_width or 0)
        found = None if image_BMI is None else tuple(image_BMI.shape[1:])
        if image_BMI is None or found != wanted:
            raise ValueError(
                f"image features of shape {found} per video: this model needs "
                f"{wanted if self.config.image_width else None}"
            )
        return torch.cat((self.image_in(image_BMI.to(text_BND.dtype)), text_BND), dim=1)

    def condition_noise(self, noise_level_BF: Tensor) -> tuple[Tensor, Tensor]:
        """(for the head [B, F, D], for the layers [B, F, 6, D])."""
        noise_BFD = self.noise_level(noise_level_BF).to(self.noise_modulation.weight.dtype)
        return noise_BFD, self.noise_modulation(silu(noise_BFD)).unflatten(-1, (6, -1))

    def token_grid(self, latents_shape: Sequence[int]) -> Grid:
        """(frames, rows, columns) of tokens of latents [B, C, F, Y, X]. ValueError if patches do not fit."""
        frames, rows, columns = latents_shape[2:]
        p, q = self.config.patch
        if rows % p or columns % q:
            raise ValueError(f"latents of {(rows, columns)}: need multiples of {(p, q)}")
        return frames, rows // p, columns // q

    def embed(self, latents_BCFYX: Tensor) -> Tensor:
        """Tokens [B, F, S, D] of latents and condition channels [B, C, F, Y, X]."""
        self.token_grid(latents_BCFYX.shape)
        batch, channels, frames, _, _ = latents_BCFYX.shape
        wanted = self.config.latent_channels + self.config.condition_channels
        if channels != wanted:
            raise ValueError(
                f"latents of {channels} channels: this model needs {wanted}, of which the last "
                f"{self.config.condition_channels} are given"
            )
        patched = fold(
            latents_BCFYX.to(self.patch_in.weight.dtype), self.config.patch
        )  # [B*F, C*p*q, Y/p, X/q]
        x_BFSD = self.patch_in(patched).flatten(2).transpose(1, 2).unflatten(0, (batch, frames))
        # contiguous: a stage that got these tokens as a message has them so, and sums depend on strides
        return x_BFSD.contiguous()

    def run_layers(
        self,
        x_BFSD: Tensor,
        conditioning: Conditioning,
        grid: Grid,
        context: Context,
        attends: Sequence[Attend | LayerRun] | None = None,
        *,
        lends: bool = True,
        part: Part | None = None,
        num_layers: int | None = None,
        region: Region | None = None,
    ) -> tuple[Tensor, LayerKeyValues]:
        """(tokens [B, F, S, D] after the layers at hand, each layer's own keys and values if it `lends`).

        Or after the first `num_layers` of them. With a `part`, tokens, conditioning and context are those of
        the part; the grid is the whole one's. With a `region`, tokens [B, F, A, D] and conditioning are those
        that run, of the own frames; after the model's last layer they are all of the own frames' tokens.
        """
        positions = self._positions(grid, context, x_BFSD.device, part, region)
        text_BND, log_weights_N = self._weighted(conditioning.text_BND, positions.backend)
        shared = conditioning.noise_BF6D, text_BND, positions
        lent = []
        # the backend is for `attends`
        with attention_backend(positions.backend), flushing_denormals(x_BFSD.device):
            for index, layer in enumerate(islice(self.layers, num_layers)):
                run = LayerRun() if attends is None else attends[index]
                run = run if isinstance(run, LayerRun) else LayerRun(run)
                if run.known is not None:
                    x_BFSD = x_BFSD + run.known.added_BFSD
                    if lends:
                        assert run.known.own is not None, "only what was kept can be lent again"
                        lent.append(run.known.own)
                    continue
                attend = run.attend
                if part is not None:
                    attend = part.around(
                        attend or positions.attend,
                        context.frames_before + grid[0] + context.frames_after,
                        query_frames=grid[0],
                        layout=positions.window,
                        is_plain=attend is None,
                    )
                before_BFSD, stale = x_BFSD, run.stale
                x_BFSD, own = layer(
                    x_BFSD,
                    *shared,
                    *context.layer(index),
                    attend,
                    log_weights_N,
                    **({} if stale is None else {"stale": stale.window}),
                )
                if stale is not None and stale.own_BFSD is not None:
                    assert region is not None
                    x_BFSD = region.fill(stale.own_BFSD, x_BFSD)
                if run.keep_stale is not None:
                    run.keep_stale(own, x_BFSD)
                if run.keep is not None:
                    run.keep(Change(x_BFSD - before_BFSD, own if lends else None))
                if lends:
                    lent.append(own)
        return x_BFSD, tuple(lent)

    def set_attention_backend(self, name: str) -> None:
        """All attention of this model by one backend, or `auto`. ValueError for a name that is neither."""
        self.attention_backend = check_name(name)

    def reset_attention_backend(self) -> None:
        """The first able backend again, whichever the device and the layout."""
        self.attention_backend = None

    def compile_layers(self) -> None:
        """Compile every layer where it is used first: faster after, equal up to rounding."""
        for layer in self.layers:
            layer.compile()

    def project(self, x_BFSD: Tensor, noise_BFD: Tensor, grid: Grid) -> Tensor:
        """What `velocity` needs of the last layer's tokens, [B*F, channels, rows, columns]."""
        shift, scale = (self.head_modulation + noise_BFD.float().unsqueeze(2)).unsqueeze(3).unbind(2)
        x_BFSD = norm_modulate(x_BFSD, scale, shift, self.config.eps)
        return self.patch_out(x_BFSD.flatten(0, 1).transpose(1, 2).unflatten(2, grid[1:]))

    def velocity(self, out: Tensor, latents_BCFYX: Tensor, noise_level_BF: Tensor) -> Tensor:
        """Velocity [B, C, F, Y, X] of the latents that `out` is the projection of, in their dtype."""
        latents_BCFYX = latents_BCFYX[:, : self.config.latent_channels]
        out = unfold(out, latents_BCFYX, self.config.patch).to(latents_BCFYX.dtype)
        if not self.config.linear_skip:
            return out
        return add_linear_estimate(out, latents_BCFYX, noise_level_BF, self.variance)

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Of its tokens."""
        return DTYPES[self.config.dtype]

    @property
    def out_channels(self) -> int:
        """Channels that `project` gives per token."""
        patch_channels = self.config.latent_channels * self.config.patch[0] * self.config.patch[1]
        return 2 * patch_channels if self.config.linear_skip else patch_channels  # correction, gain

    def _weighted(self, text_BND: Tensor, backend: str | None) -> tuple[Tensor, Tensor | None]:
        """(the tokens that layers attend to, log-weights of the text's among them if any stands for more).

        Wan pads a text to 512 tokens that are all seen. Padding is one token many times over, and attention
        to n equal tokens is attention to one whose logit is larger by log n.
        """
        images = self.config.image_tokens
        kept, repeats = without_repeats(text_BND[:, images:])
        if repeats == 1 or backend not in (None, "native"):
            return text_BND, None
        log_weights_N = torch.zeros(kept)
        log_weights_N[-1] = math.log(repeats)
        return text_BND[:, : images + kept], log_weights_N

    def _positions(
        self, grid: Grid, context: Context, device: torch.device, part: Part | None = None,
        region: Region | None = None,
    ) -> Positions:  # fmt: skip
        frames, rows, columns = grid
        first, key_frames = context.frames_before, context.frames_before + frames + context.frames_after
        head_width = self.config.width // self.config.num_heads
        cosines, sines = rotations((key_frames, rows, columns), head_width, self.config.rope_theta, device)
        window = None
        if self.config.window is not None:
            window = sliding_window_3d(
                grid=grid, radius=self.config.window, key_frames=key_frames, frame_offset=first
            ).on(device)
        tokens = rows * columns
        if part is not None:
            tokens = len(range(tokens)[part.tokens])
            cosines, sines = (
                turns.unflatten(0, (key_frames, rows * columns))[:, part.tokens].flatten(0, 1)
                for turns in (cosines, sines)
            )
            at_hand = range(frames)[part.frames or slice(None)]
            first, frames = first + at_hand.start, len(at_hand)
        own = slice(first * tokens, (first + frames) * tokens)
        backend = self.attention_backend or current_backend()
        turns = None if region is None else (region.turns(cosines[own]), region.turns(sines[own]))
        return Positions(cosines, sines, own, window, backend, region, turns)
