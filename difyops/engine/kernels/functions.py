"""What several kernels compute."""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

#: Batches whose kernels are so short that their starts count. In larger ones a kernel that waits
#: takes room from the one that works: one sequence gains a quarter, 64 lose a little (H200).
_FEW = 4


def ahead(rows: Tensor) -> dict[str, bool]:
    """How a kernel over these rows is launched: for few of them, from Hopper on, before the one in
    front of it has ended (programmatic dependent launch), so that its start costs nothing."""
    able = len(rows) <= _FEW and _can_be_ahead(rows.device)
    return {"AHEAD": able, "launch_pdl": able}


@cache
def _can_be_ahead(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


@triton.jit
def wait(AHEAD: tl.constexpr):
    """What the kernels in front wrote is there behind this. Before it, a kernel may read only what
    a step does not change, or has not changed in the layers just before: weights, and its state."""
    if AHEAD:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def block_of(begin, end, sequences, block, SIZE: tl.constexpr):
    """Whose the block is, of packed tokens in blocks of SIZE that begin where a sequence does: the
    row, its first token, the block's first token, and the token behind the row's last. A block of
    nobody begins at or behind that.

    Row i's blocks are those from begin[i] // SIZE + i on: below the next row's whatever its length,
    so that no lengths are summed up.
    """
    rows = tl.arange(0, 128)
    before = 0
    for one in range(0, sequences, 128):
        inside = one + rows < sequences
        base = tl.load(begin + one + rows, mask=inside, other=0) // SIZE + one + rows
        before += tl.sum((inside & (base <= block)).to(tl.int32), 0)
    row = before - 1
    first, last = tl.load(begin + row), tl.load(end + row)
    return row, first, first + (block - first // SIZE - row) * SIZE, last


@triton.jit
def softplus(x):
    """log(1 + e^x), exact for small e^x too: log(1 + e) loses what 1 + e rounds away."""
    e = tl.exp(tl.minimum(x, 20))
    u = 1 + e
    small = tl.where(u == 1, e, tl.log(u) * e / tl.where(u == 1, 1, u - 1))
    return tl.where(x > 20, x, small)


@triton.jit
def owner(begin, end, sequences, piece, SIZE: tl.constexpr):
    """Each sequence is cut into pieces of SIZE tokens: whose this one is, and which of its own;
    `sequences` where it is nobody's."""
    row, before, total = sequences * 0, piece * 0, piece * 0
    for start in range(0, sequences, 128):
        at = start + tl.arange(0, 128)
        inside = at < sequences
        length = tl.load(end + at, mask=inside, other=0) - tl.load(begin + at, mask=inside, other=0)
        behind = total + tl.cumsum(tl.cdiv(length, SIZE), 0)
        passed = inside & (behind <= piece)
        row += tl.sum(passed.to(tl.int32), 0)
        before = tl.maximum(before, tl.max(tl.where(passed, behind, 0), 0))
        total = tl.max(behind, 0)
    return row, piece - before


@triton.jit
def pieces_before(begin, end, row, SIZE: tl.constexpr):
    """How many pieces of SIZE tokens lie before a sequence's first."""
    total = row * 0
    for start in range(0, row, 128):
        at = start + tl.arange(0, 128)
        inside = at < row
        length = tl.load(end + at, mask=inside, other=0) - tl.load(begin + at, mask=inside, other=0)
        total += tl.sum(tl.cdiv(length, SIZE), 0)
    return total
