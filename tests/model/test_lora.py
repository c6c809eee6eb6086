"""Laws of LoRAs: merged as they are read, they are what diffusers and peft make of them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from vidgen.bench.random_wan import make_transformer
from vidgen.families.wan_folder import read_json
from vidgen.model.dit import DiT, DiTConfig
from vidgen.model.dtypes import FP8, quantise
from vidgen.model.lora import Lora
from vidgen.model.wan import dit_config
from vidgen.model.wan_names import names
from vidgen.model.weights import WanWeights

RANK, ALPHA = 3, 1.5
Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with two experts."""
    root = tmp_path_factory.mktemp("wan")
    torch.manual_seed(1)
    for name in ("transformer", "transformer_2"):
        make_transformer("t2v").save_pretrained(root / name)
    return root


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that attends to images, of one expert."""
    root = tmp_path_factory.mktemp("wan-i2v")
    torch.manual_seed(1)
    make_transformer("i2v").save_pretrained(root / "transformer")
    return root


def config_of(transformer: Path, dtype: str = "fp32") -> DiTConfig:
    return dit_config(read_json(transformer / "config.json"), dtype=dtype)


def read(transformer: Path, *loras: Lora, dtype: str = "fp32", only: str = "") -> Tensors:
    """A DiT's tensors with LoRAs merged in."""
    config = config_of(transformer, dtype)
    with torch.device("meta"):
        dit = DiT(config)
    into = {n: torch.empty_like(t, device="cpu") for n, t in dit.state_dict().items() if only in n}
    WanWeights(transformer, "diffusers", config, loras).read(into)
    return into


def run(transformer: Path, tensors: Tensors) -> Tensor:
    """The velocity of a DiT with these tensors."""
    config = config_of(transformer)
    dit = DiT(config).eval()
    dit.load_state_dict(tensors)
    with torch.inference_mode():
        return dit(*inputs(config), image_BMI=image(config))


def inputs(config: DiTConfig) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(4)
    channels = config.latent_channels + config.condition_channels
    return torch.randn(1, channels, 3, 6, 4), torch.full((1, 3), 0.6), torch.randn(1, 512, config.text_width)


def image(config: DiTConfig) -> Tensor | None:
    if config.image_width is None:
        return None
    return torch.randn(1, config.image_tokens, config.image_width, generator=torch.Generator().manual_seed(8))


def theirs(transformer: Path, files: list[Path], scales: list[float], **settings: Any) -> Tensor:
    """The velocity of diffusers' model with the files as its adapters."""
    from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
    from diffusers.pipelines.wan.pipeline_wan import WanPipeline
    from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler

    model = WanTransformer3DModel.from_pretrained(transformer).eval()
    parts: dict[str, Any] = dict.fromkeys(("tokenizer", "text_encoder", "vae"))
    parts |= {"transformer": model, "scheduler": UniPCMultistepScheduler()}
    if settings:
        parts |= {"transformer": WanTransformer3DModel.from_pretrained(transformer), "transformer_2": model}
    pipeline: Any = WanPipeline(**parts)
    for index, file in enumerate(files):
        pipeline.load_lora_weights(file.parent, weight_name=file.name, adapter_name=f"a{index}", **settings)
    pipeline.set_adapters([f"a{index}" for index in range(len(files))], scales)
    config = config_of(transformer)
    latents, levels, text = inputs(config)
    with torch.inference_mode():
        return model(latents, levels[:, 0] * 1000, text, image(config), return_dict=False)[0]


def linears(transformer: Path, format: str, kinds: tuple[str, ...] = ()) -> dict[str, tuple[int, ...]]:
    """Shapes of the layers' Linears by a format's names without `.weight`; of some kinds, or all."""
    rows = names(config_of(transformer))
    shapes = {name: tuple(tensor.shape) for name, tensor in stored(transformer).items()}
    found = {}
    for row in rows:
        if row.ours.startswith("layers") and len(shapes[row.diffusers]) == 2 and row.ours.endswith(".weight"):
            name = (row.diffusers if format == "diffusers" else row.native).removesuffix(".weight")
            if not kinds or any(kind in name for kind in kinds):
                found[name] = shapes[row.diffusers]
    return found


def stored(transformer: Path) -> Tensors:
    return load_file(transformer / "diffusion_pytorch_model.safetensors")


def pair(shape: tuple[int, ...], down: str, up: str, rank: int = RANK) -> Tensors:
    return {down: torch.randn(rank, shape[1]) * 0.3, up: torch.randn(shape[0], rank) * 0.3}


def diffusers_file(
    transformer: Path, *, prefix: str = "transformer.", kinds: tuple[str, ...] = ()
) -> Tensors:
    found: Tensors = {}
    for index, (name, shape) in enumerate(linears(transformer, "diffusers", kinds).items()):
        name = prefix + name
        found |= pair(shape, f"{name}.lora_A.weight", f"{name}.lora_B.weight", RANK + index % 2)
    return found


def native_file(transformer: Path, *, alpha: bool = True, bias: bool = True) -> Tensors:
    found: Tensors = {}
    for name, shape in linears(transformer, "native").items():
        name = f"diffusion_model.{name}"
        found |= pair(shape, f"{name}.lora_down.weight", f"{name}.lora_up.weight")
        found |= {f"{name}.alpha": torch.tensor(ALPHA)} if alpha else {}
        found |= {f"{name}.diff_b": torch.randn(shape[0]) * 0.1} if bias else {}
    return found


def native_peft_file(transformer: Path) -> Tensors:
    found: Tensors = {}
    for name, shape in linears(transformer, "native").items():
        found |= pair(shape, f"diffusion_model.{name}.lora_A.weight", f"diffusion_model.{name}.lora_B.weight")
    return found


def kohya_file(transformer: Path) -> Tensors:
    found: Tensors = {}
    for name, shape in linears(transformer, "native").items():
        name = "lora_unet_" + name.replace(".", "_")
        found |= pair(shape, f"{name}.lora_down.weight", f"{name}.lora_up.weight")
        found[f"{name}.alpha"] = torch.tensor(ALPHA)
    return found


MAKERS: dict[str, Callable[..., Tensors]] = {
    "diffusers": diffusers_file,
    "native": native_file,
    "native-peft": native_peft_file,
    "kohya": kohya_file,
}


def write(path: Path, tensors: Tensors, metadata: dict[str, Any] | None = None) -> Path:
    save_file(
        tensors, path, {"lora_adapter_metadata": json.dumps(metadata)} if metadata else {"format": "pt"}
    )
    return path


def error(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("has_image", [False, True], ids=["text", "image"])
def test_merged_is_what_diffusers_adapters_give(
    kind: str, has_image: bool, folder: Path, image_folder: Path, tmp_path: Path
):
    transformer = (image_folder if has_image else folder) / "transformer"
    torch.manual_seed(9)
    file = write(tmp_path / "lora.safetensors", MAKERS[kind](transformer))
    expected = theirs(transformer, [file], [0.7])
    assert error(run(transformer, read(transformer, Lora(file, 0.7))), expected) <= 1e-5
    assert error(run(transformer, read(transformer)), expected) > 1e-2


@pytest.mark.filterwarnings(
    "ignore:Already found a `peft_config` attribute:UserWarning"
)  # peft on a second file
def test_several_are_summed_each_by_its_scale(folder: Path, tmp_path: Path):
    transformer = folder / "transformer"
    torch.manual_seed(9)
    files = [
        write(tmp_path / "a.safetensors", diffusers_file(transformer, kinds=("attn1", "ffn"))),
        write(tmp_path / "b.safetensors", native_file(transformer)),
        write(tmp_path / "c.safetensors", kohya_file(transformer)),
    ]
    scales = [0.5, -0.3, 1.0]
    expected = theirs(transformer, files, scales)
    loras = [Lora(file, scale) for file, scale in zip(files, scales, strict=True)]
    assert error(run(transformer, read(transformer, *loras)), expected) <= 1e-5


@pytest.mark.parametrize("rslora", [False, True], ids=["plain", "rank-stabilised"])
def test_pefts_settings_in_the_header_count(rslora: bool, folder: Path, tmp_path: Path):
    transformer = folder / "transformer"
    torch.manual_seed(9)
    tensors = {
        key: tensor
        for name, shape in linears(transformer, "diffusers", ("to_q", "to_k")).items()
        for key, tensor in pair(
            shape, f"transformer.{name}.lora_A.weight", f"transformer.{name}.lora_B.weight"
        ).items()
    }
    settings = {
        "r": RANK, "lora_alpha": 7, "alpha_pattern": {"blocks.1.attn1.to_q": 2, "attn2.to_k": 11},
        "rank_pattern": {}, "target_modules": ["to_q", "to_k"], "use_rslora": rslora,
    }  # fmt: skip
    metadata = {f"transformer.{key}": value for key, value in settings.items()}
    file = write(tmp_path / "lora.safetensors", tensors, metadata)
    found = run(transformer, read(transformer, Lora(file)))
    assert error(found, theirs(transformer, [file], [1.0])) <= 1e-5


def test_a_file_with_both_experts_gives_each_its_own(folder: Path, tmp_path: Path):
    first, second = folder / "transformer", folder / "transformer_2"
    torch.manual_seed(9)
    parts = [diffusers_file(first), diffusers_file(second, prefix="transformer_2.")]
    file = write(tmp_path / "both.safetensors", parts[0] | parts[1])
    alone = write(tmp_path / "first.safetensors", parts[0])
    renamed = {name.replace("transformer_2.", "transformer."): tensor for name, tensor in parts[1].items()}
    other = write(tmp_path / "second.safetensors", renamed)
    for transformer, own in ((first, alone), (second, other)):
        expected = read(transformer, Lora(own))
        assert all(torch.equal(t, expected[n]) for n, t in read(transformer, Lora(file)).items())


def test_a_file_of_one_part_changes_the_experts_it_is_given_to(folder: Path, tmp_path: Path):
    torch.manual_seed(9)
    file = write(tmp_path / "lora.safetensors", diffusers_file(folder / "transformer"))
    for index, transformer in enumerate((folder / "transformer", folder / "transformer_2")):
        plain = run(transformer, read(transformer))
        changed = theirs(transformer, [file], [1.0], **({"load_into_transformer_2": True} if index else {}))
        for expert, reaches in (("both", True), ("first", index == 0), ("second", index == 1)):
            found = run(transformer, read(transformer, Lora(file, 1.0, expert)))  # type: ignore[arg-type]
            assert error(found, changed if reaches else plain) <= 1e-5, expert


def test_whole_differences_of_weights_norms_and_tables_are_added(folder: Path, tmp_path: Path):
    transformer = folder / "transformer"
    plain = read(transformer)
    torch.manual_seed(9)
    tensors = {
        "diffusion_model.blocks.1.norm3.diff": torch.randn(24),
        "diffusion_model.blocks.1.norm3.diff_b": torch.randn(24),
        "diffusion_model.blocks.0.diff_m": torch.randn(1, 6, 24),
        "diffusion_model.blocks.2.modulation.diff": torch.randn(1, 6, 24),
        "diffusion_model.head.head.diff": torch.randn(64, 24),
        "diffusion_model.head.head.diff_b": torch.randn(64),
        "diffusion_model.patch_embedding.diff": torch.randn(24, 16, 1, 2, 2),
    }
    found = read(transformer, Lora(write(tmp_path / "lora.safetensors", tensors), 0.5))
    targets = {
        "layers.1.cross_norm.weight", "layers.1.cross_norm.bias", "layers.0.modulation",
        "layers.2.modulation", "patch_out.weight", "patch_out.bias", "patch_in.weight",
    }  # fmt: skip
    for name, tensor in found.items():
        assert torch.equal(tensor, plain[name]) == (name not in targets), name
    head = found["patch_out.bias"].view(16, 2, 2) - plain["patch_out.bias"].view(16, 2, 2)
    expected = tensors["diffusion_model.head.head.diff_b"].view(2, 2, 16).permute(2, 0, 1) * 0.5
    torch.testing.assert_close(head, expected)
    moved = found["patch_in.weight"] - plain["patch_in.weight"]
    torch.testing.assert_close(
        moved.flatten(), tensors["diffusion_model.patch_embedding.diff"].flatten() * 0.5
    )


def test_only_the_changes_of_tensors_that_are_read_are_computed(folder: Path, tmp_path: Path):
    transformer, config = folder / "transformer", config_of(folder / "transformer")
    file = write(tmp_path / "lora.safetensors", tensors := diffusers_file(transformer))
    weights = WanWeights(transformer, "diffusers", config, (Lora(file),))
    with torch.device("meta"):
        shapes = {n: t.shape for n, t in DiT(config).state_dict().items() if n.startswith("layers.1.")}
    count = weights.read({name: torch.empty(shape) for name, shape in shapes.items()})
    own = [
        t
        for n, t in (stored(transformer) | tensors).items()
        if n.removeprefix("transformer.")[:8] == "blocks.1"
    ]
    assert count == sum(tensor.nbytes for tensor in own)


@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
def test_sums_are_rounded_once(dtype: str, folder: Path, tmp_path: Path):
    """The change is added in fp32, then the weight becomes what the model stores."""
    transformer = folder / "transformer"
    lora = Lora(write(tmp_path / "lora.safetensors", native_file(transformer)), 0.3)
    exact, found = read(transformer, lora), read(transformer, lora, dtype=dtype)
    for name, tensor in found.items():
        if name.endswith(".scale"):
            continue
        expected = quantise(exact[name])[0] if tensor.dtype == FP8 else exact[name].to(tensor.dtype)
        assert torch.equal(tensor.float(), expected.float()), name
