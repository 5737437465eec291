"""A matrix times a few rows, each weight read once: libraries make their products for more rows
than one sequence has. A norm in front of it and an addition behind it cost no launch of their own.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from difyops.engine.kernels.functions import ahead, wait
from difyops.engine.layers import RowNorm

#: More rows than these are for a library.
FEW = 8
#: Up to so many rows everything around a product pays within it: those of one sequence with one
#: guess.
PAIR = 2
#: Up to so many numbers of a row are normed within the product, by each program for itself. H200: a
#: wider row takes the registers that weights wait in, and a launch of its own costs less.
_NORMED = 1024
#: Numbers of a row that a warp takes at once.
_COLUMNS = 256
#: Of them, so many at most wait in registers for the row to come.
_CHUNKS = 16
#: Up to so many lines a program has one, so that there are enough programs.
_SPARSE = 2048


def row(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm: RowNorm | None = None,
    onto: Tensor | None = None,
    silu: bool = False,
    scales: Tensor | None = None,
) -> Tensor:
    """onto + F.linear(norm(x)) of up to FEW rows: x [..., K], weight [N, K], bias [N],
    onto [..., N] -> [..., N], in the dtype of onto or else of weight.

    `silu`: of the two halves of such a product, [a, b], silu(a) * b: [..., N / 2]. `scales` ([N],
    float32): what the weight's rows are to be multiplied by; the product is then in x's dtype.
    """
    width = weight.shape[1]
    count = len(weight) // 2 if silu else len(weight)
    kind = weight.dtype if scales is None else x.dtype
    kind = kind if onto is None else onto.dtype
    out = torch.empty(*x.shape[:-1], count, dtype=kind, device=x.device)
    rows = x.numel() // width
    chunks, lines = _tile(count, width, silu)
    _row[(triton.cdiv(count, lines),)](
        x.contiguous(), weight, *(weight if t is None else t for t in (bias, scales)),
        weight if norm is None else norm.weight, weight if onto is None else onto.contiguous(), out,
        rows, count, 0.0 if norm is None else norm.eps, 0.0 if norm is None else norm.offset,
        BIASED=bias is not None, SCALED=scales is not None, NORMED=norm is not None,
        ADDED=onto is not None, SILU=silu, WIDTH=width, TOKENS=triton.next_power_of_2(rows),
        CHUNKS=chunks, LINES=lines, COLUMNS=_COLUMNS, num_warps=1, **ahead(out.view(rows, -1)),
    )  # fmt: skip
    return out


def suits(rows: int, lines: int) -> bool:
    """Whether `row` is quicker than a library. H200: 2 µs for 13 of one row of 2,048 numbers and
    1,024 lines, 4 for 11 of four rows; of more rows and many lines a library's are the same."""
    return rows <= PAIR or (rows <= FEW // 2 and lines <= _SPARSE)


def norms(rows: int, width: int) -> bool:
    """Whether a norm pays within the product."""
    return rows <= PAIR and width <= _NORMED


def quantised(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight [N, K] in float8_e4m3, and what its rows are multiplied by, [N]: for guesses."""
    scales = weight.abs().amax(1).float().clamp_min(1e-12) / torch.finfo(torch.float8_e4m3fn).max
    return (weight / scales[:, None]).to(torch.float8_e4m3fn), scales


def _tile(count: int, width: int, silu: bool) -> tuple[int, int]:
    """Chunks of a row that are held at once, and lines of a program."""
    chunks = min(triton.next_power_of_2(triton.cdiv(width, _COLUMNS)), _CHUNKS // (1 + silu))
    return chunks, max(_CHUNKS // chunks // (1 + silu), 1) if count > _SPARSE else 1


@triton.jit
def _row(
    x, weight, bias, scales, norm, onto, out, rows, count, eps, offset,
    BIASED: tl.constexpr, SCALED: tl.constexpr, NORMED: tl.constexpr, ADDED: tl.constexpr,
    SILU: tl.constexpr, WIDTH: tl.constexpr, TOKENS: tl.constexpr,
    CHUNKS: tl.constexpr, LINES: tl.constexpr, COLUMNS: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * LINES + tl.arange(0, LINES)
    ours = n < count
    # A program is one warp, and a thread adds up chunks by itself: nobody waits for another.
    k = tl.arange(0, CHUNKS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    place = weight + n.to(tl.int64)[:, None, None] * WIDTH + k[None, :, :]
    second = count.to(tl.int64) * WIDTH
    # Weights are on their way before the rows are there, and before it is their turn.
    held, gated, scale = _weights(place, second, norm, 0, k, ours, NORMED, SILU, WIDTH)
    wait(AHEAD)
    # For all that the compiler knows, what is put out may be where a later row is read from: of
    # several rows all are read first.
    if WIDTH <= CHUNKS * COLUMNS and TOKENS == 1:
        for m in tl.static_range(TOKENS):
            a, b, square = _partial(
                x, m, 0, k, held, gated, scale, rows, offset, NORMED, SILU, WIDTH
            )
            _finish(
                a, b, square, m, n, ours, bias, scales, onto, out, rows, count, eps,
                BIASED, SCALED, NORMED, ADDED, SILU, WIDTH,
            )  # fmt: skip
    else:
        at = tl.arange(0, TOKENS)
        first, other = tl.zeros([TOKENS, LINES], tl.float32), tl.zeros([TOKENS, LINES], tl.float32)
        squares = tl.zeros([TOKENS], tl.float32)
        for start in range(0, WIDTH, CHUNKS * COLUMNS):
            for m in tl.static_range(TOKENS):
                a, b, square = _partial(
                    x, m, start, k, held, gated, scale, rows, offset, NORMED, SILU, WIDTH
                )
                first += tl.where((at == m)[:, None], a[None, :], 0)
                if SILU:
                    other += tl.where((at == m)[:, None], b[None, :], 0)
                if NORMED:
                    squares += tl.where(at == m, square, 0)
            later = start + CHUNKS * COLUMNS
            held, gated, scale = _weights(place, second, norm, later, k, ours, NORMED, SILU, WIDTH)
        for m in tl.static_range(TOKENS):
            a = tl.sum(tl.where((at == m)[:, None], first, 0), 0)
            b = tl.sum(tl.where((at == m)[:, None], other, 0), 0)
            square = tl.sum(tl.where(at == m, squares, 0), 0)
            _finish(
                a, b, square, m, n, ours, bias, scales, onto, out, rows, count, eps,
                BIASED, SCALED, NORMED, ADDED, SILU, WIDTH,
            )  # fmt: skip


@triton.jit
def _weights(
    place, second, norm, start, k, ours,
    NORMED: tl.constexpr, SILU: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Of the lines from `start` on, of those that they are gated with, and of the norm."""
    inside = start + k < WIDTH
    mine = ours[:, None, None] & inside[None, :, :]
    held = tl.load(place + start, mask=mine, other=0.0)
    gated, scale = held, held
    if SILU:
        gated = tl.load(place + second + start, mask=mine, other=0.0)
    if NORMED:
        scale = tl.load(norm + start + k, mask=inside, other=0.0)
    return held, gated, scale


@triton.jit
def _partial(
    x, m, start, k, held, gated, scale, rows, offset,
    NORMED: tl.constexpr, SILU: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """What one row's numbers from `start` on add to the products, and to the sum of squares."""
    row = tl.minimum(m, rows - 1).to(tl.int64) * WIDTH
    now = tl.load(x + row + start + k, mask=start + k < WIDTH, other=0.0).to(tl.float32)
    square = 0.0
    if NORMED:
        square = tl.sum(tl.sum(now * now, 0), 0)
        now = now * (scale.to(tl.float32) + offset)
    a = tl.sum(tl.sum(held.to(tl.float32) * now[None, :, :], 1), 1)
    b = a
    if SILU:
        b = tl.sum(tl.sum(gated.to(tl.float32) * now[None, :, :], 1), 1)
    return a, b, square


@triton.jit
def _finish(
    a, b, square, m, n, ours, bias, scales, onto, out, rows, count, eps,
    BIASED: tl.constexpr, SCALED: tl.constexpr, NORMED: tl.constexpr, ADDED: tl.constexpr,
    SILU: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    if SCALED:
        a *= tl.load(scales + n, mask=ours, other=0.0)
        if SILU:
            b *= tl.load(scales + count + n, mask=ours, other=0.0)
    if NORMED:
        size = tl.rsqrt(square / WIDTH + eps)
        a *= size
        b *= size
    if BIASED:
        a += tl.load(bias + n, mask=ours, other=0.0).to(tl.float32)
        if SILU:
            b += tl.load(bias + count + n, mask=ours, other=0.0).to(tl.float32)
    if SILU:
        a = a * tl.sigmoid(a) * b
    here = ours & (m < rows)
    place = m * count.to(tl.int64) + n
    if ADDED:
        a += tl.load(onto + place, mask=here, other=0.0).to(tl.float32)
    tl.store(out + place, a.to(out.dtype.element_ty), mask=here)
