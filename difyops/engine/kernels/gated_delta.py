"""The gated delta rule token by token, with its gates and norms; the state stays in registers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from difyops.engine.kernels.functions import ahead, softplus, wait
from difyops.engine.kernels.spans import Spans

#: Values that one program holds the state of, and its warps: values do not depend on each other.
#: A step waits for memory, so tiles are large; a prompt for its own last token, so they are many.
_STEP, _PROMPT = (64, 4), (8, 1)


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
) -> Tensor:
    """mixers.gated_delta.GatedDelta.recur for each token of each span, behind the convolution.

    qkv [N, C], a and b [N, Hv], each with rows of any stride; state [slots + 1, Hv, Dk, Dv], slots
    [B] -> [N, Hv * Dv], float32. `rate` is A_log.
    """
    heads, key_dim, value_dim = state.shape[1:]
    out = torch.empty(len(qkv), heads * value_dim, dtype=torch.float32, device=qkv.device)
    tile, warps = _STEP if spans.short else _PROMPT
    tile = min(tile, triton.next_power_of_2(value_dim))
    pointers = spans.pointers
    _run[(len(slots), heads, triton.cdiv(value_dim, tile))](
        qkv, a, b, state, slots, *(pointers or (slots, slots)), rate, dt_bias, out,
        qkv.stride(0), a.stride(0), b.stride(0), state.stride(0), spans.count,
        heads // key_heads, key_heads * key_dim, key_dim, value_dim,
        PACKED=pointers is not None, KEPT=spans.kept,
        KEYS=triton.next_power_of_2(key_dim), VALUES=tile, num_warps=warps,
        **ahead(qkv),
    )  # fmt: skip
    return out


@triton.jit
def _normed(x):
    return x * tl.rsqrt(tl.sum(x * x, 0) + 1e-6)


@triton.jit
def _run(
    qkv, a, b, state, slots, begin, end, rate, dt_bias, out,
    qkv_step, a_step, b_step, state_step, count,
    shared, all_keys, key_dim, value_dim,
    PACKED: tl.constexpr, KEPT: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr,
    AHEAD: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    head, heads = tl.program_id(1), tl.num_programs(1)
    slot = tl.load(slots + row)
    i = tl.arange(0, KEYS)
    j = tl.program_id(2) * VALUES + tl.arange(0, VALUES)
    mine = (i < key_dim)[:, None] & (j < value_dim)[None, :]
    place = state + slot * state_step + head * key_dim * value_dim
    place = place + i[:, None] * value_dim + j[None, :]
    s = tl.load(place, mask=mine, other=0).to(tl.float32)
    wait(AHEAD)
    key, value = (head // shared) * key_dim + i, head * value_dim + j
    speed = -tl.exp(tl.load(rate + head).to(tl.float32))
    bias = tl.load(dt_bias + head).to(tl.float32)
    scale = tl.rsqrt(key_dim.to(tl.float32))
    if PACKED:
        first, last = tl.load(begin + row), tl.load(end + row)
    else:
        first, last = row * count, row * count + count
    # What the next token needs is on its way while this one is computed.
    there = first < last
    token = qkv + first * qkv_step
    next_q = tl.load(token + key, mask=there & (i < key_dim), other=0)
    next_k = tl.load(token + all_keys + key, mask=there & (i < key_dim), other=0)
    next_v = tl.load(token + 2 * all_keys + value, mask=there & (j < value_dim), other=0)
    next_a = tl.load(a + first * a_step + head, mask=there, other=0)
    next_b = tl.load(b + first * b_step + head, mask=there, other=0)
    for t in range(first, last):
        q, k, v = next_q.to(tl.float32), next_k.to(tl.float32), next_v.to(tl.float32)
        delay, beta = softplus(next_a.to(tl.float32) + bias), tl.sigmoid(next_b.to(tl.float32))
        there = t + 1 < last
        token = qkv + (t + 1) * qkv_step
        next_q = tl.load(token + key, mask=there & (i < key_dim), other=0)
        next_k = tl.load(token + all_keys + key, mask=there & (i < key_dim), other=0)
        next_v = tl.load(token + 2 * all_keys + value, mask=there & (j < value_dim), other=0)
        next_a = tl.load(a + (t + 1) * a_step + head, mask=there, other=0)
        next_b = tl.load(b + (t + 1) * b_step + head, mask=there, other=0)
        q, k = _normed(q) * scale, _normed(k)
        decay = tl.exp(speed * delay)
        s = s * decay
        new = beta * (v - tl.sum(k[:, None] * s, 0))
        s = s + k[:, None] * new[None, :]
        mixed = tl.sum(q[:, None] * s, 0)
        tl.store(out + t * heads * value_dim + value, mixed, mask=j < value_dim)
    if KEPT:
        tl.store(place, s.to(state.dtype.element_ty), mask=mine & (slot > 0))
