"""Mamba-2's state space token by token, behind its convolution; the state stays in registers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from difyops.engine.kernels.functions import ahead, softplus, wait
from difyops.engine.kernels.spans import Spans

#: Rows of a head's state that one program holds, and its warps; see gated_delta.py.
_STEP, _PROMPT = (16, 1), (4, 1)


def run(
    xbc: Tensor,
    dt: Tensor,
    state: Tensor,
    slots: Tensor,
    spans: Spans,
    rate: Tensor,
    dt_bias: Tensor,
    skip: Tensor,
    groups: int,
    dt_min: float,
    dt_max: float,
) -> Tensor:
    """mixers.mamba2.Mamba2.recur for each token of each span: xbc [N, C] and dt [N, H] with rows
    of any stride, state [slots + 1, H, P, D], slots [B] -> [N, H * P], float32. `rate` is A_log,
    `skip` D."""
    heads, head_dim, state_dim = state.shape[1:]
    out = torch.empty(len(xbc), heads * head_dim, dtype=torch.float32, device=xbc.device)
    tile, warps = _STEP if spans.short else _PROMPT
    tile = min(tile, triton.next_power_of_2(head_dim))
    pointers = spans.pointers
    _run[(len(slots), heads, triton.cdiv(head_dim, tile))](
        xbc, dt, state, slots, *(pointers or (slots, slots)), rate, dt_bias, skip, out,
        xbc.stride(0), dt.stride(0), state.stride(0), spans.count, dt_min, dt_max,
        heads // groups, groups, head_dim, state_dim,
        PACKED=pointers is not None, KEPT=spans.kept,
        ROWS=tile, COLUMNS=triton.next_power_of_2(state_dim), num_warps=warps,
        **ahead(xbc),
    )  # fmt: skip
    return out


@triton.jit
def _run(
    xbc, dt, state, slots, begin, end, rate, dt_bias, skip, out,
    xbc_step, dt_step, state_step, count, dt_min, dt_max,
    shared, groups, head_dim, state_dim,
    PACKED: tl.constexpr, KEPT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    AHEAD: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    head, heads = tl.program_id(1), tl.num_programs(1)
    slot = tl.load(slots + row)
    p = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    n = tl.arange(0, COLUMNS)
    mine = (p < head_dim)[:, None] & (n < state_dim)[None, :]
    place = state + slot * state_step + head * head_dim * state_dim
    place = place + p[:, None] * state_dim + n[None, :]
    h = tl.load(place, mask=mine, other=0).to(tl.float32)
    wait(AHEAD)
    speed = -tl.exp(tl.load(rate + head).to(tl.float32))
    bias, through = tl.load(dt_bias + head).to(tl.float32), tl.load(skip + head).to(tl.float32)
    inner, column = heads * head_dim, (head // shared) * state_dim + n
    if PACKED:
        first, last = tl.load(begin + row), tl.load(end + row)
    else:
        first, last = row * count, row * count + count
    # What the next token needs is on its way while this one is computed.
    there = first < last
    token, shared_part = xbc + first * xbc_step, inner + column
    next_x = tl.load(token + head * head_dim + p, mask=there & (p < head_dim), other=0)
    next_b = tl.load(token + shared_part, mask=there & (n < state_dim), other=0)
    next_c = tl.load(
        token + groups * state_dim + shared_part, mask=there & (n < state_dim), other=0
    )
    next_dt = tl.load(dt + first * dt_step + head, mask=there, other=0)
    for t in range(first, last):
        x, b, c = next_x.to(tl.float32), next_b.to(tl.float32), next_c
        delay = softplus(next_dt.to(tl.float32) + bias)
        there = t + 1 < last
        token = xbc + (t + 1) * xbc_step
        next_x = tl.load(token + head * head_dim + p, mask=there & (p < head_dim), other=0)
        next_b = tl.load(token + shared_part, mask=there & (n < state_dim), other=0)
        next_c = tl.load(
            token + groups * state_dim + shared_part, mask=there & (n < state_dim), other=0
        )
        next_dt = tl.load(dt + (t + 1) * dt_step + head, mask=there, other=0)
        delay = tl.minimum(tl.maximum(delay, dt_min), dt_max)
        h = h * tl.exp(speed * delay) + (delay * x)[:, None] * b[None, :]
        mixed = tl.sum(h * c.to(tl.float32)[None, :], 1) + x * through
        tl.store(out + t * inner + head * head_dim + p, mixed, mask=p < head_dim)
    if KEPT:
        tl.store(place, h.to(state.dtype.element_ty), mask=mine & (slot > 0))
