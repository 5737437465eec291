"""The short convolution, its tails moved on in place."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from difyops.engine.kernels.functions import ahead, wait
from difyops.engine.kernels.spans import Spans

_BLOCK = 256


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
    count, channels = x.shape
    which = slots
    if pointers is not None:
        which = torch.searchsorted(pointers[1], torch.arange(count, device=x.device), right=True)
    blocks, packed = triton.cdiv(channels, _BLOCK), pointers is not None
    _many[(count, blocks)](
        x, weight, weight if bias is None else bias, tail, slots, which,
        pointers[0] if pointers else slots, out, x.stride(0), tail.stride(0), channels,
        spans.count, len(slots),
        BIASED=bias is not None, PACKED=packed, WIDTH=weight.shape[-1], BLOCK=_BLOCK, num_warps=2,
        **ahead(x),
    )  # fmt: skip
    if spans.kept:
        _move[(len(slots), blocks)](
            x, tail, slots, *(pointers or (slots, slots)), x.stride(0), tail.stride(0), channels,
            spans.count, PACKED=packed, WIDTH=weight.shape[-1], BLOCK=_BLOCK, num_warps=2,
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


@triton.jit
def _many(
    x, weight, bias, tail, slots, which, begin, out, x_step, tail_step, channels, count, sequences,
    BIASED: tl.constexpr, PACKED: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    AHEAD: tl.constexpr,
):  # fmt: skip
    wait(AHEAD)
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < channels
    if PACKED:
        # Rows behind a sequence's end belong to none: what they get does not matter.
        row = tl.minimum(tl.load(which + token), sequences - 1)
        first = tl.load(begin + row)
    else:
        row = token // count
        first = row * count
    seen = tail + tl.load(slots + row) * tail_step + at * (WIDTH - 1)
    total = tl.zeros([BLOCK], tl.float32)
    if BIASED:
        total += tl.load(bias + at, mask=inside, other=0).to(tl.float32)
    for back in tl.static_range(WIDTH):
        source = token - (WIDTH - 1) + back
        ours = source >= first
        new = tl.load(x + source * x_step + at, mask=inside & ours, other=0)
        kept = tl.maximum(WIDTH - 1 + source - first, 0)
        old = tl.load(seen + kept, mask=inside & (source < first), other=0)
        tap = tl.load(weight + at * WIDTH + back, mask=inside, other=0).to(tl.float32)
        total += tap * tl.where(ours, new, old).to(tl.float32)
    done = (total * tl.sigmoid(total)).to(out.dtype.element_ty)
    tl.store(out + token * channels + at, done, mask=inside)


@triton.jit
def _move(
    x, tail, slots, begin, end, x_step, tail_step, channels, count,
    PACKED: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    AHEAD: tl.constexpr,
):  # fmt: skip
    wait(AHEAD)
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < channels
    slot = tl.load(slots + row)
    if PACKED:
        first, last = tl.load(begin + row), tl.load(end + row)
    else:
        first, last = row * count, row * count + count
    seen = tail + slot * tail_step + at * (WIDTH - 1)
    # Each place takes one that lies behind it, or none: in this order nothing is lost.
    for place in tl.static_range(WIDTH - 1):
        source = last - (WIDTH - 1) + place
        new = tl.load(x + source * x_step + at, mask=inside & (source >= first), other=0)
        kept = tl.maximum(WIDTH - 1 + source - first, 0)
        old = tl.load(seen + kept, mask=inside & (source < first), other=0)
        tl.store(seen + place, tl.where(source >= first, new, old), mask=inside & (slot > 0))
