"""Laws of a stage's model: its own part of the whole, read once, and nothing beside it."""

import json
import struct
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from vidgen.builtin import BUILTIN_PATH, load_small
from vidgen.model import loading
from vidgen.model.dit import DiT, DiTConfig
from vidgen.model.loading import PartWeights, save_parts
from vidgen.parallel.place import place, strip
from vidgen.parallel.topology import Stage, Topology

EMBEDDING = {"patch_in", "text_in", "noise_level", "noise_modulation", "variance"}
HEAD = {"head_modulation", "patch_out"}
CPU = torch.device("cpu")
CUTS = [(6,), (3, 3), (5, 1), (1, 4, 1), (1, 1, 1, 1, 1, 1)]
TINY: dict[str, Any] = {
    "latent_channels": 3, "width": 24, "num_layers": 3, "num_heads": 2, "ffn_width": 40, "text_width": 7,
    "num_frequencies": 16,
}  # fmt: skip


@pytest.fixture(scope="module")
def whole() -> DiT:
    """The DiT of the built-in model, loaded in one piece."""
    return load_small().dit


@pytest.fixture
def tiny_checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.safetensors"
    save_parts(path, {"dit": DiT(DiTConfig(**TINY))}, {}, torch.float32)
    return path


def own_names(names: Iterable[str], stage: Stage) -> dict[str, str]:
    """What a stage must have: its own name of a tensor -> the name in the whole model."""
    own = {}
    for name in names:
        root, _, rest = name.partition(".")
        if root == "layers":
            index, _, rest = rest.partition(".")
            if int(index) in stage.layers:
                own[f"layers.{stage.layers.index(int(index))}.{rest}"] = name
        else:
            assert root in EMBEDDING | HEAD, f"{name}: on which stage?"
            if (stage.is_first and root in EMBEDDING) or (stage.is_last and root in HEAD):
                own[name] = name
    return own


def bytes_in_file(path: Path, keys: Iterable[str]) -> int:
    """Size of these tensors, by the file's own header."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    spans = [header[key]["data_offsets"] for key in keys]
    return sum(stop - start for start, stop in spans)


@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_a_stage_has_its_layers_and_its_end_of_the_model_by_name(cut: Any, whole: DiT):
    names = whole.state_dict().keys()
    for stage in Topology(cut).stages():
        placed = place(PartWeights(BUILTIN_PATH, "dit"), whole.config, stage, CPU)
        expected = own_names(names, stage)
        assert placed.model.state_dict().keys() == expected.keys()
        parameters = {own for own, name in expected.items() if name in dict(whole.named_parameters())}
        assert {name for name, _ in placed.model.named_parameters()} == parameters


@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_the_stages_values_are_the_whole_models_bit_for_bit(cut: Any, whole: DiT):
    tensors = whole.state_dict()
    for stage in Topology(cut).stages():
        found = place(PartWeights(BUILTIN_PATH, "dit"), whole.config, stage, CPU).model.state_dict()
        for own, name in own_names(tensors, stage).items():
            assert found[own].dtype == tensors[name].dtype == torch.float32
            assert torch.equal(found[own], tensors[name]), f"stage {stage.index}: {own} is not {name}"


@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_the_stages_parameters_and_bytes_add_up_to_the_whole_models(cut: Any, whole: DiT):
    stages = Topology(cut).stages()
    placed = [place(PartWeights(BUILTIN_PATH, "dit"), whole.config, stage, CPU) for stage in stages]
    assert sum(part.num_parameters for part in placed) == sum(p.numel() for p in whole.parameters())
    names = list(whole.state_dict())
    assert sum(part.bytes_read for part in placed) == bytes_in_file(BUILTIN_PATH, [f"dit.{n}" for n in names])
    for stage, part in zip(stages, placed, strict=True):
        keys = [f"dit.{name}" for name in own_names(names, stage).values()]
        assert part.bytes_read == bytes_in_file(BUILTIN_PATH, keys)


@pytest.mark.parametrize("cut", [(2, 2, 2), (6,)], ids=str)
def test_every_tensor_of_the_file_is_read_by_one_stage_once(
    cut: Any, whole: DiT, monkeypatch: pytest.MonkeyPatch
):
    read: list[str] = []

    class Watched:
        """A safetensors file that notes what is taken from it."""

        def __init__(self, *arguments: Any) -> None:
            self.opened = safe_open(*arguments)

        def __enter__(self) -> "Watched":
            self.file = self.opened.__enter__()
            return self

        def __exit__(self, *error: Any) -> None:
            self.opened.__exit__(*error)

        def keys(self) -> list[str]:
            return self.file.keys()

        def get_tensor(self, key: str) -> torch.Tensor:
            read.append(key)
            return self.file.get_tensor(key)

    monkeypatch.setattr(loading, "safe_open", Watched)
    names = list(whole.state_dict())
    for stage in Topology(cut).stages():
        read_before = len(read)
        place(PartWeights(BUILTIN_PATH, "dit"), whole.config, stage, CPU)
        expected = {f"dit.{name}" for name in own_names(names, stage).values()}
        assert set(read[read_before:]) == expected
    assert sorted(read) == sorted(f"dit.{name}" for name in names)


@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_a_placed_model_is_all_in_memory_and_frozen(cut: Any, whole: DiT):
    for stage in Topology(cut).stages():
        model = place(PartWeights(BUILTIN_PATH, "dit"), whole.config, stage, CPU).model
        tensors = [*model.parameters(), *model.buffers()]
        assert {tensor.device for tensor in tensors} == {CPU}
        # a tensor that no state_dict knows would be uninitialised memory
        assert len(tensors) == len(model.state_dict())
        assert not any(tensor.requires_grad for tensor in tensors)
        assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("settings", [{}, {"linear_skip": True, "convolutions": True}], ids=str)
@pytest.mark.parametrize("cut", [(3,), (1, 2), (1, 1, 1)], ids=str)
def test_stripping_takes_no_memory_and_leaves_the_stages_part(cut: Any, settings: Any):
    config = DiTConfig(**TINY | settings)
    names = DiT(config).state_dict()
    for stage in Topology(cut).stages():
        model = strip(config, stage)
        assert model.state_dict().keys() == own_names(names, stage).keys()
        assert all(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])


def test_a_missing_tensor_is_one_line_that_names_it_on_the_stage_that_needs_it(tiny_checkpoint: Path):
    key = "dit.layers.2.feed_forward.up.bias"
    tensors = load_file(tiny_checkpoint)
    del tensors[key]
    save_file(tensors, tiny_checkpoint)
    first, middle, last = Topology((1, 1, 1)).stages()
    with pytest.raises(ValueError) as caught:
        place(PartWeights(tiny_checkpoint, "dit"), DiTConfig(**TINY), last, CPU)
    message = str(caught.value)
    assert "\n" not in message
    assert str(tiny_checkpoint) in message
    assert f"{key} is missing" in message
    for stage in first, middle:
        place(PartWeights(tiny_checkpoint, "dit"), DiTConfig(**TINY), stage, CPU)


def test_a_tensor_of_another_shape_is_one_line_that_names_it_and_both_shapes(tiny_checkpoint: Path):
    key = "dit.text_in.hidden.weight"
    tensors = load_file(tiny_checkpoint)
    tensors[key] = torch.zeros(24, 8)
    save_file(tensors, tiny_checkpoint)
    first, last = Topology((1, 2)).stages()
    with pytest.raises(ValueError) as caught:
        place(PartWeights(tiny_checkpoint, "dit"), DiTConfig(**TINY), first, CPU)
    message = str(caught.value)
    assert "\n" not in message
    assert f"{key} is (24, 8), need (24, 7)" in message
    place(PartWeights(tiny_checkpoint, "dit"), DiTConfig(**TINY), last, CPU)


def test_a_checkpoint_of_fewer_layers_is_refused_in_one_line(tiny_checkpoint: Path):
    (stage,) = Topology((4,)).stages()
    longer = replace(DiTConfig(**TINY), num_layers=4)
    with pytest.raises(ValueError) as caught:
        place(PartWeights(tiny_checkpoint, "dit"), longer, stage, CPU)
    assert "\n" not in str(caught.value)
    assert "dit.layers.3.modulation is missing" in str(caught.value)


def test_a_part_that_the_file_has_not_is_refused_in_one_line(tiny_checkpoint: Path):
    (stage,) = Topology((3,)).stages()
    with pytest.raises(ValueError, match=r"^[^\n]*unet\.[^\n]* is missing[^\n]*$"):
        place(PartWeights(tiny_checkpoint, "unet"), DiTConfig(**TINY), stage, CPU)


def test_neither_sympy_nor_torchs_compiler_is_imported_to_place_a_stage():
    code = (
        "import sys, torch; from vidgen.builtin import BUILTIN_PATH, load_small\n"
        "from vidgen.model.loading import PartWeights; from vidgen.parallel.place import place\n"
        "from vidgen.parallel.topology import Stage\n"
        "config = load_small(with_dit=False).dit.config\n"
        "place(PartWeights(BUILTIN_PATH, 'dit'), config, Stage(1, 2, range(3, 6)), torch.device('cpu'))\n"
        "print([name for name in ('sympy', 'torch._dynamo') if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
