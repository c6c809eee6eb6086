"""The one attention call of the engine, over tensors [B, S, H, D] (diffusers' layout)."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal, overload

import torch
from torch import Tensor

from vidgen.kernels.attention import native
from vidgen.kernels.attention.backends import BACKENDS, BY_NAME_ONLY, Backend, Request, able, why_not
from vidgen.kernels.attention.fastest import fastest
from vidgen.kernels.attention.layout import BlockLayout

# B batch, Q query tokens, K key tokens, H heads, D head dimension

AUTO = "auto"
_default: ContextVar[str | None] = ContextVar("attention_backend", default=None)


@contextmanager
def attention_backend(name: str | None) -> Iterator[None]:
    """Within, calls that name no backend take this one; None changes nothing. ValueError if it is unknown."""
    if name is None:
        yield
        return
    token = _default.set(check_name(name))
    try:
        yield
    finally:
        _default.reset(token)


def current_backend() -> str | None:
    """The name that calls without one take here."""
    return _default.get()


def check_name(name: str) -> str:
    """The name of a backend, or `auto`. ValueError when it is neither."""
    if name != AUTO and name not in BACKENDS:
        raise ValueError(f"attention backend {name}: there are {', '.join(BACKENDS)}, and {AUTO}")
    return name


@overload
def attention(
    query_BQHD: Tensor, key_BKHD: Tensor, value_BKHD: Tensor, *, layout: BlockLayout | None = None,
    scale: float | None = None, return_lse: Literal[False] = False, backend: str | None = None,
) -> Tensor: ...  # fmt: skip
@overload
def attention(
    query_BQHD: Tensor, key_BKHD: Tensor, value_BKHD: Tensor, *, layout: BlockLayout | None = None,
    scale: float | None = None, return_lse: Literal[True], backend: str | None = None,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
def attention(
    query_BQHD: Tensor,
    key_BKHD: Tensor,
    value_BKHD: Tensor,
    *,
    layout: BlockLayout | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(Q K^T * scale) V of shape [B, Q, H, D]; without a layout every query sees every key.

    With `return_lse` also the log-sum-exp of every query's logits, fp32 [B, H, Q]. A query that sees no key
    has zeros and -inf. `backend` is a name of `BACKENDS`; "auto": the fastest, measured once per kind of
    request (results of backends differ in their last bits); by default the first that is able, always that.
    ValueError when the layout does not fit the tensors, or no backend, or not the named one, can do it.
    """
    if not query_BQHD.ndim == key_BKHD.ndim == 4 or key_BKHD.shape != value_BKHD.shape:
        raise ValueError(
            f"query {tuple(query_BQHD.shape)}, key {tuple(key_BKHD.shape)}, value {tuple(value_BKHD.shape)}: "
            "need [B, Q, H, D] and twice [B, K, H, D]"
        )
    batch, num_queries, num_heads, head_dim = query_BQHD.shape
    if (batch, num_heads, head_dim) != (key_BKHD.shape[0], *key_BKHD.shape[2:]):
        raise ValueError(
            f"query {tuple(query_BQHD.shape)} and key {tuple(key_BKHD.shape)}: need equal batch, heads and "
            "head dimension"
        )
    if layout is not None:
        layout.check(batch, num_heads, num_queries, key_BKHD.shape[1])
    if backend is not None:
        check_name(backend)
    elif not torch.compiler.is_compiling():  # which cannot trace a ContextVar
        backend = current_backend()
    scale = 1 / math.sqrt(head_dim) if scale is None else scale
    if layout is None and backend in (
        None,
        "native",
    ):  # able to do all that is dense, and traced by compilers
        out, lse = native.run(query_BQHD, key_BKHD, value_BKHD, None, scale, return_lse)
        return (out, lse) if lse is not None else out
    tensors = query_BQHD, key_BKHD, value_BKHD
    needs_gradient = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    request = Request.of(query_BQHD, layout, return_lse, needs_gradient)
    if backend == AUTO:
        out, lse = fastest(request, *tensors, layout, scale)
    else:
        out, lse = choose(request, backend).load()(*tensors, layout, scale, return_lse)
    if not return_lse:
        return out
    assert lse is not None
    return out, lse


def choose(request: Request, name: str | None) -> Backend:
    """The backend of that name, or the first that is able. ValueError when it is not, saying which are."""
    if name is not None:
        reason = why_not(BACKENDS[name], request)
        if reason is None:
            return BACKENDS[name]
        others = [backend.name for backend in able(request)]
        raise ValueError(f"backend={name}: {reason}; able here: {', '.join(others) or 'none'}")
    found = [backend for backend in able(request) if backend.name not in BY_NAME_ONLY]
    if not found:
        reasons = "; ".join(f"{b.name} {why_not(b, request)}" for b in BACKENDS.values())
        raise ValueError(f"no attention backend can do this: {reasons}")
    return found[0]
