"""Triton kernels for a GPU: what decoding does to every token of every layer, a launch each.

Each computes what a naive form beside it does (in layers.py and mixers/), in float32. They are
imported where they are called, so that nothing else needs Triton. `slots` and the state tensors
are the pool's own: a kernel reads and writes a slot's state in place, and leaves the null slot's
as it is.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch


def usable(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether kernels run there: not in float64, which is for comparing."""
    return (
        device.type == "cuda"
        and dtype in (torch.float32, torch.bfloat16)
        and find_spec("triton") is not None
    )
