"""The forward pass of attention over a block layout, on the device.

A program owns a tile of queries of one row and head, and walks the row's lists of key blocks with an online
softmax (arXiv 1805.02867) in fp32 and base 2, as FlashAttention 2 does (arXiv 2307.08691).
"""

import triton
import triton.language as tl

from vidgen.kernels.triton_device import rounded


@triton.jit
def load_tile(pointers, is_there, is_channel, CHECK: tl.constexpr, PAD: tl.constexpr, UPCAST: tl.constexpr):
    """A tile of keys or values, with zeros where none are; PAD: some channels are none."""
    if CHECK and PAD:
        tile = tl.load(pointers, mask=is_there & is_channel, other=0.0)
    elif CHECK:
        tile = tl.load(pointers, mask=is_there, other=0.0)
    elif PAD:
        tile = tl.load(pointers, mask=is_channel, other=0.0)
    else:
        tile = tl.load(pointers)
    if UPCAST:  # the interpreter multiplies bit patterns of bf16 (triton issue 11584)
        tile = tile.to(tl.float32)
    return tile


@triton.jit
def _attend(
    acc,
    top,
    total,
    queries,
    key,
    value,
    key_stride,
    value_stride,
    num_keys,
    scale_log2,
    first,
    stop,
    indices,
    tile_ids,
    tiles,
    lengths,
    weights,
    KEY_BLOCK: tl.constexpr,
    KEY_TILE: tl.constexpr,
    TILE_AREA: tl.constexpr,
    CHECK: tl.constexpr,
    DIM: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """(weighted values, highest logits, sums of weights) after steps first..stop, each a tile of keys.

    The keys are those of the listed blocks, or all where there is no list; CHECK: some may not be there.
    """
    PARTS: tl.constexpr = KEY_BLOCK // KEY_TILE
    PAD: tl.constexpr = DIM != queries.shape[1]
    rows = tl.arange(0, queries.shape[0])
    columns = tl.arange(0, KEY_TILE)
    channels = tl.arange(0, queries.shape[1])
    key_offsets = columns[None, :] * key_stride + channels[:, None]
    value_offsets = columns[:, None] * value_stride + channels[None, :]
    tile_offsets = rows[:, None] * KEY_BLOCK + columns[None, :]
    is_channel = channels < DIM
    for step in range(first, stop):
        entry = step // PARTS
        inside = (step - entry * PARTS) * KEY_TILE
        block = entry
        if indices is not None:
            block = tl.load(indices + entry)
        start = block * KEY_BLOCK + inside
        far = tl.cast(start, tl.int64)  # a long video's offsets pass 2**31
        there = columns < num_keys - start
        if lengths is not None:
            there = there & (columns < tl.load(lengths + block) - inside)
        keys = load_tile(
            key + far * key_stride + key_offsets, there[None, :], is_channel[:, None], CHECK, PAD, UPCAST
        )
        logits = tl.dot(queries, keys, input_precision=PRECISION)
        if CHECK:
            logits = tl.where(there[None, :], logits, float("-inf"))
        if tiles is not None:
            tile = tl.cast(tl.load(tile_ids + entry), tl.int64) * TILE_AREA + inside
            seen = tl.load(tiles + tile + tile_offsets)
            logits = tl.where(seen != 0, logits, float("-inf"))
        highest = tl.max(logits, 1) * scale_log2
        if weights is not None:
            weight = tl.load(weights + block) * 1.4426950408889634  # to base 2
            highest += weight
        highest = tl.maximum(top, highest)
        shift = highest
        if CHECK or tiles is not None or weights is not None:  # a query may have seen nothing yet
            shift = tl.where(highest == float("-inf"), 0.0, highest)
        faded = tl.exp2(top - shift)
        if weights is not None:
            shift -= weight
        shares = tl.exp2(logits * scale_log2 - shift[:, None])
        values = load_tile(
            value + far * value_stride + value_offsets,
            there[:, None],
            is_channel[None, :],
            CHECK,
            PAD,
            UPCAST,
        )
        acc = tl.dot(shares.to(values.dtype), values, acc * faded[:, None], input_precision=PRECISION)
        total = total * faded + tl.sum(shares, 1)
        top = highest
    return acc, top, total


@triton.jit
def forward_kernel(
    query,
    key,
    value,
    out,
    lse,
    query_strides,
    key_strides,
    value_strides,
    out_strides,
    num_heads,
    num_queries,
    num_keys,
    scale_log2,
    order,
    full_counts,
    full_indices,
    partial_counts,
    partial_indices,
    tile_ids,
    tiles,
    lengths,
    weights,
    full_steps,
    partial_steps,
    length_steps,
    weight_steps,
    num_rows,
    longest_full,
    longest_partial,
    QUERY_BLOCK: tl.constexpr,  # 0: dense
    KEY_BLOCK: tl.constexpr,
    RAGGED: tl.constexpr,  # the last key block is shorter
    DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    QUERY_TILE: tl.constexpr,
    KEY_TILE: tl.constexpr,
):
    DENSE: tl.constexpr = QUERY_BLOCK == 0
    HAS_LENGTHS: tl.constexpr = lengths is not None  # pyright: ignore[reportAssignmentType]
    MAY_LACK: tl.constexpr = DENSE or RAGGED or HAS_LENGTHS
    QUERIES: tl.constexpr = QUERY_TILE if DENSE else QUERY_BLOCK  # of a row
    KEYS: tl.constexpr = KEY_TILE if DENSE else KEY_BLOCK

    # which queries
    number = tl.program_id(0) // (QUERIES // QUERY_TILE)
    inside_row = tl.program_id(0) % (QUERIES // QUERY_TILE) * QUERY_TILE
    if DENSE:
        num_rows = tl.cdiv(num_queries, QUERY_TILE)
    else:
        number = tl.load(order + number)
    row = number % num_rows
    head = tl.cast(number // num_rows % num_heads, tl.int64)
    batch = tl.cast(number // num_rows // num_heads, tl.int64)
    first_query = row * QUERIES + inside_row
    far = tl.cast(first_query, tl.int64)

    # which keys, in steps of a tile: up to `whole` none can be missing, at `stop` the full list ends
    if DENSE:
        whole = num_keys // KEY_TILE
        stop = tl.cdiv(num_keys, KEY_TILE)
    else:
        listed = batch * full_steps[0] + head * full_steps[1] + row
        full_indices += listed * longest_full
        count = tl.load(full_counts + listed)
        stop = count * (KEYS // KEY_TILE)
        whole = tl.maximum(count - 1, 0) * (KEYS // KEY_TILE) if RAGGED else stop
    if HAS_LENGTHS:
        whole = 0
        lengths += batch * length_steps[0] + head * length_steps[1]
    if weights is not None:
        weights += batch * weight_steps[0] + head * weight_steps[1]
    if tiles is not None:
        listed = batch * partial_steps[0] + head * partial_steps[1] + row
        partial_indices += listed * longest_partial
        tile_ids += listed * longest_partial
        partial_stop = tl.load(partial_counts + listed) * (KEYS // KEY_TILE)
        tiles += inside_row * KEYS

    rows = tl.arange(0, QUERY_TILE)
    channels = tl.arange(0, PADDED_DIM)
    is_element = (rows < num_queries - first_query)[:, None] & (channels < DIM)[None, :]
    query += batch * query_strides[0] + far * query_strides[1] + head * query_strides[2]
    queries = tl.load(
        query + rows[:, None] * query_strides[1] + channels[None, :], mask=is_element, other=0.0
    )
    if UPCAST:
        queries = queries.to(tl.float32)
    key += batch * key_strides[0] + head * key_strides[2]
    value += batch * value_strides[0] + head * value_strides[2]

    acc = tl.zeros((QUERY_TILE, PADDED_DIM), tl.float32)
    top = tl.full((QUERY_TILE,), float("-inf"), tl.float32)
    total = tl.zeros((QUERY_TILE,), tl.float32)
    if not HAS_LENGTHS:
        acc, top, total = _attend(
            acc, top, total, queries, key, value, key_strides[1], value_strides[1], num_keys, scale_log2,
            0, whole, full_indices, None, None, None, weights,
            KEYS, KEY_TILE, QUERIES * KEYS, False, DIM, PRECISION, UPCAST,
        )  # fmt: skip
    if MAY_LACK:
        acc, top, total = _attend(
            acc, top, total, queries, key, value, key_strides[1], value_strides[1], num_keys, scale_log2,
            whole, stop, full_indices, None, None, lengths, weights,
            KEYS, KEY_TILE, QUERIES * KEYS, True, DIM, PRECISION, UPCAST,
        )  # fmt: skip
    if tiles is not None:
        acc, top, total = _attend(
            acc, top, total, queries, key, value, key_strides[1], value_strides[1], num_keys, scale_log2,
            0, partial_stop, partial_indices, tile_ids, tiles, lengths, weights,
            KEYS, KEY_TILE, QUERIES * KEYS, MAY_LACK, DIM, PRECISION, UPCAST,
        )  # fmt: skip

    is_blind = total == 0.0
    total = tl.where(is_blind, 1.0, total)
    acc /= total[:, None]
    out += batch * out_strides[0] + far * out_strides[1] + head * out_strides[2]
    tl.store(
        out + rows[:, None] * out_strides[1] + channels[None, :],
        rounded(acc, out),
        mask=is_element,
    )
    if lse is not None:
        found = tl.where(is_blind, float("-inf"), (top + tl.log2(total)) * 0.6931471805599453)
        lse += (batch * num_heads + head) * num_queries + first_query
        tl.store(lse + rows, found, mask=rows < num_queries - first_query)
