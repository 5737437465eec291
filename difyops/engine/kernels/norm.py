"""RMS norms with what stands beside them, and the product of a gated MLP."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from difyops.engine.kernels.functions import ahead, wait
from difyops.engine.layers import RowNorm


def rms_norm(x: Tensor, norm: RowNorm, dtype: torch.dtype) -> Tensor:
    """layers.RMSNorm: x [..., W] -> [..., W] of a dtype."""
    width = x.shape[-1]
    x = x.contiguous()
    out = torch.empty_like(x, dtype=dtype)
    block = triton.next_power_of_2(width)
    rows = x.view(-1, width)
    _rms_norm[(len(rows),)](
        x, norm.weight, out, width, norm.eps, norm.offset,
        BLOCK=block, num_warps=_warps(block), **ahead(rows),
    )  # fmt: skip
    return out


def gated_norm(
    x: Tensor, gate: Tensor, weight: Tensor, eps: float, groups: int, gate_first: bool
) -> Tensor:
    """layers.GatedRMSNorm: x [N, W], gate [N, W] with rows of any stride -> [N, W]. A weight of
    W / groups counts for each group."""
    count, width = x.shape
    out = torch.empty(count, width, dtype=gate.dtype, device=x.device)
    block = triton.next_power_of_2(width // groups)
    _gated_norm[(count, groups)](
        x, gate, weight, out, width // groups, weight.numel() - width // groups,
        x.stride(0), gate.stride(0), out.stride(0), eps,
        GATE_FIRST=gate_first, BLOCK=block, num_warps=_warps(block), **ahead(x),
    )  # fmt: skip
    return out


def silu_product(both: Tensor) -> Tensor:
    """silu(a) * b of both = [a, b]: [..., 2 W] -> [..., W]."""
    width = both.shape[-1] // 2
    out = torch.empty(*both.shape[:-1], width, dtype=both.dtype, device=both.device)
    grid = (both.numel() // (2 * width), triton.cdiv(width, 1024))
    _silu_product[grid](both, out, width, BLOCK=1024, **ahead(both))
    return out


def _warps(block: int) -> int:
    return min(max(block // 256, 1), 8)


@triton.jit
def _rms_norm(
    x, weight, out, width, eps, offset, BLOCK: tl.constexpr, AHEAD: tl.constexpr
):  # fmt: skip
    at = tl.arange(0, BLOCK)
    inside = at < width
    w = tl.load(weight + at, mask=inside, other=0)
    wait(AHEAD)
    row = tl.program_id(0).to(tl.int64) * width
    h = tl.load(x + row + at, mask=inside, other=0).to(tl.float32)
    h = h * tl.rsqrt(tl.sum(h * h, 0) / width + eps)
    if offset != 0:
        normed = h * (w.to(tl.float32) + offset)
    else:
        normed = h.to(w.dtype).to(tl.float32) * w.to(tl.float32)
    tl.store(out + row + at, normed.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _gated_norm(
    x, gate, weight, out, width, spread, x_step, gate_step, out_step, eps,
    GATE_FIRST: tl.constexpr, BLOCK: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    wait(AHEAD)
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1)
    at = tl.arange(0, BLOCK)
    inside = at < width
    column = group * width + at
    h = tl.load(x + row * x_step + column, mask=inside, other=0).to(tl.float32)
    raw = tl.load(gate + row * gate_step + column, mask=inside, other=0)
    g = raw.to(tl.float32)
    opened = g * tl.sigmoid(g)
    if GATE_FIRST:
        h = h * opened
    h = h * tl.rsqrt(tl.sum(h * h, 0) / width + eps)
    h = h * tl.load(weight + tl.where(spread > 0, column, at), mask=inside, other=0).to(tl.float32)
    if not GATE_FIRST:
        h = h * opened
    tl.store(out + row * out_step + column, h.to(raw.dtype), mask=inside)


@triton.jit
def _silu_product(both, out, width, BLOCK: tl.constexpr, AHEAD: tl.constexpr):
    wait(AHEAD)
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    a = tl.load(both + row * 2 * width + at, mask=inside, other=0)
    b = tl.load(both + row * 2 * width + width + at, mask=inside, other=0)
    wide = a.to(tl.float32)
    opened = (wide * tl.sigmoid(wide)).to(a.dtype)
    tl.store(out + row * width + at, opened * b, mask=inside)
