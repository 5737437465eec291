"""Numbers between host and GPU, without waiting for what the GPU has yet to do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def sent(values: Sequence[Any], device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
    """A tensor of `values` on the device. To a GPU they go in its own order of work."""
    if device.type != "cuda":
        return torch.tensor(values, dtype=dtype, device=device)
    # The allocator of pinned memory leaves it alone until the copy is done.
    return torch.tensor(values, dtype=dtype, pin_memory=True).to(device, non_blocking=True)


class Coming:
    """The way back of what a tensor holds when the device gets there."""

    def __init__(self, values: Tensor) -> None:
        self._event = None
        if not values.is_cuda:
            self._here = values.clone()
        else:
            self._here = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._here.copy_(values, non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record()

    def list(self) -> Any:
        """Waits, and other threads run meanwhile: Tensor.tolist of a GPU's would hold Python's
        lock."""
        if self._event is not None:
            self._event.synchronize()
        return self._here.tolist()
