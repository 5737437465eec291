"""One token of the gated delta rule, with its gates, norms and the gated output norm."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from difyops.engine.kernels.functions import softplus


def step(
    qkv: Tensor,
    a: Tensor,
    b: Tensor,
    z: Tensor,
    state: Tensor,
    slots: Tensor,
    rate: Tensor,
    dt_bias: Tensor,
    weight: Tensor,
    eps: float,
    key_heads: int,
) -> Tensor:
    """mixers.gated_delta.GatedDelta.recur and its norm, behind the convolution.

    qkv [B, C], a and b [B, Hv], z [B, Hv * Dv], each with rows of any stride; state
    [slots + 1, Hv, Dk, Dv] -> [B, Hv * Dv]. `rate` is A_log, `weight` and `eps` the norm's.
    """
    heads, key_dim, value_dim = state.shape[1:]
    out = torch.empty(len(qkv), heads * value_dim, dtype=z.dtype, device=z.device)
    keys, values = triton.next_power_of_2(key_dim), triton.next_power_of_2(value_dim)
    _step[(len(qkv), heads)](
        qkv, a, b, z, state, slots, rate, dt_bias, weight, out,
        qkv.stride(0), a.stride(0), b.stride(0), z.stride(0), state.stride(0), eps,
        heads // key_heads, key_heads * key_dim, key_dim, value_dim,
        KEYS=keys, VALUES=values, num_warps=8 if keys * values >= 8192 else 4,
    )  # fmt: skip
    return out


@triton.jit
def _normed(x):
    return x * tl.rsqrt(tl.sum(x * x, 0) + 1e-6)


@triton.jit
def _step(
    qkv, a, b, z, state, slots, rate, dt_bias, weight, out,
    qkv_step, a_step, b_step, z_step, state_step, eps,
    shared, all_keys, key_dim, value_dim, KEYS: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    slot = tl.load(slots + row)
    i, j = tl.arange(0, KEYS), tl.arange(0, VALUES)
    mine = (i < key_dim)[:, None] & (j < value_dim)[None, :]
    place = state + slot * state_step + head * key_dim * value_dim
    place = place + i[:, None] * value_dim + j[None, :]
    s = tl.load(place, mask=mine, other=0).to(tl.float32)

    token = qkv + row * qkv_step
    key = (head // shared) * key_dim + i
    q = tl.load(token + key, mask=i < key_dim, other=0).to(tl.float32)
    k = tl.load(token + all_keys + key, mask=i < key_dim, other=0).to(tl.float32)
    value = head * value_dim + j
    v = tl.load(token + 2 * all_keys + value, mask=j < value_dim, other=0).to(tl.float32)
    q = _normed(q) * tl.rsqrt(key_dim.to(tl.float32))
    k = _normed(k)

    x = tl.load(a + row * a_step + head).to(tl.float32) + tl.load(dt_bias + head).to(tl.float32)
    decay = tl.exp(-tl.exp(tl.load(rate + head).to(tl.float32)) * softplus(x))
    beta = tl.sigmoid(tl.load(b + row * b_step + head).to(tl.float32))

    s = s * decay
    new = beta * (v - tl.sum(k[:, None] * s, 0))
    s = s + k[:, None] * new[None, :]
    mixed = tl.sum(q[:, None] * s, 0)
    tl.store(place, s.to(state.dtype.element_ty), mask=mine & (slot > 0))

    mixed = mixed * tl.rsqrt(tl.sum(mixed * mixed, 0) / value_dim + eps)
    mixed = mixed * tl.load(weight + j, mask=j < value_dim, other=0).to(tl.float32)
    gate = tl.load(z + row * z_step + value, mask=j < value_dim, other=0).to(tl.float32)
    mixed = mixed * gate * tl.sigmoid(gate)
    tl.store(
        out + row * (tl.num_programs(1) * value_dim) + value,
        mixed.to(out.dtype.element_ty),
        mask=j < value_dim,
    )
