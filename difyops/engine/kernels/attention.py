"""Softmax attention of new tokens over paged keys and values, read where they lie.

The launches depend on the batch and the number of new tokens alone, not on any length: a graph
holds for every context.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from difyops.engine.kernels.functions import ahead, owner, wait
from difyops.engine.kernels.spans import Spans

#: Packed tokens up to which `attend` reads a prompt; for more of them libraries are faster.
SHORT = 512
_BLOCK = 64
#: Rows of queries that a program holds of a prompt: tokens and the heads that share a key head.
_ROWS = 64
#: Programs that fill a GPU, about; a long context is read by several of them.
_PROGRAMS = 256
_LEAST_SPLITS, _MOST_SPLITS = 4, 64


def place(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    table: Tensor,
    lengths: Tensor,
    slots: Tensor,
    page_size: int,
    spans: Spans,
    *,
    frequencies: Tensor | None = None,
    scale: float = 1.0,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 0.0,
    offset: float = 0.0,
) -> Tensor:
    """Norm and turn queries and keys; store keys and values behind each sequence's length.

    q [N, H, Dk], k [N, Hkv, Dk], v [N, Hkv, Dv], with dense last dimensions, of the tokens of
    each span; keys and values: a layer's pages, [rows, Hkv, D] -> q, [N, H, Dk]. `frequencies`:
    of rotary positions, [R / 2], float32; `q_norm` and `k_norm`: weights of RMS norms over Dk.
    """
    count, heads, key_dim = q.shape
    kv_heads, value_dim = values.shape[1:]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    widest = triton.next_power_of_2(max(key_dim, value_dim))
    _place[(count, heads + kv_heads)](
        q, k, v, keys, values, table, lengths, slots, *(spans.pointers or (slots, slots)),
        q if frequencies is None else frequencies, q if q_norm is None else q_norm,
        k if k_norm is None else k_norm, out,
        q.stride(0), q.stride(1), k.stride(0), v.stride(0), table.stride(0),
        eps, offset, scale,
        len(slots), spans.count, heads, kv_heads, key_dim, value_dim,
        0 if frequencies is None else frequencies.numel(),
        PACKED=spans.pointers is not None, NORMED=q_norm is not None,
        TURNED=frequencies is not None, PAGE=page_size, WIDE=widest,
        num_warps=1, **ahead(q if spans.pointers else slots),
    )  # fmt: skip
    return out


def attend(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    table: Tensor,
    lengths: Tensor,
    slots: Tensor,
    page_size: int,
    spans: Spans,
    gate: Tensor | None = None,
) -> Tensor:
    """softmax(q kᵀ / √Dk) v over the sequence and the tokens of q up to each, times sigmoid(gate).

    q [N, H, Dk], of the tokens of each span, which stand behind `lengths` and whose keys are
    stored; gate [N, H, Dv] with a dense last dimension -> [N, H, Dv]. Each split of a context
    keeps its own maximum (flash decoding, arXiv:2307.08691); a second launch joins them.
    """
    count, heads, key_dim = q.shape
    kv_heads, value_dim = values.shape[1:]
    shared = heads // kv_heads
    tokens, pieces = spans.count, len(slots)
    if spans.pointers:
        # More rows of float32 do not fit into a multiprocessor.
        tokens = max((_ROWS if q.dtype == torch.bfloat16 else 16) // shared, 1)
        pieces += triton.cdiv(count, tokens)
    splits = min(max(_PROGRAMS // (pieces * kv_heads), _LEAST_SPLITS), _MOST_SPLITS)
    splits = triton.next_power_of_2(splits)
    part = torch.empty(count * heads, splits, value_dim, dtype=torch.float32, device=q.device)
    weights = torch.empty(2, count * heads, splits, dtype=torch.float32, device=q.device)
    wide = triton.next_power_of_2(value_dim)
    early = ahead(q if spans.pointers else slots)
    _attend[(pieces, kv_heads, splits)](
        q, keys, values, table, lengths, slots, *(spans.pointers or (slots, slots)),
        part, weights[0], weights[1],
        table.stride(0), key_dim**-0.5, len(slots), key_dim, value_dim,
        PACKED=spans.pointers is not None, TOKENS=tokens, SHARED=shared,
        ROWS=max(16, triton.next_power_of_2(tokens * shared)),
        PAGE=page_size, BLOCK=_BLOCK, KEYS=max(16, triton.next_power_of_2(key_dim)),
        VALUES=max(16, wide), num_warps=4, num_stages=2, **early,
    )  # fmt: skip
    out = torch.empty(count, heads, value_dim, dtype=q.dtype, device=q.device)
    _join[(count, heads)](
        part, weights[0], weights[1], q if gate is None else gate, out,
        0 if gate is None else gate.stride(0), 0 if gate is None else gate.stride(1), value_dim,
        GATED=gate is not None, SPLITS=splits, VALUES=wide, num_warps=2, **early,
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["sequences"])
def _place(
    q, k, v, keys, values, table, lengths, slots, begin, end, frequencies, q_norm, k_norm, out,
    q_step, q_head, k_step, v_step, table_step, eps, offset, scale,
    sequences, count, heads, kv_heads, key_dim, value_dim, half,
    PACKED: tl.constexpr, NORMED: tl.constexpr, TURNED: tl.constexpr, PAGE: tl.constexpr,
    WIDE: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    wait(AHEAD)
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    if PACKED:
        row, within = owner(begin, end, sequences, token, 1)
        if row == sequences:
            return
    else:
        row, within = token // count, token % count
    slot = tl.load(slots + row)
    position = tl.load(lengths + slot) + within
    d = tl.arange(0, WIDE)
    inside = d < key_dim
    is_query = head < heads
    other = head - heads
    if is_query:
        base = q + token * q_step + head * q_head
        norm = q_norm
    else:
        base = k + token * k_step + other * key_dim
        norm = k_norm
    raw = tl.load(base + d, mask=inside, other=0)
    x = raw.to(tl.float32)
    # The dimension that each one is turned with.
    pair = tl.where(d < half, d + half, d - half)
    turned = d < 2 * half
    y = tl.load(base + pair, mask=turned & inside, other=0).to(tl.float32)
    if NORMED:
        size = tl.rsqrt(tl.sum(x * x, 0) / key_dim + eps)
        x = x * size * (tl.load(norm + d, mask=inside, other=0).to(tl.float32) + offset)
        y = y * size * (tl.load(norm + pair, mask=turned & inside, other=0).to(tl.float32) + offset)
    if TURNED:
        which = tl.where(d < half, d, d - half)
        angle = position.to(tl.float32) * tl.load(frequencies + which, mask=turned, other=0)
        cos, sin = tl.cos(angle) * scale, tl.sin(angle) * scale
        x = tl.where(turned, x * cos + tl.where(d < half, -y, y) * sin, x)
    if is_query:
        tl.store(out + (token * heads + head) * key_dim + d, x.to(raw.dtype), mask=inside)
    else:
        page = tl.load(table + slot * table_step + position // PAGE)
        place = (page * PAGE + position % PAGE) * kv_heads + other
        tl.store(keys + place * key_dim + d, x.to(raw.dtype), mask=inside)
        value = tl.load(v + token * v_step + other * value_dim + d, mask=d < value_dim, other=0)
        tl.store(values + place * value_dim + d, value, mask=d < value_dim)


@triton.jit(do_not_specialize=["sequences"])
def _attend(
    q, keys, values, table, lengths, slots, begin, end, part, tops, sums,
    table_step, scale, sequences, key_dim, value_dim,
    PACKED: tl.constexpr, TOKENS: tl.constexpr, SHARED: tl.constexpr, ROWS: tl.constexpr,
    PAGE: tl.constexpr, BLOCK: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr,
    AHEAD: tl.constexpr,
):  # fmt: skip
    wait(AHEAD)
    piece, head, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    kv_heads, splits = tl.num_programs(1), tl.num_programs(2)
    if PACKED:
        row, number = owner(begin, end, sequences, piece, TOKENS)
        if row == sequences:
            return
        first = tl.load(begin + row) + number * TOKENS
        count = tl.minimum(tl.load(end + row) - first, TOKENS).to(tl.int32)
        slot = tl.load(slots + row)
        length = (tl.load(lengths + slot) + number * TOKENS).to(tl.int32)
    else:
        first, count = piece * TOKENS, TOKENS
        slot = tl.load(slots + piece)
        length = tl.load(lengths + slot).to(tl.int32)
    total = length + count
    each = tl.cdiv(tl.cdiv(total, splits), BLOCK) * BLOCK
    start = split * each
    stop = tl.minimum(start + each, total)

    # A row for each new token and each query head of this key head.
    m = tl.arange(0, ROWS)
    real = m < count * SHARED
    query = (first + m // SHARED) * (kv_heads * SHARED) + head * SHARED + m % SHARED
    i, j = tl.arange(0, KEYS), tl.arange(0, VALUES)
    x = tl.load(
        q + query[:, None] * key_dim + i[None, :],
        mask=real[:, None] & (i < key_dim)[None, :],
        other=0,
    )
    top = tl.full([ROWS], -1e30, tl.float32)
    weight = tl.zeros([ROWS], tl.float32)
    mixed = tl.zeros([ROWS, VALUES], tl.float32)
    for begin in range(start, stop, BLOCK):
        n = begin + tl.arange(0, BLOCK)
        inside = n < stop
        page = tl.load(table + slot * table_step + n // PAGE, mask=inside, other=0)
        place = (page * PAGE + n % PAGE) * kv_heads + head
        k = tl.load(
            keys + place[None, :] * key_dim + i[:, None],
            mask=inside[None, :] & (i < key_dim)[:, None],
            other=0,
        )
        scores = tl.dot(x, k, input_precision="ieee") * scale
        seen = inside[None, :] & (n[None, :] <= length + (m // SHARED)[:, None])
        scores = tl.where(seen, scores, -1e30)
        highest = tl.maximum(top, tl.max(scores, 1))
        shares = tl.where(seen, tl.exp(scores - highest[:, None]), 0)
        rescale = tl.exp(top - highest)
        weight = weight * rescale + tl.sum(shares, 1)
        v = tl.load(
            values + place[:, None] * value_dim + j[None, :],
            mask=inside[:, None] & (j < value_dim)[None, :],
            other=0,
        )
        mixed = mixed * rescale[:, None]
        mixed += tl.dot(shares.to(v.dtype), v, input_precision="ieee")
        top = highest
    here = query * splits + split
    tl.store(tops + here, top, mask=real)
    tl.store(sums + here, weight, mask=real)
    if start < stop:
        tl.store(
            part + here[:, None] * value_dim + j[None, :],
            mixed,
            mask=real[:, None] & (j < value_dim)[None, :],
        )


@triton.jit
def _join(
    part, tops, sums, gate, out, gate_step, gate_head, value_dim,
    GATED: tl.constexpr, SPLITS: tl.constexpr, VALUES: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    wait(AHEAD)
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    query = token * tl.num_programs(1) + head
    s, j = tl.arange(0, SPLITS), tl.arange(0, VALUES)
    weight = tl.load(sums + query * SPLITS + s)
    top = tl.load(tops + query * SPLITS + s)
    share = tl.where(weight > 0, tl.exp(top - tl.max(top, 0)), 0)
    mixed = tl.load(
        part + (query * SPLITS + s)[:, None] * value_dim + j[None, :],
        mask=(weight > 0)[:, None] & (j < value_dim)[None, :],
        other=0,
    )
    total = tl.sum(mixed * share[:, None], 0) / tl.sum(weight * share, 0)
    if GATED:
        opened = tl.load(
            gate + token * gate_step + head * gate_head + j, mask=j < value_dim, other=0
        )
        total = total * tl.sigmoid(opened.to(tl.float32))
    tl.store(out + query * value_dim + j, total.to(out.dtype.element_ty), mask=j < value_dim)
