"""Mamba-2's state space for a few tokens of each sequence, from the raw projections on:
convolution, time steps, recurrence and gate in one launch, for verify and for commit. A step is
quicker kernel by kernel: all heads of a group would convolve its B and C again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from difyops.engine.kernels.functions import ahead, softplus, wait
from difyops.engine.kernels.tails import (
    convolved,
    keep,
    move,
    move_some,
    pick,
    pick_one,
    remembered,
    tokens,
)

_BLOCK = 256


class Weights(NamedTuple):
    """Of a layer: the convolution's [C, 1, width] and [C], A_log, dt_bias and D [H]."""

    convolution: Tensor
    bias: Tensor | None
    rate: Tensor
    dt_bias: Tensor
    skip: Tensor
    groups: int
    dt_min: float
    dt_max: float


def run(
    inputs: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    slots: Tensor,
    weights: Weights,
    count: int,
    replay: Mapping[str, Tensor],
) -> Tensor:
    """`count` tokens of each sequence: xBC [B * count, C], gate [B * count, H * P] and dt
    [B * count, H], each with rows of any stride -> y * silu(gate), [B * count, H * P], float32.

    `state`: h [slots + 1, H, P, N] and tail [slots + 1, C, width - 1] stay as they are; xBC and dt
    are kept in `replay`, [slots + 1, window, …].
    """
    gate = inputs["gate"]
    out = torch.empty(gate.shape, dtype=torch.float32, device=gate.device)
    _launch(inputs, state, slots, weights, count, out=out, replay=replay)
    return out


def fold(
    replay: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    slots: Tensor,
    accepted: Tensor,
    weights: Weights,
) -> None:
    """The first `accepted` ([B]) of the tokens in `replay` go into the state."""
    inputs = {name: tensor.flatten(0, 1) for name, tensor in replay.items()}
    _launch(inputs, state, slots, weights, replay["xBC"].shape[1], accepted=accepted)


def _launch(
    inputs: Mapping[str, Tensor], state: Mapping[str, Tensor], slots: Tensor, weights: Weights,
    count: int, *, out: Tensor | None = None, accepted: Tensor | None = None,
    replay: Mapping[str, Tensor] | None = None,
) -> None:  # fmt: skip
    w, xbc, dt, tail = weights, inputs["xBC"], inputs["dt"], state["tail"]
    gate = inputs["gate"] if out is not None else xbc
    kept = replay or inputs
    heads, head_dim, state_dim = state["h"].shape[1:]
    channels, taken = xbc.shape[1], slots if accepted is None else accepted
    width, folds = w.convolution.shape[-1], accepted is not None
    _few[(len(slots), heads)](
        xbc, gate, dt, state["h"], tail, slots, taken,
        w.convolution, w.convolution if w.bias is None else w.bias, w.rate, w.dt_bias, w.skip,
        gate if out is None else out, kept["xBC"], kept["dt"],
        xbc.stride(0), gate.stride(0), dt.stride(0), state["h"].stride(0), tail.stride(0),
        w.dt_min, w.dt_max, heads // w.groups, w.groups, head_dim, state_dim, channels,
        0 if replay is None else replay["xBC"].shape[1],
        COUNT=count, TOKENS=triton.next_power_of_2(count), WIDTH=width,
        BIASED=w.bias is not None, FOLD=folds, KEEP=replay is not None,
        ROWS=triton.next_power_of_2(head_dim), COLUMNS=triton.next_power_of_2(state_dim),
        num_warps=8, **ahead(slots),
    )  # fmt: skip
    if replay is not None:
        return
    inner = heads * head_dim
    move_some[(len(slots), triton.cdiv(channels - inner, _BLOCK))](
        xbc, tail, slots, taken, xbc.stride(0), tail.stride(0), inner, channels,
        COUNT=count, FOLD=folds, WIDTH=width, BLOCK=_BLOCK, num_warps=2, **ahead(slots),
    )  # fmt: skip


@triton.jit
def _few(
    xbc, gate, dt, state, tail, slots, accepted, conv, conv_bias, rate, dt_bias, skip, out,
    kept_xbc, kept_dt,
    xbc_step, gate_step, dt_step, state_step, tail_step, dt_min, dt_max,
    shared, groups, head_dim, state_dim, channels, window,
    COUNT: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr, BIASED: tl.constexpr,
    FOLD: tl.constexpr, KEEP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    AHEAD: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    head, heads = tl.program_id(1), tl.num_programs(1)
    slot = tl.load(slots + row)
    t, p, n = tl.arange(0, TOKENS), tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    ours, inside = p < head_dim, n < state_dim
    mine = ours[:, None] & inside[None, :]
    place = state + slot * state_step + head * head_dim * state_dim
    place = place + p[:, None] * state_dim + n[None, :]
    h = tl.load(place, mask=mine, other=0).to(tl.float32)
    tails = tail + slot * tail_step
    x_at = head * head_dim + p
    b_at = heads * head_dim + (head // shared) * state_dim + n
    c_at = b_at + groups * state_dim
    x = remembered(tails, conv, conv_bias, x_at, ours, t, BIASED, WIDTH)
    b = remembered(tails, conv, conv_bias, b_at, inside, t, BIASED, WIDTH)
    c = remembered(tails, conv, conv_bias, c_at, inside, t, BIASED, WIDTH)
    speed = -tl.exp(tl.load(rate + head).to(tl.float32))
    through = tl.load(skip + head).to(tl.float32)
    later = tl.load(dt_bias + head).to(tl.float32)
    wait(AHEAD)
    first, count = tokens(accepted, row, slot, COUNT, FOLD)
    raw = xbc + first * xbc_step
    there = t < COUNT
    x = convolved(x, raw, xbc_step, conv, x_at, ours, t, COUNT, WIDTH)
    b = convolved(b, raw, xbc_step, conv, b_at, inside, t, COUNT, WIDTH)
    c = convolved(c, raw, xbc_step, conv, c_at, inside, t, COUNT, WIDTH)
    raw_dt = tl.load(dt + (first + t) * dt_step + head, mask=there, other=0)
    delays = softplus(raw_dt.to(tl.float32) + later)
    delays = tl.minimum(tl.maximum(delays, dt_min), dt_max)
    if not FOLD:
        opened = tl.load(
            gate + (first + t)[:, None] * gate_step + x_at[None, :],
            mask=there[:, None] & ours[None, :],
            other=0,
        ).to(tl.float32)
        opened = opened * tl.sigmoid(opened)
    for m in range(0, count):
        now_x, delay = pick(x, t, m), pick_one(delays, t, m)
        h = h * tl.exp(speed * delay) + (delay * now_x)[:, None] * pick(b, t, m)[None, :]
        if not FOLD:
            mixed = tl.sum(h * pick(c, t, m)[None, :], 1) + now_x * through
            target = out + (first + m) * heads * head_dim + x_at
            tl.store(target, mixed * pick(opened, t, m), mask=ours)
    kept = slot > 0
    if KEEP:
        rows = slot * window + t
        keep(kept_xbc + rows * channels, raw, xbc_step, x_at, ours & kept, t, COUNT)
        alone = inside & kept & (head % shared == 0)
        keep(kept_xbc + rows * channels, raw, xbc_step, b_at, alone, t, COUNT)
        keep(kept_xbc + rows * channels, raw, xbc_step, c_at, alone, t, COUNT)
        tl.store(kept_dt + rows * heads + head, raw_dt, mask=there & kept)
    else:
        tl.store(place, h.to(state.dtype.element_ty), mask=mine & kept)
        tl.debug_barrier()
        # B and C are read by all heads of the group: their tails move in another launch.
        move(tails, raw, xbc_step, x_at, ours & kept, count, WIDTH)
