"""One token of Mamba-2's state space, behind its convolution."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from difyops.engine.kernels.functions import softplus


def step(
    xbc: Tensor,
    dt: Tensor,
    state: Tensor,
    slots: Tensor,
    rate: Tensor,
    dt_bias: Tensor,
    skip: Tensor,
    groups: int,
    dt_min: float,
    dt_max: float,
) -> Tensor:
    """mixers.mamba2.Mamba2.recur: xbc [B, C] and dt [B, H] with rows of any stride, state
    [slots + 1, H, P, N] -> [B, H * P], float32. `rate` is A_log, `skip` D."""
    heads, head_dim, state_dim = state.shape[1:]
    out = torch.empty(len(xbc), heads * head_dim, dtype=torch.float32, device=xbc.device)
    rows, columns = triton.next_power_of_2(head_dim), triton.next_power_of_2(state_dim)
    _step[(len(xbc), heads)](
        xbc, dt, state, slots, rate, dt_bias, skip, out,
        xbc.stride(0), dt.stride(0), state.stride(0), dt_min, dt_max,
        heads // groups, groups, head_dim, state_dim,
        ROWS=rows, COLUMNS=columns, num_warps=4,
    )  # fmt: skip
    return out


@triton.jit
def _step(
    xbc, dt, state, slots, rate, dt_bias, skip, out,
    xbc_step, dt_step, state_step, dt_min, dt_max,
    shared, groups, head_dim, state_dim, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    head, heads = tl.program_id(1), tl.num_programs(1)
    slot = tl.load(slots + row)
    p, n = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    mine = (p < head_dim)[:, None] & (n < state_dim)[None, :]
    place = state + slot * state_step + head * head_dim * state_dim
    place = place + p[:, None] * state_dim + n[None, :]
    h = tl.load(place, mask=mine, other=0).to(tl.float32)

    token = xbc + row * xbc_step
    x = tl.load(token + head * head_dim + p, mask=p < head_dim, other=0).to(tl.float32)
    token = token + heads * head_dim + (head // shared) * state_dim
    b = tl.load(token + n, mask=n < state_dim, other=0).to(tl.float32)
    c = tl.load(token + groups * state_dim + n, mask=n < state_dim, other=0).to(tl.float32)

    raw = tl.load(dt + row * dt_step + head).to(tl.float32)
    raw += tl.load(dt_bias + head).to(tl.float32)
    delay = tl.minimum(tl.maximum(softplus(raw), dt_min), dt_max)
    decay = tl.exp(-tl.exp(tl.load(rate + head).to(tl.float32)) * delay)

    h = h * decay + (delay * x)[:, None] * b[None, :]
    mixed = tl.sum(h * c[None, :], 1) + x * tl.load(skip + head).to(tl.float32)
    tl.store(place, h.to(state.dtype.element_ty), mask=mine & (slot > 0))
    tl.store(out + (row * heads + head) * head_dim + p, mixed, mask=p < head_dim)
