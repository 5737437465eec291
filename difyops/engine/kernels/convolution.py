"""The short convolution, its tails moved on in place."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from difyops.engine.kernels.functions import ahead, block_of, wait
from difyops.engine.kernels.spans import Spans

#: Channels of a program of a step.
_BLOCK = 256
#: Tokens and channels of a program of several tokens, and its warps.
_TOKENS, _CHANNELS, _WARPS = 16, 256, 4


def run(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tail: Tensor,
    slots: Tensor,
    spans: Spans,
) -> Tensor:
    """mixers.convolution.ShortConvolution.recur for each token of each span: x [N, C] with rows of
    any stride, weight [C, 1, width], tail [slots + 1, C, width - 1], slots [B] -> [N, C]."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    pointers = spans.pointers
    if pointers is None and spans.count == 1 and spans.kept:
        _one(x, weight, bias, tail, slots, out)
        return out
    channels = x.shape[1]
    packed = pointers is not None
    each = triton.cdiv(spans.count, _TOKENS)
    blocks = spans.blocks(len(x), _TOKENS) if packed else each * len(slots)
    _many[(triton.cdiv(channels, _CHANNELS), blocks)](
        x, weight, weight if bias is None else bias, tail, slots, *(pointers or (slots, slots)),
        out, x.stride(0), tail.stride(0), channels, spans.count, len(slots), each,
        BIASED=bias is not None, PACKED=packed, KEPT=spans.kept, WIDTH=weight.shape[-1],
        TOKENS=_TOKENS, CHANNELS=_CHANNELS, num_warps=_WARPS,
        **ahead(x),
    )  # fmt: skip
    return out


def _one(
    x: Tensor, weight: Tensor, bias: Tensor | None, tail: Tensor, slots: Tensor, out: Tensor
) -> None:
    count, channels = x.shape
    _step[(count, triton.cdiv(channels, _BLOCK))](
        x, weight, weight if bias is None else bias, tail, slots, out,
        x.stride(0), tail.stride(0), channels,
        BIASED=bias is not None, WIDTH=weight.shape[-1], BLOCK=_BLOCK, num_warps=2,
        **ahead(x),
    )  # fmt: skip


@triton.jit
def _step(
    x, weight, bias, tail, slots, out, x_step, tail_step, channels,
    BIASED: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    AHEAD: tl.constexpr,
):  # fmt: skip
    wait(AHEAD)
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < channels
    slot = tl.load(slots + row)
    kept = inside & (slot > 0)
    seen = tail + slot * tail_step + at * (WIDTH - 1)
    new = tl.load(x + row * x_step + at, mask=inside, other=0)
    total = new.to(tl.float32) * tl.load(weight + at * WIDTH + WIDTH - 1, mask=inside, other=0)
    if BIASED:
        total += tl.load(bias + at, mask=inside, other=0)
    for back in tl.static_range(WIDTH - 1):
        old = tl.load(seen + back, mask=inside, other=0)
        total += old.to(tl.float32) * tl.load(weight + at * WIDTH + back, mask=inside, other=0)
        if back > 0:
            tl.store(seen + back - 1, old, mask=kept)
    tl.store(seen + WIDTH - 2, new, mask=kept)
    tl.store(out + row * channels + at, (total * tl.sigmoid(total)).to(new.dtype), mask=inside)


@triton.jit(do_not_specialize=["count", "sequences", "each"])
def _many(
    x, weight, bias, tail, slots, begin, end, out, x_step, tail_step, channels,
    count, sequences, each,
    BIASED: tl.constexpr, PACKED: tl.constexpr, KEPT: tl.constexpr, WIDTH: tl.constexpr,
    TOKENS: tl.constexpr, CHANNELS: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """A block of tokens of one sequence. Its first block alone reads its tail, and moves it on."""
    wait(AHEAD)
    block = tl.program_id(1).to(tl.int64)
    if PACKED:
        row, first, start, last = block_of(begin, end, sequences, block, TOKENS)
    else:
        row = block // each
        first, last = row * count, row * count + count
        start = first + block % each * TOKENS
    if start >= last:
        return
    at = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    inside = at < channels
    slot = tl.load(slots + row)
    seen = tail + slot * tail_step + at * (WIDTH - 1)
    token = start + tl.arange(0, TOKENS)
    here = inside[None, :] & (token < last)[:, None]
    total = tl.zeros([TOKENS, CHANNELS], tl.float32)
    if BIASED:
        total += tl.load(bias + at, mask=inside, other=0).to(tl.float32)[None, :]
    for back in tl.static_range(WIDTH):
        source = token - (WIDTH - 1) + back
        ours = (source >= first)[:, None]
        new = tl.load(x + (source * x_step)[:, None] + at[None, :], mask=here & ours, other=0)
        new = new.to(tl.float32)
        if start == first:
            kept = tl.maximum(WIDTH - 1 + source - first, 0)[:, None]
            old = tl.load(seen[None, :] + kept, mask=here & (source < first)[:, None], other=0)
            new += old.to(tl.float32)
        tap = tl.load(weight + at * WIDTH + back, mask=inside, other=0).to(tl.float32)
        total += tap[None, :] * new
    done = (total * tl.sigmoid(total)).to(out.dtype.element_ty)
    tl.store(out + (token * channels)[:, None] + at[None, :], done, mask=here)
    if KEPT and start == first:
        tl.debug_barrier()  # every thread has read the tail
        _move(x + at, seen, x_step, first, last, inside, inside & (slot > 0), WIDTH)


@triton.jit
def _move(x, seen, x_step, first, last, inside, kept, WIDTH: tl.constexpr):
    """Each place of a tail takes one that lies behind it: in this order nothing is lost."""
    for place in tl.static_range(WIDTH - 1):
        source = last - (WIDTH - 1) + place
        new = tl.load(x + source * x_step, mask=inside & (source >= first), other=0)
        behind = tl.maximum(WIDTH - 1 + source - first, 0)
        old = tl.load(seen + behind, mask=inside & (source < first), other=0)
        tl.store(seen + place, tl.where(source >= first, new, old), mask=kept)
