"""Laws of the backends of other packages, with stand-ins that record how they are called."""

import math
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from vidgen.kernels.attention import flash, sage, xformers
from vidgen.kernels.attention.layout import BlockLayout, from_block_mask, from_rule
from vidgen.kernels.attention.windows import dense

FLASH_4, FLASH_3, FLASH_2 = "flash_attn.cute", "flash_attn_interface", "flash_attn"
PACKAGES = (
    "flash_attn",
    FLASH_4,
    FLASH_3,
    "xformers",
    "xformers.ops",
    "mslk",
    "mslk.attention",
    "sageattention",
)
Triple = tuple[Tensor, Tensor, Tensor]
FMHA = ("xformers.ops.fmha", "mslk.attention.fmha")


class Calls(list[tuple[tuple[Any, ...], dict[str, Any]]]):
    """A function that records its calls and gives what it is told to."""

    def __init__(self, result: object) -> None:
        super().__init__()
        self.result = result

    def __call__(self, *args: Any, **options: Any) -> object:
        self.append((args, options))
        return self.result


@pytest.fixture(autouse=True)
def nothing_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """None of these packages is there, nor a GPU that decides between them."""
    for name in (*PACKAGES, *FMHA, *(f"{name}.attn_bias" for name in FMHA)):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def install(monkeypatch: pytest.MonkeyPatch, name: str, **content: object) -> None:
    parts = name.split(".")
    for depth in range(1, len(parts)):
        parent = ".".join(parts[:depth])
        if sys.modules.get(parent) is None:
            package = ModuleType(parent)
            package.__path__ = []
            monkeypatch.setitem(sys.modules, parent, package)
    module = ModuleType(name)
    module.__path__ = []
    for attribute, value in content.items():
        setattr(module, attribute, value)
    monkeypatch.setitem(sys.modules, name, module)


def drawn(num_queries: int = 9, num_keys: int = 12, dtype: torch.dtype = torch.float16) -> Triple:
    query, key, value = (
        torch.randn(2, size, 3, 8, dtype=dtype) for size in (num_queries, num_keys, num_keys)
    )
    return query, key, value


def windowed(left: int, right: int, num_queries: int = 9, num_keys: int = 12) -> BlockLayout:
    def sees(query: Tensor, key: Tensor) -> Tensor:
        ahead = key - (query + num_keys - num_queries)
        return ((ahead >= -left) | (left < 0)) & ((ahead <= right) | (right < 0))

    return from_rule(sees, num_queries=num_queries, num_keys=num_keys, query_block=4, key_block=4)


def blocks() -> BlockLayout:
    mask = torch.eye(3, dtype=torch.bool).view(1, 1, 3, 3)
    return from_block_mask(mask, num_queries=9, num_keys=12, query_block=4, key_block=4)


OUT = torch.zeros(2, 9, 3, 8)
LSE = torch.zeros(2, 3, 9)
RESULTS = {FLASH_4: (OUT, LSE), FLASH_3: (OUT, LSE), FLASH_2: (OUT, LSE, torch.empty(0))}  # asked for LSEs
LSE_ARGUMENTS = {FLASH_4: "return_lse", FLASH_3: "return_attn_probs", FLASH_2: "return_attn_probs"}
every_flash = pytest.mark.parametrize("module", [FLASH_4, FLASH_3, FLASH_2], ids=["4", "3", "2"])


@pytest.mark.parametrize(
    ("backend", "names"),
    [
        (flash, ["flash-attn 4: ", "flash-attn 3: ", "flash-attn 2: "]),
        (xformers, ["xformers.ops.fmha: ", "mslk.attention.fmha: "]),
        (sage, ["sageattention"]),
    ],
    ids=["flash", "xformers", "sage"],
)
def test_a_package_that_is_missing_is_an_import_error_that_names_all_that_would_do(
    backend: ModuleType, names: list[str]
):
    with pytest.raises(ImportError) as caught:
        backend.load()
    assert all(name in str(caught.value) for name in names)
    assert "\n" not in str(caught.value)


@every_flash
def test_flash_gives_attention_and_only_if_asked_the_log_sum_exp(
    monkeypatch: pytest.MonkeyPatch, module: str
):
    calls = Calls(RESULTS[module])
    install(monkeypatch, module, flash_attn_func=calls)
    qkv = drawn()
    run = flash.load()
    out, lse = run(*qkv, None, 0.3, True)
    assert out is OUT and lse is LSE
    calls.result = (OUT, None) if module == FLASH_4 else OUT
    out, lse = run(*qkv, None, 0.3, False)
    assert out is OUT and lse is None
    (args, asked), (_, unasked) = calls
    assert all(given is tensor for given, tensor in zip(args, qkv, strict=True))
    assert asked.pop(LSE_ARGUMENTS[module]) is True
    assert asked == unasked and unasked["softmax_scale"] == 0.3
    assert unasked["window_size"] == ((None, None) if module == FLASH_4 else (-1, -1))


@every_flash
@pytest.mark.parametrize("window", [(2, 1), (3, -1), (-1, 0), (-1, -1)], ids=str)
def test_flash_is_told_the_window(monkeypatch: pytest.MonkeyPatch, module: str, window: tuple[int, int]):
    calls = Calls(OUT)
    install(monkeypatch, module, flash_attn_func=calls)
    flash.load()(*drawn(), windowed(*window), 0.3, False)
    no_limit = None if module == FLASH_4 else -1
    assert calls[0][1]["window_size"] == tuple(no_limit if side == -1 else side for side in window)


def test_flash_queries_that_see_no_key_have_minus_infinity(monkeypatch: pytest.MonkeyPatch):
    theirs = torch.tensor([math.inf, 0.5])
    install(monkeypatch, FLASH_2, flash_attn_func=Calls((OUT, theirs, None)))
    _, lse = flash.load()(*drawn(12, 9), windowed(1, 1, 12, 9), 0.3, True)
    assert lse is not None and lse.tolist() == [-math.inf, 0.5]


def test_the_newest_flash_is_taken_and_a_broken_one_is_not(monkeypatch: pytest.MonkeyPatch):
    functions = {name: Calls(OUT) for name in (FLASH_2, FLASH_3, FLASH_4)}
    for name in (FLASH_2, FLASH_3):
        install(monkeypatch, name, flash_attn_func=functions[name])
        flash.load()(*drawn(), None, 0.3, False)
        assert len(functions[name]) == 1
    install(monkeypatch, FLASH_4)  # it has no flash_attn_func
    flash.load()(*drawn(), None, 0.3, False)
    assert len(functions[FLASH_3]) == 2
    install(monkeypatch, FLASH_4, flash_attn_func=functions[FLASH_4])
    flash.load()(*drawn(), None, 0.3, False)
    assert len(functions[FLASH_4]) == 1


@pytest.mark.parametrize(
    ("capability", "taken"), [(8, FLASH_2), (9, FLASH_4), (10, FLASH_4), (12, FLASH_2)], ids=str
)
def test_flash_takes_the_newest_that_has_kernels_for_the_gpu(
    monkeypatch: pytest.MonkeyPatch, capability: int, taken: str
):
    functions = {name: Calls(OUT) for name in (FLASH_2, FLASH_3, FLASH_4)}
    for name, function in functions.items():
        install(monkeypatch, name, flash_attn_func=function)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (capability, 0))
    flash.load()(*drawn(), None, 0.3, False)
    assert [name for name, function in functions.items() if function] == [taken]


def test_flash_says_that_an_old_gpu_has_no_kernels(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    with pytest.raises(ImportError, match="flash-attn 2: not for GPUs of capability 7"):
        flash.load()


class Window:
    """In place of LocalAttentionFromBottomRightMask."""

    def __init__(self, window_left: int, window_right: int) -> None:
        assert window_left >= 0 and window_right >= 0  # as theirs demands
        self.sides = window_left, window_right


def install_fmha(monkeypatch: pytest.MonkeyPatch, name: str) -> tuple[Calls, Calls]:
    plain, with_lse = Calls(OUT), Calls((OUT, torch.zeros(2, 3, 32)))
    install(
        monkeypatch,
        name,
        memory_efficient_attention=plain,
        memory_efficient_attention_forward_requires_grad=with_lse,
    )
    install(monkeypatch, f"{name}.attn_bias", LocalAttentionFromBottomRightMask=Window)
    return plain, with_lse


@pytest.mark.parametrize("name", FMHA)
def test_xformers_gives_attention_and_only_if_asked_the_log_sum_exp(
    monkeypatch: pytest.MonkeyPatch, name: str
):
    plain, with_lse = install_fmha(monkeypatch, name)
    qkv = drawn()
    run = xformers.load()
    assert run(*qkv, None, 0.3, False) == (OUT, None)
    out, lse = run(*qkv, None, 0.3, True)
    assert out is OUT
    assert lse is not None and lse.shape == (2, 3, 9)  # theirs is padded to a multiple of 32
    for (args, options), *more in (plain, with_lse):
        assert all(given is tensor for given, tensor in zip(args, qkv, strict=True))
        assert options == {"scale": 0.3} and not more


@pytest.mark.parametrize(
    ("window", "told"), [((2, 1), (2, 1)), ((3, -1), (3, 21)), ((-1, 0), (21, 0)), ((-1, -1), None)], ids=str
)
def test_xformers_is_told_the_window(
    monkeypatch: pytest.MonkeyPatch, window: tuple[int, int], told: tuple[int, int] | None
):
    plain, _ = install_fmha(monkeypatch, FMHA[0])
    xformers.load()(*drawn(), windowed(*window), 0.3, False)
    bias = plain[0][1].get("attn_bias")
    assert (bias and bias.sides) == told


def test_xformers_without_its_functions_gives_way_to_mslk(monkeypatch: pytest.MonkeyPatch):
    install(monkeypatch, FMHA[0], memory_efficient_attention=Calls(OUT))
    with pytest.raises(ImportError, match="has no memory_efficient_attention_forward_requires_grad; mslk"):
        xformers.load()
    plain, _ = install_fmha(monkeypatch, FMHA[1])
    xformers.load()(*drawn(), None, 0.3, False)
    assert len(plain) == 1


def test_xformers_does_no_windows_in_single_precision(monkeypatch: pytest.MonkeyPatch):
    install_fmha(monkeypatch, FMHA[0])
    run = xformers.load()
    run(*drawn(dtype=torch.float32), dense(9, 12), 0.3, False)
    with pytest.raises(ValueError, match="windows in float16 and bfloat16"):
        run(*drawn(dtype=torch.float32), windowed(2, 1), 0.3, False)


def test_sage_is_told_the_order_of_dims(monkeypatch: pytest.MonkeyPatch):
    calls = Calls(OUT)
    install(monkeypatch, "sageattention", sageattn=calls)
    qkv = drawn()
    assert sage.load()(*qkv, None, 0.3, False) == (OUT, None)
    args, options = calls[0]
    assert all(given is tensor for given, tensor in zip(args, qkv, strict=True))
    assert options == {"tensor_layout": "NHD", "is_causal": False, "sm_scale": 0.3}


@pytest.mark.parametrize("name", ["flash", "xformers", "sage"])
def test_block_layouts_are_an_error_that_names_who_does_them(monkeypatch: pytest.MonkeyPatch, name: str):
    install(monkeypatch, FLASH_2, flash_attn_func=Calls(OUT))
    install_fmha(monkeypatch, FMHA[0])
    install(monkeypatch, "sageattention", sageattn=Calls(OUT))
    run = {"flash": flash, "xformers": xformers, "sage": sage}[name].load()
    with pytest.raises(ValueError, match=f"backend={name}: .*triton"):
        run(*drawn(), blocks(), 0.3, False)


def test_sage_gives_no_log_sum_exp(monkeypatch: pytest.MonkeyPatch):
    install(monkeypatch, "sageattention", sageattn=Calls(OUT))
    with pytest.raises(ValueError, match="backend=sage"):
        sage.load()(*drawn(), None, 0.3, True)
