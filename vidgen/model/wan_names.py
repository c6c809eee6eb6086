"""What the tensors of Wan's transformers are called: here, in diffusers, and in Wan's own files.

Sources: github.com/Wan-Video/Wan2.1 and Wan2.2 (wan/modules/model.py), diffusers' transformer_wan.py. One row
a tensor; a layer's rows have {} for its number.
"""

from dataclasses import dataclass, replace
from enum import Enum, auto
from math import prod
from typing import Literal

from torch import Tensor

from vidgen.model.dit import DiTConfig

# C latent channels, D width; a patch is p rows by q columns of latents

Format = Literal["diffusers", "native"]
Shape = tuple[int, ...]


class Form(Enum):
    """How a tensor of the files lies, where ours lies otherwise."""

    SAME = auto()
    TABLE = auto()  # [1, ...ours]
    PATCH_IN = (
        auto()
    )  # a convolution over patches [D, C, 1, p, q]; ours runs over folded ones [D, C*p*q, 1, 1]
    PATCH_OUT = auto()  # rows of (p, q, C); ours are [C*p*q, D, 1, 1], or [C*p*q]


@dataclass(frozen=True, kw_only=True, slots=True)
class Name:
    """One tensor. Both file formats have it in the same form."""

    ours: str
    diffusers: str
    native: str
    form: Form = Form.SAME

    def of(self, format: Format) -> str:
        """Its name in files of a format."""
        return self.diffusers if format == "diffusers" else self.native

    def at(self, layer: int) -> "Name":
        """The same in that layer."""
        return replace(
            self,
            ours=self.ours.format(layer),
            diffusers=self.diffusers.format(layer),
            native=self.native.format(layer),
        )


def file_shape(form: Form, shape: Shape, patch: tuple[int, int]) -> Shape:
    """The shape in a file of a tensor that has this one here."""
    if form is Form.TABLE:
        return (1, *shape)
    if form is Form.PATCH_IN:
        return (shape[0], shape[1] // prod(patch), 1, *patch)
    return shape[:2] if form is Form.PATCH_OUT else shape


def to_file(form: Form, ours: Tensor, patch: tuple[int, int]) -> Tensor:
    """The tensor as files have it."""
    shape = file_shape(form, tuple(ours.shape), patch)
    if form is Form.PATCH_OUT:
        ours = ours.unflatten(0, (-1, *patch)).movedim(0, 2)
    return ours.reshape(shape)


def from_file(form: Form, theirs: Tensor, shape: Shape, patch: tuple[int, int]) -> Tensor:
    """The tensor as it lies here, of this shape."""
    if form is Form.PATCH_OUT:
        theirs = theirs.unflatten(0, (*patch, -1)).movedim(2, 0)
    return theirs.reshape(shape)


def keeps_order(form: Form) -> bool:
    """Whether the values of a file come in the order of ours, so that only shapes differ."""
    return form is not Form.PATCH_OUT


def names(config: DiTConfig) -> list[Name]:
    """The rows of a transformer of that config, layer by layer at the end."""
    has_image = config.image_width is not None
    rows = [*MODEL, *(IMAGE if has_image else ()), *(POSITIONS if config.image_positions else ())]
    layer_rows = [*LAYER, *(LAYER_IMAGE if has_image else ())]
    return rows + [row.at(layer) for layer in range(config.num_layers) for row in layer_rows]


def _pair(ours: str, diffusers: str, native: str) -> list[Name]:
    """The weight and the bias of a module."""
    return [_weight(ours, diffusers, native), _name(f"{ours}.bias", f"{diffusers}.bias", f"{native}.bias")]


def _weight(ours: str, diffusers: str, native: str) -> Name:
    return _name(f"{ours}.weight", f"{diffusers}.weight", f"{native}.weight")


def _name(ours: str, diffusers: str, native: str, form: Form = Form.SAME) -> Name:
    return Name(ours=ours, diffusers=diffusers, native=native, form=form)


def _attention(ours: str, diffusers: str, native: str) -> list[Name]:
    return [
        *_pair(f"{ours}.query", f"{diffusers}.to_q", f"{native}.q"),
        *_pair(f"{ours}.key", f"{diffusers}.to_k", f"{native}.k"),
        *_pair(f"{ours}.value", f"{diffusers}.to_v", f"{native}.v"),
        *_pair(f"{ours}.out", f"{diffusers}.to_out.0", f"{native}.o"),
        _weight(f"{ours}.query_norm", f"{diffusers}.norm_q", f"{native}.norm_q"),
        _weight(f"{ours}.key_norm", f"{diffusers}.norm_k", f"{native}.norm_k"),
    ]


EMBEDDER = "condition_embedder"
MODEL = [
    _name("patch_in.weight", "patch_embedding.weight", "patch_embedding.weight", Form.PATCH_IN),
    _name("patch_in.bias", "patch_embedding.bias", "patch_embedding.bias"),
    *_pair("text_in.hidden", f"{EMBEDDER}.text_embedder.linear_1", "text_embedding.0"),
    *_pair("text_in.out", f"{EMBEDDER}.text_embedder.linear_2", "text_embedding.2"),
    *_pair("noise_level.hidden", f"{EMBEDDER}.time_embedder.linear_1", "time_embedding.0"),
    *_pair("noise_level.out", f"{EMBEDDER}.time_embedder.linear_2", "time_embedding.2"),
    *_pair("noise_modulation", f"{EMBEDDER}.time_proj", "time_projection.1"),
    _name("head_modulation", "scale_shift_table", "head.modulation", Form.TABLE),
    _name("patch_out.weight", "proj_out.weight", "head.head.weight", Form.PATCH_OUT),
    _name("patch_out.bias", "proj_out.bias", "head.head.bias", Form.PATCH_OUT),
]
IMAGE = [
    *_pair("image_in.norm_in", f"{EMBEDDER}.image_embedder.norm1", "img_emb.proj.0"),
    *_pair("image_in.hidden", f"{EMBEDDER}.image_embedder.ff.net.0.proj", "img_emb.proj.1"),
    *_pair("image_in.out", f"{EMBEDDER}.image_embedder.ff.net.2", "img_emb.proj.3"),
    *_pair("image_in.norm_out", f"{EMBEDDER}.image_embedder.norm2", "img_emb.proj.4"),
]
POSITIONS = [
    _name("image_in.positions", f"{EMBEDDER}.image_embedder.pos_embed", "img_emb.emb_pos", Form.TABLE)
]
LAYER = [
    _name("layers.{}.modulation", "blocks.{}.scale_shift_table", "blocks.{}.modulation", Form.TABLE),
    *_attention("layers.{}.self_attention", "blocks.{}.attn1", "blocks.{}.self_attn"),
    *_pair("layers.{}.cross_norm", "blocks.{}.norm2", "blocks.{}.norm3"),
    *_attention("layers.{}.cross_attention", "blocks.{}.attn2", "blocks.{}.cross_attn"),
    *_pair("layers.{}.feed_forward.up", "blocks.{}.ffn.net.0.proj", "blocks.{}.ffn.0"),
    *_pair("layers.{}.feed_forward.down", "blocks.{}.ffn.net.2", "blocks.{}.ffn.2"),
]
LAYER_IMAGE = [
    *_pair("layers.{}.cross_attention.image_key", "blocks.{}.attn2.add_k_proj", "blocks.{}.cross_attn.k_img"),
    *_pair(
        "layers.{}.cross_attention.image_value", "blocks.{}.attn2.add_v_proj", "blocks.{}.cross_attn.v_img"
    ),
    _weight(
        "layers.{}.cross_attention.image_key_norm",
        "blocks.{}.attn2.norm_added_k",
        "blocks.{}.cross_attn.norm_k_img",
    ),
]
# In some files and used by no model: a norm of image queries; scales of activations for FP8 arithmetic, which
# is not what we compute in, and the mark of such files.
IGNORED = (".norm_added_q.", ".norm_q_img.", ".scale_input", ".input_scale", "scaled_fp8")
PREFIXES = ("model.diffusion_model.", "diffusion_model.")  # of all names in single files of other programs
FP8_SCALES = (
    "scale_weight",
    "weight_scale",
)  # in place of `weight`: what an FP8 weight is to be multiplied with


def is_ignored(name: str) -> bool:
    """Whether files may have this tensor though the model has none."""
    return any(part in f".{name}" for part in IGNORED)
