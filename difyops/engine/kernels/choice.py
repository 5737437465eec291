"""The token of the largest logit."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from difyops.engine.kernels.functions import ahead, wait

_BLOCK = 4096


def best(logits: Tensor, broken: int, out: Tensor) -> Tensor:
    """The first largest logit's place in each row, or `broken` where one is no number:
    logits [B, V], V below 2²⁴ -> out [B], int64."""
    count, size = logits.shape
    blocks = triton.cdiv(size, _BLOCK)
    tops = torch.empty(2, count, blocks, dtype=torch.float32, device=logits.device)
    _tops[(count, blocks)](
        logits, tops[0], tops[1], logits.stride(0), size, BLOCK=_BLOCK, num_warps=8, **ahead(logits)
    )
    _best[(count,)](
        tops[0], tops[1], out, blocks, broken, BLOCK=triton.next_power_of_2(blocks), num_warps=1,
        **ahead(logits),
    )  # fmt: skip
    return out


@triton.jit
def _tops(logits, tops, places, step, size, BLOCK: tl.constexpr, AHEAD: tl.constexpr):
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = block * BLOCK + tl.arange(0, BLOCK)
    wait(AHEAD)
    x = tl.load(logits + row * step + at, mask=at < size, other=float("-inf")).to(tl.float32)
    is_nan = tl.max((x != x).to(tl.int32), 0) > 0
    top = tl.max(x, 0)
    # The first of equals.
    place = tl.min(tl.where((x == top) & (at < size), at, 1 << 24), 0)
    here = row * tl.num_programs(1) + block
    tl.store(tops + here, top)
    tl.store(places + here, tl.where(is_nan, -1, place).to(tl.float32))


@triton.jit
def _best(tops, places, out, blocks, broken, BLOCK: tl.constexpr, AHEAD: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < blocks
    wait(AHEAD)
    top = tl.load(tops + row * blocks + at, mask=inside, other=float("-inf"))
    place = tl.load(places + row * blocks + at, mask=inside, other=1 << 24)
    chosen = tl.min(tl.where(top == tl.max(top, 0), place, 1 << 24), 0)
    chosen = tl.where(tl.min(place, 0) < 0, broken, chosen)
    tl.store(out + row, chosen.to(tl.int64))
