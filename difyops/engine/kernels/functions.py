"""What several kernels compute."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def softplus(x):
    """log(1 + e^x), exact for small e^x too: log(1 + e) loses what 1 + e rounds away."""
    e = tl.exp(tl.minimum(x, 20))
    u = 1 + e
    small = tl.where(u == 1, e, tl.log(u) * e / tl.where(u == 1, 1, u - 1))
    return tl.where(x > 20, x, small)
