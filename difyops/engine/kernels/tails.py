"""The short convolution within a recurrence's kernel: for a few tokens of each sequence."""

from __future__ import annotations

import triton
import triton.language as tl

from difyops.engine.kernels.functions import wait


@triton.jit
def tokens(accepted, row, slot, COUNT: tl.constexpr, FOLD: tl.constexpr):
    """A row's first token and how many it has: COUNT each, or those accepted of what its slot
    keeps COUNT of."""
    first = row * COUNT
    count = COUNT
    if FOLD:
        first = slot * COUNT
        count = tl.load(accepted + row).to(tl.int32)
    return first, count


@triton.jit
def remembered(tail, weight, bias, channel, inside, t, BIASED: tl.constexpr, WIDTH: tl.constexpr):
    """What a tail's tokens add to the convolution at tokens t behind it: [T, channels]."""
    total = tl.zeros([t.shape[0], channel.shape[0]], tl.float32)
    if BIASED:
        total += tl.load(bias + channel, mask=inside, other=0).to(tl.float32)[None, :]
    for back in tl.static_range(WIDTH - 1):
        kept = t + back
        mine = (kept < WIDTH - 1)[:, None] & inside[None, :]
        old = tl.load(tail + channel[None, :] * (WIDTH - 1) + kept[:, None], mask=mine, other=0)
        tap = tl.load(weight + channel * WIDTH + back, mask=inside, other=0).to(tl.float32)
        total += tap[None, :] * old.to(tl.float32)
    return total


@triton.jit
def convolved(
    total, x, x_step, weight, channel, inside, t, COUNT: tl.constexpr, WIDTH: tl.constexpr
):
    """silu of the convolution: `total`, as remembered, and the tokens themselves."""
    for back in tl.static_range(WIDTH):
        source = t - (WIDTH - 1) + back
        mine = ((source >= 0) & (source < COUNT))[:, None] & inside[None, :]
        new = tl.load(x + source[:, None] * x_step + channel[None, :], mask=mine, other=0)
        tap = tl.load(weight + channel * WIDTH + back, mask=inside, other=0).to(tl.float32)
        total += tap[None, :] * new.to(tl.float32)
    return total * tl.sigmoid(total)


@triton.jit
def move(tail, x, x_step, channel, mine, count, WIDTH: tl.constexpr):
    """The tail behind `count` more tokens. All of a program must have read it, and others must not.

    Each place takes one that lies behind it, or none: in this order nothing is lost."""
    for place in tl.static_range(WIDTH - 1):
        source = count - (WIDTH - 1) + place
        new = tl.load(x + source * x_step + channel, mask=mine & (source >= 0), other=0)
        kept = tl.maximum(WIDTH - 1 + source, 0)
        from_tail = mine & (source < 0)
        old = tl.load(tail + channel * (WIDTH - 1) + kept, mask=from_tail, other=0)
        tl.store(tail + channel * (WIDTH - 1) + place, tl.where(source >= 0, new, old), mask=mine)


@triton.jit
def keep(target, x, x_step, channel, inside, t, COUNT: tl.constexpr):
    """Copy tokens' numbers: target has rows as x has."""
    mine = (t < COUNT)[:, None] & inside[None, :]
    raw = tl.load(x + t[:, None] * x_step + channel[None, :], mask=mine, other=0)
    tl.store(target[:, None] + channel[None, :], raw, mask=mine)


@triton.jit
def keep_one(target, source, mine):
    tl.store(target, tl.load(source, mask=mine, other=0), mask=mine)


@triton.jit
def pick(rows, t, n):
    """Row n of rows [T, D], t = 0..T."""
    return tl.sum(tl.where(t[:, None] == n, rows, 0), 0)


@triton.jit
def pick_one(numbers, t, n):
    return tl.sum(tl.where(t == n, numbers, 0), 0)


@triton.jit
def move_some(
    x, tail, slots, taken, x_step, tail_step, begin, channels,
    COUNT: tl.constexpr, FOLD: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    AHEAD: tl.constexpr,
):  # fmt: skip
    """The tails of channels from `begin` on, which several programs of a recurrence had read."""
    row = tl.program_id(0).to(tl.int64)
    channel = begin + tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    wait(AHEAD)
    slot = tl.load(slots + row)
    first, count = tokens(taken, row, slot, COUNT, FOLD)
    mine = (channel < channels) & (slot > 0)
    move(tail + slot * tail_step, x + first * x_step, x_step, channel, mine, count, WIDTH)
