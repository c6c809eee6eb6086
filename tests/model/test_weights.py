"""Laws of reading Wan's files: the same values by any names, and only the bytes that are asked for."""

import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from vidgen.bench.random_wan import TINY, Kind, make_transformer
from vidgen.families.wan_folder import read_json
from vidgen.model.dit import DiT, DiTConfig
from vidgen.model.dtypes import FP8, quantise
from vidgen.model.tensor_files import open_tensors
from vidgen.model.wan import dit_config
from vidgen.model.wan_names import Format, from_file, names, to_file
from vidgen.model.weights import WanWeights

STEM = "diffusion_pytorch_model"
KINDS: tuple[Kind, ...] = ("t2v", "i2v", "ti2v", "a14b-i2v")
kinds = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Kind], Path]:
    """A random transformer's folder as diffusers writes it, in shards; made once."""
    made: dict[Kind, Path] = {}

    def saved(kind: Kind) -> Path:
        if kind not in made:
            torch.manual_seed(1)
            made[kind] = tmp_path_factory.mktemp(kind) / "transformer"
            make_transformer(kind, TINY).save_pretrained(made[kind], max_shard_size="60KB")
        return made[kind]

    return saved


@pytest.fixture
def single(saved: Any, tmp_path: Path) -> Path:
    """The t2v transformer in one file, to be spoiled."""
    folder = tmp_path / "transformer"
    folder.mkdir()
    save_file(whole(saved("t2v")), folder / f"{STEM}.safetensors")
    (folder / "config.json").write_text((saved("t2v") / "config.json").read_text())
    return folder


def whole(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder, read by safetensors' own code."""
    found: dict[str, Tensor] = {}
    for path in folder.glob("*.safetensors"):
        found |= load_file(path)
    return found


def config_of(folder: Path, dtype: str = "fp32") -> DiTConfig:
    return dit_config(read_json(folder / "config.json"), dtype=dtype)


def empty(config: DiTConfig) -> dict[str, Tensor]:
    """A whole DiT's tensors, full of NaN."""
    with torch.device("meta"):
        dit = DiT(config)
    return {name: torch.full(t.shape, torch.nan, dtype=t.dtype) for name, t in dit.state_dict().items()}


def read(
    folder: Path, format: Format = "diffusers", dtype: str = "fp32", config: Any = None
) -> dict[str, Tensor]:
    into = empty(config or config_of(folder, dtype))
    WanWeights(folder, format, config or config_of(folder, dtype)).read(into)
    return into


def as_native(folder: Path) -> dict[str, Tensor]:
    """Its tensors by Wan's own names: the map from ours, backwards."""
    config, ours = config_of(folder), read(folder)
    return {row.native: to_file(row.form, ours[row.ours], config.patch).contiguous() for row in names(config)}


@kinds
def test_every_tensor_has_one_row_and_every_row_a_tensor(kind: Kind, saved: Any):
    folder = saved(kind)
    rows, ours = names(config_of(folder)), empty(config_of(folder))
    assert sorted(row.ours for row in rows) == sorted(ours)
    assert sorted(row.diffusers for row in rows) == sorted(whole(folder))
    assert len({row.native for row in rows}) == len(rows)
    WanWeights(folder, "diffusers", config_of(folder)).check({n: tuple(t.shape) for n, t in ours.items()})


@kinds
def test_native_names_are_those_that_diffusers_converts_to_its_own(kind: Kind, saved: Any):
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

    expected, found = whole(saved(kind)), convert_wan_transformer_to_diffusers(as_native(saved(kind)))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("ending", ["safetensors", "pth", "prefixed"])
@kinds
def test_native_files_and_diffusers_files_are_read_as_the_same_tensors(
    kind: Kind, ending: str, saved: Any, tmp_path: Path
):
    expected, native = read(saved(kind)), as_native(saved(kind))
    if ending == "pth":
        torch.save(native, tmp_path / f"{STEM}.pth")
    elif ending == "prefixed":
        save_file({f"model.diffusion_model.{n}": t for n, t in native.items()}, tmp_path / "x.safetensors")
    else:
        save_file(native, tmp_path / f"{STEM}.safetensors")
    path = tmp_path / "x.safetensors" if ending == "prefixed" else tmp_path
    weights = WanWeights(path, "native", config_of(saved(kind)))
    found = empty(weights.config)
    assert weights.read(found) == sum(tensor.nbytes for tensor in native.values())
    weights.check({name: tuple(tensor.shape) for name, tensor in found.items()})
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@kinds
def test_forms_are_undone_by_their_inverse(kind: Kind, saved: Any):
    config, ours = config_of(saved(kind)), read(saved(kind))
    for row in names(config):
        theirs = to_file(row.form, ours[row.ours], config.patch)
        assert torch.equal(
            from_file(row.form, theirs, tuple(ours[row.ours].shape), config.patch), ours[row.ours]
        )


def test_a_stage_reads_its_tensors_bytes_and_opens_nothing_else(saved: Any, monkeypatch: pytest.MonkeyPatch):
    folder, config = saved("t2v"), config_of(saved("t2v"))
    wanted = {name: t for name, t in empty(config).items() if name.startswith("layers.1.")}
    taken: list[int] = []
    from vidgen.model import tensor_files

    fill = tensor_files._Span.__call__
    monkeypatch.setattr(tensor_files._Span, "__call__", lambda s, t: (taken.append(t.nbytes), fill(s, t))[1])
    count = WanWeights(folder, "diffusers", config).read(wanted)
    theirs = {n: t for n, t in whole(folder).items() if n.startswith("blocks.1.")}
    assert count == sum(taken) == sum(tensor.nbytes for tensor in theirs.values())
    assert count < 0.35 * sum(tensor.nbytes for tensor in whole(folder).values())
    assert all(torch.equal(tensor, read(folder)[name]) for name, tensor in wanted.items())


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_values_are_converted_to_the_models_dtypes(dtype: str, stored: torch.dtype, single: Path):
    path = single / f"{STEM}.safetensors"
    save_file({name: tensor.to(stored) for name, tensor in load_file(path).items()}, path)
    exact, found = read(single), read(single, dtype=dtype)
    for name, tensor in empty(config_of(single, dtype)).items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], exact[name].to(tensor.dtype)), name


@pytest.mark.parametrize("ending", ["scale_weight", "weight_scale"])
@pytest.mark.parametrize("per_row", [False, True], ids=["one scale", "a scale a row"])
def test_fp8_files_are_multiplied_with_their_scales(ending: str, per_row: bool, single: Path):
    path, expected = single / f"{STEM}.safetensors", read(single)
    tensors = load_file(path)
    for name in [name for name in tensors if name.startswith("blocks.") and tensors[name].ndim == 2]:
        weight = tensors[name]
        scale = weight.abs().amax(dim=1) / 448 if per_row else weight.abs().amax() / 448
        tensors[name] = (weight / (scale[:, None] if per_row else scale)).to(FP8)
        tensors[f"{name.removesuffix('weight')}{ending}"] = scale
        tensors[f"{name.removesuffix('weight')}scale_input"] = torch.ones(())
    save_file(tensors | {"scaled_fp8": torch.zeros(0, dtype=FP8)}, path)
    config = config_of(single)
    WanWeights(single, "diffusers", config).check({n: tuple(t.shape) for n, t in expected.items()})
    for name, tensor in read(single).items():
        torch.testing.assert_close(tensor, expected[name], rtol=1 / 15, atol=1e-2 * tensor.abs().max().item())
        is_fp8 = name.startswith("layers.") and tensor.ndim == 2 and name.endswith(".weight")
        assert torch.equal(tensor, expected[name]) == (not is_fp8), name


def test_an_fp8_model_is_read_as_what_its_exact_weights_are_quantised_to(single: Path):
    exact, found = read(single), read(single, dtype="fp8")
    num_scales = 0
    for name, tensor in found.items():
        if tensor.dtype == FP8:
            weight, scale = quantise(exact[name])
            assert torch.equal(tensor.float(), weight.float()) and torch.isfinite(tensor.float()).all()
            assert torch.equal(found[name.removesuffix("weight") + "scale"], scale)
            worst = (weight.float() * scale[:, None] - exact[name]).abs() / exact[name].abs().amax(
                1, keepdim=True
            )
            assert worst.max() <= 1 / 28 + 1 / 256  # half a step of the largest values, the scale's rounding
            num_scales += 1
    assert num_scales == sum(name.endswith(".scale") for name in found) == 3 * 10
    config = config_of(single, "fp8")
    WanWeights(single, "diffusers", config).check({n: tuple(t.shape) for n, t in found.items()})


def test_rows_of_zeros_survive_fp8():
    weight, scale = quantise(torch.zeros(2, 3))
    assert torch.equal(weight.float() * scale[:, None], torch.zeros(2, 3))


PEAK = """
import json, os, sys, threading, time
from pathlib import Path
import torch
from vidgen.model.dit import DiT
from vidgen.model.wan import dit_config
from vidgen.model.weights import WanWeights

folder = Path(sys.argv[1])

def anonymous_bytes():
    line = next(line for line in open("/proc/self/status") if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024

def peak_over_size(dtype, only=""):
    config = dit_config(json.loads((folder / "config.json").read_text()), dtype=dtype)
    with torch.device("meta"):
        dit = DiT(config)
    before, peak, done = anonymous_bytes(), 0, threading.Event()
    into = {name: torch.empty_like(t, device="cpu") for name, t in dit.state_dict().items() if only in name}

    def watch():
        nonlocal peak
        while not done.wait(0.0005):
            peak = max(peak, anonymous_bytes())

    thread = threading.Thread(target=watch)
    thread.start()
    WanWeights(folder, "diffusers", config).read(into)
    done.set()
    thread.join()
    return (max(peak, anonymous_bytes()) - before) / sum(tensor.nbytes for tensor in into.values())

for dtype in sys.argv[2:]:
    if child := os.fork():  # each finds the memory as it is after the imports
        _, failed = os.waitpid(child, 0)
        assert not failed
        continue
    peak_over_size("fp8", "layers.0.self_attention.query")  # code and buffers that a first read brings
    print(peak_over_size(dtype), flush=True)
    os._exit(0)
"""


@pytest.fixture(scope="module")
def hundred_megabytes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random checkpoint of 100 MB in bf16."""
    folder = tmp_path_factory.mktemp("big") / "transformer"
    folder.mkdir()
    config = {
        "num_attention_heads": 8, "attention_head_dim": 64, "text_dim": 64, "freq_dim": 256, "ffn_dim": 2048,
        "num_layers": 12, "in_channels": 16, "out_channels": 16, "eps": 1e-6,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    with torch.device("meta"):
        dit = DiT(dit_config(config, dtype="bf16"))
    shapes = {name: tuple(tensor.shape) for name, tensor in dit.state_dict().items()}
    ours = {name: torch.randn(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
    rows = names(dit.config)
    save_file(
        {row.diffusers: to_file(row.form, ours[row.ours], dit.config.patch).contiguous() for row in rows},
        folder / f"{STEM}.safetensors",
    )
    return folder


def test_reading_takes_at_most_a_tenth_more_memory_than_the_weights(hundred_megabytes: Path):
    """Anonymous memory of a process of its own while it reads; a mapped file is the system's to drop."""
    size = (hundred_megabytes / f"{STEM}.safetensors").stat().st_size
    assert 95e6 < size < 120e6
    command = [sys.executable, "-c", PEAK, str(hundred_megabytes), "bf16", "fp32", "fp8"]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    found = [float(ratio) for ratio in run.stdout.split()]
    assert len(found) == 3 and all(0.95 <= ratio <= 1.1 for ratio in found), found


def test_weights_are_plain_data(saved: Any):
    weights = WanWeights(saved("t2v"), "diffusers", config_of(saved("t2v")))
    assert pickle.loads(pickle.dumps(weights)) == weights


def test_shards_without_an_index_and_one_file_by_its_own_name_are_found(saved: Any, tmp_path: Path):
    for path in saved("t2v").glob("*.safetensors"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    assert open_tensors(tmp_path).keys() == whole(saved("t2v")).keys()
    assert len(list(tmp_path.iterdir())) > 2
