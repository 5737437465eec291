"""One token of the short convolution, its tail moved on in place."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 256


def step(x: Tensor, weight: Tensor, bias: Tensor | None, tail: Tensor, slots: Tensor) -> Tensor:
    """mixers.convolution.ShortConvolution.recur: x [B, C] with rows of any stride, weight
    [C, 1, width], tail [slots + 1, C, width - 1], slots [B] -> [B, C]."""
    count, channels = x.shape
    out = torch.empty(count, channels, dtype=x.dtype, device=x.device)
    _step[(count, triton.cdiv(channels, _BLOCK))](
        x, weight, weight if bias is None else bias, tail, slots, out,
        x.stride(0), tail.stride(0), channels,
        BIASED=bias is not None, WIDTH=weight.shape[-1], BLOCK=_BLOCK, num_warps=2,
    )  # fmt: skip
    return out


@triton.jit
def _step(
    x, weight, bias, tail, slots, out, x_step, tail_step, channels,
    BIASED: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
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
