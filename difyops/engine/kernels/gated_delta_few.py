"""The gated delta rule for a few tokens of each sequence, from the raw projections on: convolution,
gates, recurrence and gated norm in one launch, for a step, for verify and for commit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from difyops.engine.kernels.functions import ahead, softplus, wait
from difyops.engine.kernels.tails import (
    convolved,
    keep,
    keep_one,
    move,
    pick,
    pick_one,
    remembered,
    tokens,
)

#: Steps of more sequences are quicker kernel by kernel: smaller programs overlap better.
MOST = 16


class Weights(NamedTuple):
    """Of a layer: the convolution's [C, 1, width], A_log and dt_bias [Hv], the norm's [Dv]."""

    convolution: Tensor
    rate: Tensor
    dt_bias: Tensor
    norm: Tensor
    eps: float


def run(
    inputs: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    slots: Tensor,
    weights: Weights,
    key_heads: int,
    count: int,
    replay: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """`count` tokens of each sequence: qkv [B * count, C], z [B * count, Hv * Dv], a and b
    [B * count, Hv], each with rows of any stride -> [B * count, Hv * Dv], normed, in z's dtype.

    `state`: S [slots + 1, Hv, Dk, Dv] and tail [slots + 1, C, width - 1]. They move on, or with
    `replay` stay as they are: then qkv, a and b are kept there, [slots + 1, window, …].
    """
    z = inputs["z"]
    out = torch.empty(z.shape, dtype=z.dtype, device=z.device)
    _launch(inputs, state, slots, weights, key_heads, count, out=out, replay=replay)
    return out


def fold(
    replays: Sequence[Mapping[str, Tensor]],
    states: Sequence[Mapping[str, Tensor]],
    slots: Tensor,
    accepted: Tensor,
    weights: Sequence[Weights],
    key_heads: int,
) -> None:
    """Of each layer, the first `accepted` ([B]) of the tokens in its replay go into its state.
    Whatever there is of several layers lies evenly apart."""
    window = replays[0]["qkv"].shape[1]
    inputs = {name: tensor.flatten(0, 1) for name, tensor in replays[0].items()}
    layers = Layers(
        len(states),
        *(_apart([state[name] for state in states]) for name in ("S", "tail")),
        *(_apart([replay[name] for replay in replays]) for name in ("qkv", "a", "b")),
        *(_apart(of_one) for of_one in list(zip(*weights, strict=True))[:3]),
    )
    _launch(inputs, states[0], slots, weights[0], key_heads, window, accepted=accepted,
            layers=layers)  # fmt: skip


class Layers(NamedTuple):
    """How many, and how many numbers lie between one's and the next one's."""

    number: int = 1
    state: int = 0
    tail: int = 0
    qkv: int = 0
    a: int = 0
    b: int = 0
    convolution: int = 0
    rate: int = 0
    dt_bias: int = 0


def _apart(tensors: Sequence[Tensor]) -> int:
    """Raises ValueError where they do not lie evenly."""
    at = [tensor.data_ptr() // tensor.element_size() for tensor in tensors]
    steps = {b - a for a, b in pairwise(at)}
    if len(steps) > 1:
        raise ValueError("layers do not lie evenly apart")
    return steps.pop() if steps else 0


def _launch(
    inputs: Mapping[str, Tensor], state: Mapping[str, Tensor], slots: Tensor, weights: Weights,
    key_heads: int, count: int, *, out: Tensor | None = None, accepted: Tensor | None = None,
    replay: Mapping[str, Tensor] | None = None, layers: Layers | None = None,
) -> None:  # fmt: skip
    qkv, a, b = inputs["qkv"], inputs["a"], inputs["b"]
    z = inputs["z"] if out is not None else qkv
    kept, layers = replay or inputs, layers or Layers()
    heads, key_dim, value_dim = state["S"].shape[1:]
    _few[(len(slots), key_heads, layers.number)](
        qkv, z, a, b, state["S"], state["tail"], slots, slots if accepted is None else accepted,
        *weights[:4], z if out is None else out, kept["qkv"], kept["a"], kept["b"],
        qkv.stride(0), z.stride(0), a.stride(0), b.stride(0), state["S"].stride(0),
        state["tail"].stride(0), weights.eps, key_dim, value_dim, heads, qkv.shape[1],
        0 if replay is None else replay["qkv"].shape[1], *layers[1:],
        COUNT=count, TOKENS=triton.next_power_of_2(count), WIDTH=weights.convolution.shape[-1],
        SHARED=heads // key_heads, FOLD=accepted is not None, KEEP=replay is not None,
        KEYS=triton.next_power_of_2(key_dim), VALUES=triton.next_power_of_2(value_dim),
        num_warps=4, **ahead(slots),
    )  # fmt: skip


@triton.jit
def _few(
    qkv, z, a, b, state, tail, slots, accepted, conv, rate, dt_bias, norm, out,
    kept_qkv, kept_a, kept_b,
    qkv_step, z_step, a_step, b_step, state_step, tail_step, eps, key_dim, value_dim, heads,
    channels, window,
    state_layer, tail_layer, qkv_layer, a_layer, b_layer, conv_layer, rate_layer, bias_layer,
    COUNT: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr, SHARED: tl.constexpr,
    FOLD: tl.constexpr, KEEP: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr,
    AHEAD: tl.constexpr,
):  # fmt: skip
    # One program has a key head with all its value heads: nobody else reads its part of the tail.
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    layer = tl.program_id(2).to(tl.int64)
    state, tail = state + layer * state_layer, tail + layer * tail_layer
    qkv, a, b = qkv + layer * qkv_layer, a + layer * a_layer, b + layer * b_layer
    conv, rate = conv + layer * conv_layer, rate + layer * rate_layer
    dt_bias += layer * bias_layer
    slot = tl.load(slots + row)
    t, i, j = tl.arange(0, TOKENS), tl.arange(0, KEYS), tl.arange(0, VALUES)
    key, value = i < key_dim, j < value_dim
    mine = key[:, None] & value[None, :]
    size = key_dim * value_dim
    place = state + slot * state_step + head * SHARED * size + i[:, None] * value_dim + j[None, :]
    s = tl.load(place, mask=mine, other=0).to(tl.float32)
    tails = tail + slot * tail_step
    q_at = head * key_dim + i
    k_at = tl.num_programs(1) * key_dim + q_at
    v_at = 2 * tl.num_programs(1) * key_dim + head * SHARED * value_dim + j
    q = remembered(tails, conv, conv, q_at, key, t, False, WIDTH)
    k = remembered(tails, conv, conv, k_at, key, t, False, WIDTH)
    v = remembered(tails, conv, conv, v_at, value, t, False, WIDTH)
    weight = tl.load(norm + j, mask=value, other=0).to(tl.float32)
    wait(AHEAD)
    first, count = tokens(accepted, row, slot, COUNT, FOLD)
    x = qkv + first * qkv_step
    there = t < COUNT
    q = convolved(q, x, qkv_step, conv, q_at, key, t, COUNT, WIDTH)
    k = convolved(k, x, qkv_step, conv, k_at, key, t, COUNT, WIDTH)
    q = q * (tl.rsqrt(tl.sum(q * q, 1) + 1e-6) * tl.rsqrt(key_dim.to(tl.float32)))[:, None]
    k = k * tl.rsqrt(tl.sum(k * k, 1) + 1e-6)[:, None]
    for member in tl.static_range(SHARED):
        if member > 0:
            s = tl.load(place + member * size, mask=mine, other=0).to(tl.float32)
            v = remembered(tails, conv, conv, v_at + member * value_dim, value, t, False, WIDTH)
        v = convolved(v, x, qkv_step, conv, v_at + member * value_dim, value, t, COUNT, WIDTH)
        one = head * SHARED + member
        speed = -tl.exp(tl.load(rate + one).to(tl.float32))
        delay = tl.load(a + (first + t) * a_step + one, mask=there, other=0).to(tl.float32)
        delay = softplus(delay + tl.load(dt_bias + one).to(tl.float32))
        decays = tl.exp(speed * delay)
        betas = tl.sigmoid(
            tl.load(b + (first + t) * b_step + one, mask=there, other=0).to(tl.float32)
        )
        if not FOLD:
            opened = tl.load(
                z + (first + t)[:, None] * z_step + (one * value_dim + j)[None, :],
                mask=there[:, None] & value[None, :],
                other=0,
            ).to(tl.float32)
            opened = opened * tl.sigmoid(opened)
        for n in range(0, count):
            now_k, now_v = pick(k, t, n), pick(v, t, n)
            decay, beta = pick_one(decays, t, n), pick_one(betas, t, n)
            new = beta * (now_v - decay * tl.sum(now_k[:, None] * s, 0))
            if not FOLD:
                now_q = pick(q, t, n)
                # q S of the state behind this token, of that in front of it.
                mixed = decay * tl.sum(now_q[:, None] * s, 0) + tl.sum(now_q * now_k, 0) * new
                mixed = mixed * tl.rsqrt(tl.sum(mixed * mixed, 0) / value_dim + eps)
                mixed = mixed * weight * pick(opened, t, n)
                target = out + (first + n) * heads * value_dim + one * value_dim + j
                tl.store(target, mixed.to(out.dtype.element_ty), mask=value)
            s = decay * s + now_k[:, None] * new[None, :]
        if not KEEP:
            tl.store(place + member * size, s.to(state.dtype.element_ty), mask=mine & (slot > 0))
    kept = slot > 0
    if KEEP:
        rows = slot * window + t
        keep(kept_qkv + rows * channels, x, qkv_step, q_at, key & kept, t, COUNT)
        keep(kept_qkv + rows * channels, x, qkv_step, k_at, key & kept, t, COUNT)
        for member in tl.static_range(SHARED):
            at, one = v_at + member * value_dim, head * SHARED + member
            keep(kept_qkv + rows * channels, x, qkv_step, at, value & kept, t, COUNT)
            keep_one(kept_a + rows * heads + one, a + (first + t) * a_step + one, there & kept)
            keep_one(kept_b + rows * heads + one, b + (first + t) * b_step + one, there & kept)
    else:
        tl.debug_barrier()
        move(tails, x, qkv_step, q_at, key & kept, count, WIDTH)
        move(tails, x, qkv_step, k_at, key & kept, count, WIDTH)
        for member in tl.static_range(SHARED):
            move(tails, x, qkv_step, v_at + member * value_dim, value & kept, count, WIDTH)
