"""Laws of the Wan VAE's files: the same codec from either format, sizes without weights, clear errors."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from vidgen.bench.random_wan import make_vae, randomise
from vidgen.codec.protocol import CodecSizes
from vidgen.codec.wan import load_wan_codec, wan_codec_sizes, wan_decode_bytes
from vidgen.codec.wan_files import ORIGINALS, diffusers_name, empty_vae

WEIGHTS = "vae/diffusion_pytorch_model.safetensors"
SIZES = {
    16: CodecSizes(temporal_stride=4, spatial_stride=8, num_channels=16, first_frames=1),
    48: CodecSizes(temporal_stride=4, spatial_stride=16, num_channels=48, first_frames=1),
}
PUBLISHED = {16: {"base_dim": 96}, 48: {"base_dim": 160, "decoder_base_dim": 256}}


def vae_of(channels: int) -> Any:
    """Random, as small as can be with the published depth."""
    from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan

    torch.manual_seed(0)
    widths = {"base_dim": 4, "decoder_base_dim": 4 if channels == 16 else 8}
    return randomise(AutoencoderKLWan(**{**ORIGINALS[channels], **widths})).eval()


@pytest.fixture(scope="module", params=SIZES, ids=["2.1", "2.2"])
def channels(request: pytest.FixtureRequest) -> int:
    return request.param


@pytest.fixture
def folder(channels: int, tmp_path: Path) -> Path:
    make_vae("t2v" if channels == 16 else "ti2v").save_pretrained(tmp_path / "vae")
    return tmp_path


def residual(original: str, ours: str, has_shortcut: bool) -> dict[str, str]:
    """A residual block's tensors: the original's places in a sequence, and diffusers' names."""
    places = {"residual.0.gamma": "norm1.gamma", "residual.3.gamma": "norm2.gamma"}
    convolutions = {"residual.2": "conv1", "residual.6": "conv2"}
    if has_shortcut:
        convolutions["shortcut"] = "conv_shortcut"
    for place, name in convolutions.items():
        places |= {f"{place}.{kind}": f"{name}.{kind}" for kind in ("weight", "bias")}
    return {f"{original}.{place}": f"{ours}.{name}" for place, name in places.items()}


def pairs(prefixes: dict[str, str]) -> dict[str, str]:
    return {f"{a}.{kind}": f"{b}.{kind}" for a, b in prefixes.items() for kind in ("weight", "bias")}


def names_outside_levels(side: str) -> dict[str, str]:
    middle = f"{side}.middle"
    return {
        **pairs({f"{side}.conv1": f"{side}.conv_in", f"{side}.head.2": f"{side}.conv_out"}),
        f"{side}.head.0.gamma": f"{side}.norm_out.gamma",
        f"{middle}.1.norm.gamma": f"{side}.mid_block.attentions.0.norm.gamma",
        **pairs(
            {f"{middle}.1.{part}": f"{side}.mid_block.attentions.0.{part}" for part in ("to_qkv", "proj")}
        ),
        **residual(f"{middle}.0", f"{side}.mid_block.resnets.0", False),
        **residual(f"{middle}.2", f"{side}.mid_block.resnets.1", False),
    }


def names_of_2_2() -> dict[str, str]:
    """Original name -> diffusers', as the modules of Wan2.2's vae2_2.py nest."""
    names = pairs({"conv1": "quant_conv", "conv2": "post_quant_conv"})
    for side, way, num_resnets, timed in (("encoder", "down", 2, (1, 2)), ("decoder", "up", 3, (0, 1))):
        names |= names_outside_levels(side)
        for level in range(4):
            original, ours = f"{side}.{way}samples.{level}.{way}samples", f"{side}.{way}_blocks.{level}"
            for part in range(num_resnets):
                # the only levels that change their width
                widens = part == 0 and level in ((1, 2) if way == "down" else (2, 3))
                names |= residual(f"{original}.{part}", f"{ours}.resnets.{part}", widens)
            if level < 3:
                names |= pairs({f"{original}.{num_resnets}.resample.1": f"{ours}.{way}sampler.resample.1"})
            if level in timed:
                names |= pairs({f"{original}.{num_resnets}.time_conv": f"{ours}.{way}sampler.time_conv"})
    return names


def test_names_of_2_2_are_those_of_the_original_modules_and_all_of_diffusers():
    names = names_of_2_2()
    assert {name: diffusers_name(name, ORIGINALS[48]) for name in names} == names
    expected = empty_vae({**ORIGINALS[48], **PUBLISHED[48]}).state_dict()
    assert sorted(names.values()) == sorted(expected)


def names_of_2_1() -> dict[str, str]:
    """Original name -> diffusers', by diffusers' own conversion."""
    from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

    names = (
        pairs({"conv1": "", "conv2": ""}) | names_outside_levels("encoder") | names_outside_levels("decoder")
    )
    for index in range(11):
        down = f"encoder.downsamples.{index}"
        if index % 3 < 2:
            names |= residual(down, "", index in (3, 6))
        else:
            names |= pairs({f"{down}.resample.1": ""} | ({f"{down}.time_conv": ""} if index > 2 else {}))
    for index in range(15):
        up = f"decoder.upsamples.{index}"
        if index % 4 < 3:
            names |= residual(up, "", index == 4)
        else:
            names |= pairs({f"{up}.resample.1": ""} | ({f"{up}.time_conv": ""} if index < 11 else {}))
    converted = convert_wan_vae_to_diffusers({name: name for name in names})
    return {original: name for name, original in converted.items()}


def test_names_of_2_1_are_those_of_diffusers_own_conversion():
    names = names_of_2_1()
    assert {name: diffusers_name(name, ORIGINALS[16]) for name in names} == names
    assert sorted(names.values()) == sorted(empty_vae({**ORIGINALS[16], **PUBLISHED[16]}).state_dict())


@pytest.mark.parametrize("ending", ["pth", "safetensors"])
def test_original_file_and_folder_give_the_same_codec(ending: str, channels: int, tmp_path: Path):
    vae = vae_of(channels)
    vae.save_pretrained(tmp_path / "vae")
    state, names = vae.state_dict(), names_of_2_1() if channels == 16 else names_of_2_2()
    original = {name: state[ours].contiguous() for name, ours in names.items()}
    file = tmp_path / f"Wan_VAE.{ending}"
    torch.save(original, file) if ending == "pth" else save_file(original, file)
    codecs = [load_wan_codec(path) for path in (tmp_path, tmp_path / "vae", file)]
    file.unlink()  # nothing is left to be read from it
    latents = torch.randn(1, channels, 2, 1, 1)
    decoded = [codec.decode(latents) for codec in codecs]
    assert decoded[0].std() > 0.1
    assert torch.equal(decoded[0], decoded[1])
    assert torch.equal(decoded[0], decoded[2])


def test_sizes_and_bytes_need_no_weights(folder: Path, channels: int):
    codec = load_wan_codec(folder)
    assert codec.sizes == SIZES[channels]
    expected = codec.decode_bytes(64, 96)
    (folder / WEIGHTS).unlink()
    assert wan_codec_sizes(folder) == wan_codec_sizes(folder / "vae") == SIZES[channels]
    assert wan_decode_bytes(folder, 64, 96) == expected
    half = wan_decode_bytes(folder, 64, 96, dtype=torch.bfloat16)
    assert 0.45 * expected < half < 0.75 * expected
    if channels == 16:  # the published settings of 2.1 are older than these
        file = folder / "vae/config.json"
        old = {k: v for k, v in json.loads(file.read_text()).items() if not k.startswith(("scale", "patch"))}
        file.write_text(json.dumps(old))
        assert wan_codec_sizes(folder) == SIZES[channels]


def test_sizes_of_an_original_file(channels: int, tmp_path: Path):
    names = names_of_2_1() if channels == 16 else names_of_2_2()
    shapes = {name: tensor.shape for name, tensor in vae_of(channels).state_dict().items()}
    file = tmp_path / "renamed.pth"
    torch.save({name: torch.zeros(shapes[ours]) for name, ours in names.items()}, file)
    assert wan_codec_sizes(file) == SIZES[channels]


@pytest.mark.parametrize("channels", SIZES)
def test_published_planning_is_of_a_believable_size(channels: int, tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps({**ORIGINALS[channels], **PUBLISHED[channels]}))
    whole = wan_decode_bytes(tmp_path, 480, 832)
    assert 4 * 2**30 < whole < 12 * 2**30
    tiled = wan_decode_bytes(tmp_path, 480, 832, tile=(256, 256), device="cuda")
    assert tiled < whole / 4


def rewrite(folder: Path, change: Any) -> None:
    tensors: dict[str, Tensor] = load_file(folder / WEIGHTS)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def test_tensors_that_do_not_fit_are_all_named_in_one_line(folder: Path):
    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors["decoder.tail"] = tensors.pop("decoder.conv_out.bias")
        tensors["quant_conv.bias"] = torch.zeros(3)

    rewrite(folder, spoil)
    with pytest.raises(ValueError, match="tensors do not fit") as error:
        load_wan_codec(folder)
    message = str(error.value)
    assert "\n" not in message
    for part in (
        "missing: decoder.conv_out.bias",
        "unexpected: decoder.tail",
        "misshaped: quant_conv.bias [3]",
    ):
        assert part in message


class Malice:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("touched"),))


def test_a_file_that_would_run_code_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    Path("evil.pth").write_bytes(pickle.dumps({"conv2.weight": Malice()}))
    torch.save({"conv2.weight": Malice()}, "worse.pth")
    for name in ("evil.pth", "worse.pth"):
        with pytest.raises(ValueError, match="cannot be read"):
            load_wan_codec(Path(name))
    assert not Path("touched").exists()


def test_other_files_are_errors_in_one_line(folder: Path):
    cases = {"no such file or folder": folder / "nowhere", "no config.json": folder / "vae" / "sub"}
    (folder / "vae" / "sub").mkdir()
    other = folder / "other.safetensors"
    save_file({"conv2.weight": torch.zeros(4, 4)}, other)
    cases["not an original Wan VAE"] = other
    damaged = folder / "damaged.safetensors"
    damaged.write_bytes(b"nothing")
    cases["cannot be read"] = damaged
    for message, path in cases.items():
        for call in (load_wan_codec, wan_codec_sizes):
            with pytest.raises(ValueError, match=message) as error:
                call(path)
            assert "\n" not in str(error.value)
    (folder / WEIGHTS).unlink()
    with pytest.raises(ValueError, match="no such file; the checkpoint is incomplete"):
        load_wan_codec(folder)
    file = folder / "vae/config.json"
    file.write_text(json.dumps({"_class_name": "AutoencoderKL"}))
    with pytest.raises(ValueError, match="a AutoencoderKL; need an AutoencoderKLWan"):
        wan_codec_sizes(folder)
    file.write_text("{")
    with pytest.raises(ValueError, match=r"config.json: damaged"):
        wan_codec_sizes(folder)
