"""The gated delta rule for prompts: chunk by chunk in WY form, with its gates and norms.

The maths is that of mixers.gated_delta.GatedDelta.scan (arXiv:2406.06484, section 3; decays as in
arXiv:2412.06464). Queries and keys go into products as they are: their norms, the gates and the
decays are factors of rows and columns of what the products give.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from difyops.engine.kernels.functions import block_of, softplus
from difyops.engine.kernels.spans import Spans

#: Tokens of a chunk.
_CHUNK = tl.constexpr(64)
#: Up to so many tokens for each sequence, token by token is faster.
_FEW = 32
#: Warps of what is parallel over the chunks.
_PREPARE, _READ = 4, 4
#: Of what is serial: values that one program holds the state of, its warps, chunks loaded ahead.
_CARRY = (32, 4, 2)


def pays(spans: Spans, tokens: int) -> bool:
    """Whether chunks are faster than token by token, as far as the host can say."""
    return spans.begin is not None and tokens > _FEW * len(spans.begin)


def run(
    qkv: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor,
    slots: Tensor,
    spans: Spans,
    rate: Tensor,
    dt_bias: Tensor,
    key_heads: int,
    z: Tensor,
    norm: Tensor,
    eps: float,
) -> Tensor:
    """What gated_delta.run and then norm.gated_norm answer, for packed spans: z [N, Hv * Dv] with
    rows of any stride, `norm` [Dv] -> [N, Hv * Dv] in z's dtype."""
    heads, key_dim, value_dim = state.shape[1:]
    keys = max(16, triton.next_power_of_2(key_dim))
    values = max(16, triton.next_power_of_2(value_dim))
    chunks = spans.blocks(len(qkv), _CHUNK.value)
    begin, end = spans.begin, spans.end
    sizes = (len(slots), heads // key_heads, key_heads * key_dim, key_dim, value_dim)
    rows = (chunks, heads, _CHUNK.value)
    # Of each token the decay since its chunk began, as a logarithm, and 1 / |k|.
    total, unit = torch.empty(2, *rows, dtype=torch.float32, device=qkv.device)
    w = qkv.new_empty(*rows, keys)
    new = qkv.new_empty(*rows, values)
    before = qkv.new_empty(chunks, heads, keys, values)
    precision = "tf32x3" if qkv.dtype == torch.float32 else "tf32"
    _prepare[(heads, chunks)](
        qkv, a, b, begin, end, rate, dt_bias, total, unit, w, new,
        qkv.stride(0), a.stride(0), b.stride(0), *sizes,
        KEYS=keys, VALUES=values, PRECISION=precision, num_warps=_PREPARE,
    )  # fmt: skip
    tile, warps, stages = _CARRY
    tile = min(tile, values)
    _carry[(triton.cdiv(value_dim, tile), heads, len(slots))](
        qkv, total, unit, w, new, before, state, slots, begin, end,
        qkv.stride(0), state.stride(0), *sizes[1:],
        KEYS=keys, VALUES=values, TILE=tile, PRECISION=precision, STAGES=stages, num_warps=warps,
    )  # fmt: skip
    out = torch.empty(len(qkv), heads * value_dim, dtype=z.dtype, device=z.device)
    _read[(heads, chunks)](
        qkv, z, total, unit, new, before, norm, begin, end, out,
        qkv.stride(0), z.stride(0), eps, *sizes,
        KEYS=keys, VALUES=values, PRECISION=precision, num_warps=_READ,
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["sequences"])
def _prepare(
    qkv, a, b, begin, end, rate, dt_bias, total, unit, w, new,
    qkv_step, a_step, b_step, sequences, shared, all_keys, key_dim, value_dim,
    KEYS: tl.constexpr, VALUES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """w and u of each chunk: what its corrections take from the state before it, and from v."""
    head, heads = tl.program_id(0), tl.num_programs(0)
    chunk = tl.program_id(1).to(tl.int64)
    _, _, start, last = block_of(begin, end, sequences, chunk, _CHUNK)
    if start >= last:
        return
    i, d, j = tl.arange(0, _CHUNK), tl.arange(0, KEYS), tl.arange(0, VALUES)
    token = start + i
    real = token < last
    here = (chunk * heads + head) * _CHUNK + i

    speed = -tl.exp(tl.load(rate + head).to(tl.float32))
    bias = tl.load(dt_bias + head).to(tl.float32)
    delay = softplus(tl.load(a + token * a_step + head, mask=real, other=0).to(tl.float32) + bias)
    # Without decay and without a correction the state stays as it is.
    since = tl.cumsum(tl.where(real, speed * delay, 0), 0)
    beta = tl.sigmoid(tl.load(b + token * b_step + head, mask=real, other=0).to(tl.float32))
    beta = tl.where(real, beta, 0)
    tl.store(total + here, since)

    k = tl.load(
        qkv + (token * qkv_step + all_keys + (head // shared) * key_dim)[:, None] + d[None, :],
        mask=real[:, None] & (d < key_dim)[None, :],
        other=0,
    )
    size = _unit(k)
    tl.store(unit + here, size)
    system = tl.dot(k, tl.trans(k), input_precision=PRECISION)
    system *= (beta * size)[:, None] * size[None, :]
    later = i[:, None] > i[None, :]
    inverse = _inverse(
        tl.where(later, system * _decay(since, later), 0), PRECISION
    )  # of I + system

    from_state = (inverse * (beta * size * tl.exp(since))[None, :]).to(k.dtype)
    mixed = tl.dot(from_state, k, input_precision=PRECISION)
    tl.store(w + here[:, None] * KEYS + d[None, :], mixed.to(k.dtype))
    v = tl.load(
        qkv + (token * qkv_step + 2 * all_keys + head * value_dim)[:, None] + j[None, :],
        mask=real[:, None] & (j < value_dim)[None, :],
        other=0,
    )
    mixed = tl.dot((inverse * beta[None, :]).to(v.dtype), v, input_precision=PRECISION)
    tl.store(new + here[:, None] * VALUES + j[None, :], mixed.to(v.dtype))


@triton.jit
def _carry(
    qkv, total, unit, w, new, before, state, slots, begin, end,
    qkv_step, state_step, shared, all_keys, key_dim, value_dim,
    KEYS: tl.constexpr, VALUES: tl.constexpr, TILE: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """The state before each chunk, and in place of u what each token adds to it."""
    row = tl.program_id(2).to(tl.int64)
    head, heads = tl.program_id(1), tl.num_programs(1)
    slot = tl.load(slots + row)
    first, last = tl.load(begin + row), tl.load(end + row)
    i, d = tl.arange(0, _CHUNK), tl.arange(0, KEYS)
    j = tl.program_id(0) * TILE + tl.arange(0, TILE)
    mine = (d < key_dim)[:, None] & (j < value_dim)[None, :]
    place = state + slot * state_step + head * key_dim * value_dim
    place = place + d[:, None] * value_dim + j[None, :]
    s = tl.load(place, mask=mine, other=0).to(tl.float32)

    block = (first // _CHUNK + row) * heads + head
    key = qkv + all_keys + (head // shared) * key_dim + d
    for start in tl.range(first, last, _CHUNK, num_stages=STAGES):
        here = block * _CHUNK + i
        tl.store(
            before + (block * KEYS + d)[:, None] * VALUES + j[None, :],
            s.to(before.dtype.element_ty),
        )
        seen = tl.load(w + here[:, None] * KEYS + d[None, :])
        added = tl.load(new + here[:, None] * VALUES + j[None, :]).to(tl.float32)
        added -= tl.dot(seen, s.to(seen.dtype), input_precision=PRECISION)
        tl.store(new + here[:, None] * VALUES + j[None, :], added.to(new.dtype.element_ty))
        through = tl.load(total + block * _CHUNK + _CHUNK - 1)
        left = tl.load(unit + here) * tl.exp(through - tl.load(total + here))
        k = tl.load(
            key[:, None] + ((start + i) * qkv_step)[None, :],
            mask=(d < key_dim)[:, None] & (start + i < last)[None, :],
            other=0,
        )
        added = (added * left[:, None]).to(k.dtype)
        s = s * tl.exp(through) + tl.dot(k, added, input_precision=PRECISION)
        block += heads
    tl.store(place, s.to(state.dtype.element_ty), mask=mine & (slot > 0))


@triton.jit(do_not_specialize=["sequences"])
def _read(
    qkv, z, total, unit, new, before, norm, begin, end, out,
    qkv_step, z_step, eps, sequences, shared, all_keys, key_dim, value_dim,
    KEYS: tl.constexpr, VALUES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What each query finds in the state before its chunk and among the tokens up to it, normed
    and gated."""
    head, heads = tl.program_id(0), tl.num_programs(0)
    chunk = tl.program_id(1).to(tl.int64)
    _, _, start, last = block_of(begin, end, sequences, chunk, _CHUNK)
    if start >= last:
        return
    i, d, j = tl.arange(0, _CHUNK), tl.arange(0, KEYS), tl.arange(0, VALUES)
    token = start + i
    real = token < last
    block = chunk * heads + head
    here = block * _CHUNK + i
    since, size = tl.load(total + here), tl.load(unit + here)

    query = qkv + (head // shared) * key_dim
    q = tl.load(
        query + (token * qkv_step)[:, None] + d[None, :],
        mask=real[:, None] & (d < key_dim)[None, :],
        other=0,
    )
    k = tl.load(
        query + all_keys + (token * qkv_step)[None, :] + d[:, None],
        mask=real[None, :] & (d < key_dim)[:, None],
        other=0,
    )
    earlier = i[:, None] >= i[None, :]
    shares = tl.dot(q, k, input_precision=PRECISION) * size[None, :]
    shares = tl.where(earlier, shares * _decay(since, earlier), 0)
    s = tl.load(before + (block * KEYS + d)[:, None] * VALUES + j[None, :])
    mixed = tl.dot(q, s, input_precision=PRECISION) * tl.exp(since)[:, None]
    added = tl.load(new + here[:, None] * VALUES + j[None, :])
    mixed += tl.dot(shares.to(added.dtype), added, input_precision=PRECISION)
    mixed *= (_unit(q) * tl.rsqrt(key_dim.to(tl.float32)))[:, None]

    mixed *= tl.rsqrt(tl.sum(mixed * mixed, 1) / value_dim + eps)[:, None]
    inside = real[:, None] & (j < value_dim)[None, :]
    column = head * value_dim + j
    gate = tl.load(z + (token * z_step)[:, None] + column[None, :], mask=inside, other=0)
    gate = gate.to(tl.float32)
    mixed *= tl.load(norm + j, mask=j < value_dim, other=0).to(tl.float32)[None, :]
    mixed *= gate * tl.sigmoid(gate)
    place = out + (token * heads * value_dim)[:, None] + column[None, :]
    tl.store(place, mixed.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _unit(x):
    """1 / |x| of each row."""
    x = x.to(tl.float32)
    return tl.rsqrt(tl.sum(x * x, 1) + 1e-6)


@triton.jit
def _decay(since, where):
    """From token j to token i, where i is not before j."""
    return tl.exp(tl.where(where, since[:, None] - since[None, :], 0))


@triton.jit
def _inverse(system, PRECISION: tl.constexpr):
    """(I + system)⁻¹ for a strictly lower triangular system, [64, 64].

    Blocks of 16 on the diagonal by forward substitution, row by row; then pairs of neighbours
    become one: [[A, 0], [C, B]]⁻¹ = [[A⁻¹, 0], [-B⁻¹ C A⁻¹, B⁻¹]]. (A Neumann series would lose
    its digits where keys repeat.)
    """
    n, r = tl.arange(0, 4), tl.arange(0, 16)
    diagonal = n[:, None, None, None] == n[None, None, :, None]
    parts = tl.reshape(system, (4, 16, 4, 16))
    columns = tl.permute(tl.sum(tl.where(diagonal, parts, 0), 2), (0, 2, 1))
    found = tl.where(r[:, None] == r[None, :], 1.0, 0.0)[None, :, :] + tl.zeros_like(columns)
    for i in range(1, 16):
        line = tl.sum(tl.where(r[None, None, :] == i, columns, 0), 2)
        taken = tl.sum(line[:, :, None] * found, 1)
        found = tl.where(r[None, :, None] == i, found - taken[:, None, :], found)
    inverse = tl.reshape(tl.where(diagonal, found[:, :, None, :], 0), (64, 64))

    block = tl.arange(0, 64) // 16
    apart = block[:, None] != block[None, :]
    pair = (block // 2)[:, None] == (block // 2)[None, :]
    inverse = _joined(inverse, tl.where(apart & pair, system, 0), PRECISION)
    return _joined(inverse, tl.where(pair, 0, system), PRECISION)


@triton.jit
def _joined(inverse, between, PRECISION: tl.constexpr):
    left = tl.dot(inverse, between, input_precision=PRECISION)
    return inverse - tl.dot(left, inverse, input_precision=PRECISION)
