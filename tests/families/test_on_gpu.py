"""On a CUDA device: the same videos as on a CPU within rounding, for the built-in model and for Wan.

Needs pydantic, and diffusers for Wan; a bare machine can be given both as wheels.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("pydantic", reason="jobs are checked with pydantic")

from vidgen.engine import Engine  # noqa: E402
from vidgen.sections import OffloadConfig  # noqa: E402

pytestmark = pytest.mark.gpu
PROMPT = "a red circle moving left over a gray background"
BLOCKS: dict[str, Any] = {"timetable": "dualparal", "block_frames": 2, "context_frames": 1}
SMALL: dict[str, Any] = {
    "height": 64, "width": 96, "num_frames": 17, "num_inference_steps": 3, "guidance_scale": 5.0, "seed": 1
}  # fmt: skip


def built_in(device: str, **settings: Any) -> torch.Tensor:
    engine = Engine.from_pretrained("builtin", device=device)
    return engine(PROMPT, num_frames=33, num_inference_steps=4, output_type="pt", **settings).frames.cpu()


@pytest.mark.parametrize("mode", ["recompute", "cache"])
@pytest.mark.parametrize("guidance", ["split", "stacked"])
def test_the_built_in_model_draws_on_a_gpu_what_it_draws_on_a_cpu(mode: str, guidance: str) -> None:
    queue = {**BLOCKS, "context_mode": mode, "guidance": guidance}
    assert (built_in("cuda", queue=queue) - built_in("cpu", queue=queue)).abs().max() < 2e-2


def test_blocks_streamed_on_a_gpu_are_the_frames_of_the_whole() -> None:
    engine = Engine.from_pretrained("builtin", device="cuda")
    whole = engine(PROMPT, num_frames=33, num_inference_steps=4, output_type="pt", queue=BLOCKS).frames[0]
    blocks = list(engine.stream(PROMPT, num_frames=33, num_inference_steps=4, queue=BLOCKS))
    streamed = torch.cat([torch.as_tensor(block) for block in blocks]).permute(0, 3, 1, 2).float() / 255
    assert (streamed - whole.cpu()).abs().max() <= 0.5 / 255 + 1e-6


@pytest.mark.parametrize("sparsity", ["adaspa", "sliding_tile", "local"])
def test_sparse_attention_runs_in_a_queue_on_a_gpu(sparsity: str) -> None:
    attention = {"sparsity": {"policy": sparsity}}
    assert torch.isfinite(built_in("cuda", queue=BLOCKS, attention=attention)).all()


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("diffusers", reason="random Wan checkpoints are written with diffusers")
    from vidgen.bench.random_wan import make_wan

    return make_wan(tmp_path_factory.mktemp("wan"), "t2v")


def latents(folder: Path, device: str, dtype: str = "fp32", **settings: Any) -> torch.Tensor:
    engine = Engine.from_pretrained(folder, device=device, dtype=dtype)
    return engine("a cat runs on grass", output_type="latent", **{**SMALL, **settings}).frames.cpu()


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("timetable", ["full", "dualparal"])
def test_wan_on_a_gpu_is_wan_on_a_cpu(wan: Path, timetable: str) -> None:
    queue = {**BLOCKS, "timetable": timetable} if timetable != "full" else {"timetable": "full"}
    assert error(latents(wan, "cuda", queue=queue), latents(wan, "cpu", queue=queue)) < 2e-3


@pytest.mark.parametrize(("dtype", "most"), [("bf16", 0.1), ("fp16", 0.02), ("fp8", 0.5)])
def test_wan_in_a_smaller_type_on_a_gpu_stays_near_fp32(wan: Path, dtype: str, most: float) -> None:
    assert error(latents(wan, "cuda", dtype), latents(wan, "cpu")) < most


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's compiler
def test_a_compiled_wan_on_a_gpu_is_the_plain_one_within_rounding(wan: Path) -> None:
    assert error(latents(wan, "cuda", compile=True), latents(wan, "cuda")) < 2e-3


def pixels(folder: Path, device: str, **how: Any) -> torch.Tensor:
    engine = Engine.from_pretrained(folder, device=device, dtype="fp32", **how)
    return engine("a cat runs on grass", output_type="pt", **SMALL).frames.cpu()


@pytest.fixture(scope="module")
def on_cpu(wan: Path) -> Callable[[], torch.Tensor]:
    made: list[torch.Tensor] = []
    return lambda: made[0] if made else made.append(pixels(wan, "cpu")) or made[0]


def test_wan_decodes_on_a_gpu_what_it_decodes_on_a_cpu(wan: Path, on_cpu: Callable[[], torch.Tensor]) -> None:
    assert (pixels(wan, "cuda") - on_cpu()).abs().max() < 2e-2


def test_what_is_offloaded_changes_no_frame(wan: Path, on_cpu: Callable[[], torch.Tensor]) -> None:
    offload = OffloadConfig(encoders=True, codec=True)
    assert (pixels(wan, "cuda", offload=offload) - on_cpu()).abs().max() < 2e-2


def test_tiles_on_a_gpu_are_tiles_on_a_cpu(wan: Path) -> None:
    assert (pixels(wan, "cuda", tile=64) - pixels(wan, "cpu", tile=64)).abs().max() < 2e-2
