"""Attention over a block layout on a CPU: gathered key blocks, two batched products, a softmax in cache.

Rows that see equally many blocks run together, as many at a time as keep the logits in a core's cache.
Gathering costs a tenth of the products (2 MiB of L2, blocks of 128, head dimension 64); torch's own flash
kernel splits short query blocks into tiles of 32, which costs it a fifth of its speed. Sums are in fp32.
"""

import math

import torch
from torch import Tensor

from vidgen.kernels.attention.cpu_plan import Chunk, plan_for
from vidgen.kernels.attention.layout import BlockLayout

# B batch, Q queries, K keys, H heads, D head dimension, N = B * H, C key blocks,
# I rows (of all batch entries and heads) that run together, M blocks that each of them sees,
# q k tokens of a block of queries, of keys

LEAST_LOGIT = -87.0  # exp of less is as good as 0, and slow
SAFE_LOGIT = 60.0  # below it exp and sums of it fit fp32 unshifted; logits of normalised queries and keys are


def run(
    query_BQHD: Tensor,
    key_BKHD: Tensor,
    value_BKHD: Tensor,
    layout: BlockLayout | None,
    scale: float,
    lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """Attention [B, Q, H, D] and, if asked for, LSE [B, H, Q]."""
    if layout is None:
        layout = _everything(query_BQHD.shape[1], key_BKHD.shape[1])
    batch, num_queries, num_heads, head_dim = query_BQHD.shape
    plan = plan_for(layout, batch, num_heads)
    queries = _blocks(query_BQHD, layout.query_block).mul_(scale)
    keys, values = _blocks(key_BKHD, layout.key_block), _blocks(value_BKHD, layout.key_block)
    if not plan.sees_all:  # what nobody sees may be anything, also what no product survives
        for blocks in (keys, values):
            blocks.masked_fill_(~plan.seen_NCk.unsqueeze(-1), 0)
    weights = layout.key_log_weights_BHC
    weights_NC = None if weights is None else weights.float().expand(batch, num_heads, -1).flatten()
    fit_exp = weights is None and _largest_logit(queries, keys) <= SAFE_LOGIT
    out = torch.zeros_like(queries)
    lse_Rq = torch.full(queries.shape[:2], -math.inf)
    needs_gradient = torch.is_grad_enabled() and any(
        tensor.requires_grad for tensor in (query_BQHD, key_BKHD, value_BKHD)
    )
    space = None if needs_gradient else _Space()
    for chunk in plan.chunks:
        _attend(chunk, queries, keys, values, weights_NC, fit_exp, out, lse_Rq, space)
    out = out.view(batch, num_heads, -1, head_dim)[:, :, :num_queries]
    lse_BHQ = lse_Rq.view(batch, num_heads, -1)[:, :, :num_queries] if lse else None
    return out.transpose(1, 2).to(query_BQHD.dtype), lse_BHQ


def _attend(
    chunk: Chunk,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    weights_NC: Tensor | None,
    fit_exp: bool,
    out: Tensor,
    lse_Rq: Tensor,
    space: "_Space | None",
) -> None:
    """Fill the chunk's rows of `out` and `lse_Rq`, in memory of `space` unless gradients need all of it."""
    num_rows, num_blocks = chunk.blocks_IM.shape
    query_block, head_dim = queries.shape[1:]
    key_block = keys.shape[1]
    flat, num_keys = chunk.blocks_IM.flatten(), num_blocks * key_block

    def gathered(blocks: Tensor, name: str) -> Tensor:
        into = space and space.floats(name, (num_rows * num_blocks, key_block, head_dim))
        return torch.index_select(blocks, 0, flat, out=into).view(num_rows, num_keys, head_dim)

    logits = space and space.floats("logits", (num_rows, query_block, num_keys))
    logits = torch.bmm(queries[chunk.rows], gathered(keys, "keys").transpose(1, 2), out=logits)
    if weights_NC is not None:
        logits.add_(weights_NC[flat].repeat_interleave(key_block).view(num_rows, 1, num_keys))
    peak = None
    if not fit_exp:
        peak = _peak(chunk, logits)
        logits.sub_(peak).clamp_(LEAST_LOGIT, 0)  # 0: keys that are not seen, may be larger
    logits = logits.exp().clone() if space is None else logits.exp_()
    if chunk.keep is not None:  # after exp, which takes 20 times as long where it is given -inf
        logits[..., chunk.kept_from :].mul_(chunk.keep)
    total = logits.sum(-1, keepdim=True)
    lse_rows = total.log().squeeze(-1)
    lse_Rq[chunk.rows] = lse_rows if peak is None else lse_rows.add_(peak.squeeze(-1))
    total = total.clamp(min=torch.finfo(torch.float32).tiny)
    if space is not None and isinstance(chunk.rows, slice):
        torch.bmm(logits, gathered(values, "values"), out=out[chunk.rows]).div_(total)
    else:
        out[chunk.rows] = torch.bmm(logits, gathered(values, "values")) / total


def _peak(chunk: Chunk, logits: Tensor) -> Tensor:
    """The largest logit that each query sees [I, q, 1]; 0 where it sees none."""
    seen = logits.detach()
    if chunk.keep is not None:
        seen = seen.clone()
        seen[..., chunk.kept_from :].add_(chunk.keep.log())
    peak = seen.amax(-1, keepdim=True)
    return peak.masked_fill_(peak == -math.inf, 0)


class _Space:
    """Memory that is used over and over: fresh pages for every chunk would cost as much as the products."""

    def __init__(self) -> None:
        self._held: dict[str, Tensor] = {}

    def floats(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """An uninitialised fp32 tensor, valid until the name is asked for again."""
        size = math.prod(shape)
        if name not in self._held or self._held[name].numel() < size:
            self._held[name] = torch.empty(size)
        return self._held[name][:size].view(shape)


def _largest_logit(queries: Tensor, keys: Tensor) -> float:
    """What no logit's size exceeds: the longest query times the longest key (Cauchy and Schwarz)."""
    return (queries.detach().norm(dim=-1).max() * keys.detach().norm(dim=-1).max()).item()


def _blocks(tokens_BSHD: Tensor, block: int) -> Tensor:
    """[N * blocks, block, D] in fp32 and memory of its own, the last block of each head filled with zeros."""
    batch, length, heads, head_dim = tokens_BSHD.shape
    padded = tokens_BSHD.new_empty((batch, heads, -(-length // block) * block, head_dim), dtype=torch.float32)
    padded[:, :, :length] = tokens_BSHD.transpose(1, 2)
    padded[:, :, length:] = 0
    return padded.view(-1, block, head_dim)


def _everything(num_queries: int, num_keys: int) -> BlockLayout:
    from vidgen.kernels.attention.windows import dense

    return dense(num_queries, num_keys)
