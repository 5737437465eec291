"""One token of causal sums over keys and values: linear attention, its normed kind, retention."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    slots: Tensor,
    *,
    log_decay: Tensor | None = None,
    norms: Tensor | None = None,
    eps: float = 0.0,
    elu: bool = False,
) -> Tensor:
    """mixers.sums.recur: q [B, H, Dk], k [B, Hkv, Dk], v [B, Hkv, Dv], each dense but for the
    stride of its rows; state [slots + 1, Hkv, Dk, Dv] -> [B, H, Dv], float32.

    With `norms` ([slots + 1, Hkv, Dk], the sums of k) the output is divided by q · norms + eps;
    with `elu` q and k are taken through elu(x) + 1 first. `log_decay`: [Hkv].
    """
    heads, key_dim, value_dim = state.shape[1:]
    out = torch.empty(*q.shape[:2], value_dim, dtype=torch.float32, device=q.device)
    keys, values = triton.next_power_of_2(key_dim), triton.next_power_of_2(value_dim)
    _step[(len(q), heads)](
        q, k, v, state, state if norms is None else norms, slots,
        state if log_decay is None else log_decay, out,
        q.stride(0), k.stride(0), v.stride(0), state.stride(0),
        0 if norms is None else norms.stride(0), eps, key_dim, value_dim,
        SHARED=q.shape[1] // heads, ELU=elu, NORMED=norms is not None,
        DECAYED=log_decay is not None, KEYS=keys, VALUES=values,
        num_warps=8 if keys * values >= 8192 else 4,
    )  # fmt: skip
    return out


@triton.jit
def _feature(x, ELU: tl.constexpr):
    if ELU:
        return tl.where(x > 0, x + 1, tl.exp(tl.minimum(x, 0)))
    else:
        return x


@triton.jit
def _step(
    q, k, v, state, norms, slots, log_decay, out,
    q_step, k_step, v_step, state_step, norms_step, eps, key_dim, value_dim,
    SHARED: tl.constexpr, ELU: tl.constexpr, NORMED: tl.constexpr, DECAYED: tl.constexpr,
    KEYS: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    head, heads = tl.program_id(1), tl.num_programs(1)
    slot = tl.load(slots + row)
    i, j = tl.arange(0, KEYS), tl.arange(0, VALUES)
    inside = i < key_dim
    mine = inside[:, None] & (j < value_dim)[None, :]
    place = state + slot * state_step + head * key_dim * value_dim
    place = place + i[:, None] * value_dim + j[None, :]
    s = tl.load(place, mask=mine, other=0).to(tl.float32)
    key = tl.load(k + row * k_step + head * key_dim + i, mask=inside, other=0).to(tl.float32)
    key = tl.where(inside, _feature(key, ELU), 0)
    value = tl.load(v + row * v_step + head * value_dim + j, mask=j < value_dim, other=0)
    if DECAYED:
        s = s * tl.exp(tl.load(log_decay + head).to(tl.float32))
    s = s + key[:, None] * value.to(tl.float32)[None, :]
    tl.store(place, s.to(state.dtype.element_ty), mask=mine & (slot > 0))
    if NORMED:
        total = norms + slot * norms_step + head * key_dim + i
        z = tl.load(total, mask=inside, other=0).to(tl.float32) + key
        tl.store(total, z.to(norms.dtype.element_ty), mask=inside & (slot > 0))
    for member in tl.static_range(SHARED):
        at = head * SHARED + member
        query = tl.load(q + row * q_step + at * key_dim + i, mask=inside, other=0)
        query = tl.where(inside, _feature(query.to(tl.float32), ELU), 0)
        mixed = tl.sum(query[:, None] * s, 0)
        if NORMED:
            mixed = mixed / (tl.sum(query * z, 0) + eps)
        here = out + (row * heads * SHARED + at) * value_dim + j
        tl.store(here, mixed, mask=j < value_dim)
