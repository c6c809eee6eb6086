"""Laws of FlexAttention as a backend: equal to the reference, compiled once per shape, open about limits."""

import shutil
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from vidgen.kernels.attention import flex
from vidgen.kernels.attention.layout import BlockLayout, from_block_mask, from_rule
from vidgen.kernels.attention.reference import attention_reference
from vidgen.kernels.attention.tiles import sliding_tile
from vidgen.kernels.attention.windows import dense, sliding_window_3d

HEAD_DIM = 12
Triple = tuple[Tensor, Tensor, Tensor]


@pytest.fixture(scope="module")
def run():
    try:
        return flex.load()
    except ImportError as error:
        pytest.skip(str(error))


def drawn(
    layout: BlockLayout, device: torch.device, dtype: torch.dtype = torch.float32, head_dim: int = HEAD_DIM
) -> Triple:
    generator = torch.Generator().manual_seed(0)

    def tensor(size: int) -> Tensor:
        return torch.randn(2, size, 2, head_dim, generator=generator).to(device, dtype)

    return tensor(layout.num_queries), tensor(layout.num_keys), tensor(layout.num_keys)


def whole_blocks() -> BlockLayout:
    """Per batch entry and head, with rows that see nothing and a ragged end."""
    mask = torch.rand(2, 2, 4, 6, generator=torch.Generator().manual_seed(0)) < 0.3
    assert not mask.any(-1).all()
    return from_block_mask(mask, num_queries=61, num_keys=91, query_block=16, key_block=16)


LAYOUTS: dict[str, Callable[[], BlockLayout]] = {
    "blocks per head": whole_blocks,
    "window": lambda: sliding_window_3d(
        grid=(3, 5, 7), radius=(1, 2, 2), key_frames=5, frame_offset=1, query_block=16, key_block=32
    ),
    "ragged tiles": lambda: sliding_tile(grid=(3, 5, 7), tile=(2, 2, 4), window=(1, 3, 3)),
}


@pytest.mark.parametrize("make", LAYOUTS.values(), ids=LAYOUTS)
def test_it_equals_the_reference(run, device: torch.device, make: Callable[[], BlockLayout]):
    layout = make()
    qkv = drawn(layout, device)
    found, lse = run(*qkv, layout, 0.3, False)
    expected, _ = attention_reference(*qkv, layout.on(device), 0.3)
    assert lse is None and found.shape == expected.shape
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=2e-6)


def test_without_a_layout_it_is_dense_in_half_precision_too(run, device: torch.device):
    qkv = drawn(dense(61, 91), device, torch.bfloat16)
    found, _ = run(*qkv, None, 0.3, False)
    expected, _ = attention_reference(*qkv, None, 0.3)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), expected, rtol=2e-2, atol=2e-2)


def test_another_layout_of_the_same_shape_is_not_compiled_again(run, device: torch.device):
    def near(width: int) -> BlockLayout:
        return from_rule(
            lambda query, key: (query - key).abs() <= width,
            num_queries=61, num_keys=91, query_block=16, key_block=16,
        )  # fmt: skip

    first, second = near(9), near(20)
    assert first.partial is not None and second.partial is not None
    assert len(first.partial.tiles_Nqk) != len(second.partial.tiles_Nqk)
    run(*drawn(first, device), first, 0.3, False)
    compiled = counters["stats"]["unique_graphs"]
    qkv = drawn(second, device)
    found, _ = run(*qkv, second, 0.3, False)
    assert counters["stats"]["unique_graphs"] == compiled
    torch.testing.assert_close(
        found, attention_reference(*qkv, second.on(device), 0.3)[0].float(), rtol=1e-5, atol=2e-6
    )


def test_the_block_mask_is_made_once_per_layout(monkeypatch: pytest.MonkeyPatch):
    made = []
    monkeypatch.setattr(flex, "to_block_mask", lambda *args, **more: made.append(args) or object())
    layout = whole_blocks()
    cpu = torch.device("cpu")
    assert flex._block_mask(layout, cpu) is flex._block_mask(layout, cpu)
    assert len(made) == 1


def test_a_log_sum_exp_on_a_cpu_is_an_error_that_says_who_gives_one(run):
    layout = whole_blocks()
    with pytest.raises(ValueError, match="no log-sum-exp on CPUs; take backend cpu"):
        run(*drawn(layout, torch.device("cpu")), layout, 0.3, True)


@pytest.mark.gpu
def test_on_a_gpu_heads_that_are_too_narrow_are_an_error_that_says_so(run, device: torch.device):
    layout = whole_blocks()
    with pytest.raises(ValueError, match="heads of 12 channels: needs 16 on a GPU"):
        run(*drawn(layout, device), layout, 0.3, False)


@pytest.mark.gpu
def test_on_a_gpu_it_gives_the_log_sum_exp(run, device: torch.device):
    layout = whole_blocks()
    qkv = drawn(layout, device, head_dim=16)
    found, lse = run(*qkv, layout, 0.3, True)
    expected, expected_lse = attention_reference(*qkv, layout.on(device), 0.3)
    torch.testing.assert_close(found, expected.float(), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(lse, expected_lse.float(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("blocks", "tiles"),
    [
        ((128, 128), {}),
        ((256, 128), {}),
        ((64, 128), {"BLOCK_M": 64, "BLOCK_N": 64}),
        ((384, 64), {"BLOCK_M": 128, "BLOCK_N": 64}),
        ((48, 1040), {"BLOCK_M": 16, "BLOCK_N": 16}),
    ],
    ids=str,
)
def test_tiles_of_the_gpu_kernel_divide_the_blocks(blocks: tuple[int, int], tiles: dict[str, int]):
    assert flex._kernel_tiles(dense(4096, 4096, *blocks)) == tiles


def test_blocks_that_no_tile_of_the_gpu_kernel_divides_are_an_error():
    with pytest.raises(ValueError, match=r"blocks of 24 queries and 128 keys: needs multiples of 16"):
        flex._kernel_tiles(dense(240, 256, 24, 128))


@pytest.mark.parametrize(
    ("has_compiler", "capability", "says"),
    [(False, "AVX512", "C\\+\\+ compiler"), (True, "DEFAULT", "AVX2")],
    ids=["no compiler", "old processor"],
)
def test_where_it_cannot_be_compiled_it_is_not_there(
    monkeypatch: pytest.MonkeyPatch, has_compiler: bool, capability: str, says: str
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}" if has_compiler else None)
    with pytest.raises(ImportError, match=says):
        flex.load()
