"""A matrix times one row: libraries make their products for more rows than one sequence has."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from difyops.engine.kernels.functions import ahead, wait

#: Up to so many outputs a program makes one each, so that there are enough programs.
_FEW = 2048


def row(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """F.linear of a single row: x [..., K] of K numbers, weight [N, K], bias [N] -> [..., N]."""
    count, width = weight.shape
    return _launched(x, weight, bias, count, width, silu=False)


def silu_row(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """silu(a) * b of [a, b] = F.linear of a single row: weight [2 N, K] -> [..., N]."""
    count, width = weight.shape
    return _launched(x, weight, bias, count // 2, width, silu=True)


def _launched(
    x: Tensor, weight: Tensor, bias: Tensor | None, count: int, width: int, *, silu: bool
) -> Tensor:
    out = torch.empty(*x.shape[:-1], count, dtype=x.dtype, device=x.device)
    rows, columns = (1, 1024) if count <= _FEW else (16, 256)
    if silu:
        rows = min(rows, 8)
    _row[(triton.cdiv(count, rows),)](
        x.contiguous(), weight, weight if bias is None else bias, out, count, width,
        BIASED=bias is not None, SILU=silu, ROWS=rows, COLUMNS=columns, num_warps=4,
        **ahead(x),
    )  # fmt: skip
    return out


@triton.jit
def _row(
    x, weight, bias, out, count, width,
    BIASED: tl.constexpr, SILU: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    AHEAD: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, COLUMNS)
    place = weight + n.to(tl.int64)[:, None] * width + k[None, :]
    second = count.to(tl.int64) * width
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    other = tl.zeros([ROWS, COLUMNS], tl.float32)
    # Weights are on their way before the row is there, and before it is their turn.
    ours = (n < count)[:, None]
    held = tl.load(place, mask=ours & (k < width)[None, :], other=0)
    if SILU:
        gated = tl.load(place + second, mask=ours & (k < width)[None, :], other=0)
    wait(AHEAD)
    for start in range(0, width, COLUMNS):
        now = tl.load(x + start + k, mask=start + k < width, other=0).to(tl.float32)[None, :]
        later = start + COLUMNS
        mine = ours & (later + k < width)[None, :]
        total += held.to(tl.float32) * now
        held = tl.load(place + later, mask=mine, other=0)
        if SILU:
            other += gated.to(tl.float32) * now
            gated = tl.load(place + second + later, mask=mine, other=0)
    a, b = tl.sum(total, 1), tl.sum(other, 1)
    kind = out.dtype.element_ty
    if BIASED:
        a += tl.load(bias + n, mask=n < count, other=0).to(tl.float32)
        if SILU:
            b += tl.load(bias + count + n, mask=n < count, other=0).to(tl.float32)
    if SILU:
        a = a.to(kind).to(tl.float32)
        a = (a * tl.sigmoid(a)).to(kind).to(tl.float32) * b.to(kind).to(tl.float32)
    tl.store(out + n, a.to(kind), mask=n < count)
