"""What every mixer must pass. A mixer is run in a pool of one layer, in float64."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from difyops.engine.mixers import REGISTRY, Mixer
from difyops.engine.mixers.base import options_from
from difyops.engine.state import StatePool

WIDTH = 24
LENGTHS = (1, 15, 63, 64, 65, 300)
EXACT = 1e-10

#: Never two dimensions that are equal by accident.
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "softmax": ("softmax", {"heads": 6, "kv_heads": 2, "head_dim": 10, "value_dim": 7}),
    "softmax-rotary-normed": (
        "softmax",
        {"heads": 4, "kv_heads": 2, "head_dim": 10, "rotary_dim": 6, "qk_norm": True,
         "norm_offset": 1.0, "gated": True},
    ),
    "gated-delta": (
        "gated_delta",
        {"key_heads": 2, "value_heads": 4, "key_dim": 5, "value_dim": 7},
    ),
    "gated-delta-wide-conv": (
        "gated_delta",
        {"key_heads": 3, "value_heads": 3, "key_dim": 6, "value_dim": 4, "conv_width": 6},
    ),
    "mamba2": ("mamba2", {"heads": 3, "head_dim": 5, "state_dim": 7}),
    "mamba2-grouped-limited": (
        "mamba2",
        {"heads": 6, "head_dim": 4, "state_dim": 5, "groups": 2, "conv_width": 2, "bias": True,
         "conv_bias": False, "dt_min": 0.01, "dt_max": 0.08},
    ),
    "linear": ("linear", {"heads": 3, "head_dim": 10, "value_dim": 7}),
    "linear-exp": (
        "linear",
        {"heads": 6, "kv_heads": 2, "head_dim": 5, "value_dim": 7, "feature": "exp"},
    ),
    "linear-grouped-rotary": (
        "linear", {"heads": 6, "kv_heads": 2, "head_dim": 10, "value_dim": 7, "rotary_dim": 4},
    ),
    "performer": ("performer", {"heads": 3, "head_dim": 5, "value_dim": 7, "features": 13}),
    "performer-grouped-rotary": (
        "performer",
        {"heads": 4, "kv_heads": 2, "head_dim": 6, "value_dim": 7, "features": 11,
         "rotary_dim": 4, "seed": 5},
    ),
    "norm": ("norm", {"heads": 3, "head_dim": 10, "value_dim": 7}),
    "norm-grouped-rotary": (
        "norm", {"heads": 6, "kv_heads": 2, "head_dim": 10, "value_dim": 7, "rotary_dim": 10},
    ),
    "diag": ("diag", {"heads": 3, "head_dim": 10, "value_dim": 7}),
    "diag-grouped-rotary": (
        "diag",
        {"heads": 6, "kv_heads": 2, "head_dim": 10, "value_dim": 7, "rotary_dim": 4, "block": 5},
    ),
    "retention": ("retention", {"heads": 3, "head_dim": 5, "value_dim": 10}),
    "retention-grouped-rotary": (
        "retention", {"heads": 6, "kv_heads": 2, "head_dim": 10, "value_dim": 7, "rotary_dim": 10},
    ),
}  # fmt: skip


@dataclass
class Bench:
    """One mixer with its pool; `slots` sequences of width `WIDTH`."""

    mixer: Mixer
    pool: StatePool

    @classmethod
    def of(
        cls, kind: str, options: Mapping[str, Any], *, dtype: torch.dtype = torch.float64,
        slots: int = 4, window: int = 6, seed: int = 0,
    ) -> Bench:  # fmt: skip
        torch.manual_seed(seed)
        mixer = REGISTRY[kind](WIDTH, options_from(REGISTRY[kind], options)).to(dtype)
        with torch.no_grad():
            for parameter in mixer.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        pool = StatePool([mixer.state_spec()], slots=slots, context=700, window=window, page_size=8)
        return cls(mixer.requires_grad_(False), pool)

    @property
    def state(self) -> Any:
        return self.pool.layers[0]

    def slot(self) -> int:
        slot = self.pool.table.acquire()
        assert slot is not None
        assert self.pool.table.grow(slot, 650)
        self.pool.sync()
        return slot

    def prefill(self, parts: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """slot -> x [T, width]; packed into one call."""
        slots = torch.tensor(list(parts))
        lengths = torch.tensor([len(x) for x in parts.values()])
        cu = torch.cat((torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)))
        out = self.mixer.prefill(torch.cat(list(parts.values())), self.state, slots, cu)
        self.pool.advance(slots, lengths)
        return dict(zip(parts, out.split(lengths.tolist()), strict=True))

    def step(self, parts: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """slot -> x [width]."""
        slots = torch.tensor(list(parts))
        out = self.mixer.step(torch.stack(list(parts.values())), self.state, slots)
        self.pool.advance(slots, torch.ones_like(slots))
        return dict(zip(parts, out, strict=True))

    def verify(self, parts: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """slot -> x [K, width]."""
        slots = torch.tensor(list(parts))
        out = self.mixer.verify(torch.stack(list(parts.values())), self.state, slots)
        return dict(zip(parts, out, strict=True))

    def commit(self, accepted: Mapping[int, int]) -> None:
        slots = torch.tensor(list(accepted))
        counts = torch.tensor(list(accepted.values()))
        self.mixer.commit(self.state, slots, counts)
        self.pool.advance(slots, counts)


def tokens(length: int, *, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed * 1000 + length)
    return torch.randn(length, WIDTH, generator=generator, dtype=torch.float64).to(dtype)


def error(got: Tensor, wanted: Tensor) -> float:
    assert got.shape == wanted.shape
    return float((got - wanted).abs().max()) if got.numel() else 0.0
