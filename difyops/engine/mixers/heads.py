"""What the linear kinds share: queries, keys and values by head, and the way out."""

from __future__ import annotations

from typing import Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from difyops.engine import layers
from difyops.engine.layers import Joined, RowNorm, product, rotary
from difyops.engine.mixers import base
from difyops.engine.mixers.base import Inputs, RecurrentMixer
from difyops.engine.mixers.softmax import Frequencies
from difyops.engine.state import TensorSpec


class HeadOptions(base.Options):
    """`kv_heads` None: as many as `heads`; `value_dim` None: `head_dim`. `rotary_dim` 0: no
    positions; `rope_theta` is their base."""

    heads: int = Field(gt=0)
    kv_heads: int | None = Field(None, gt=0)
    head_dim: int = Field(gt=0)
    value_dim: int | None = Field(None, gt=0)
    rotary_dim: int = Field(0, ge=0, multiple_of=2)
    rope_theta: float = Field(10000.0, gt=0)

    @model_validator(mode="after")
    def _shapes_agree(self) -> Self:
        if self.kv_heads and self.heads % self.kv_heads:
            raise ValueError(f"kv_heads: {self.kv_heads} does not divide heads, {self.heads}")
        if self.rotary_dim > self.head_dim:
            raise ValueError(
                f"rotary_dim: {self.rotary_dim} is more than head_dim, {self.head_dim}"
            )
        return self


class HeadMixer(RecurrentMixer):
    """A recurrent mixer over q [..., H, Dk], k [..., Hkv, Dk] and v [..., Hkv, Dv], where
    H / Hkv query heads share each state (arXiv:2305.13245)."""

    options: HeadOptions

    def __init__(self, width: int, options: HeadOptions) -> None:
        super().__init__()
        self.options = o = options
        self.kv_heads = o.kv_heads or o.heads
        self.value_dim = o.value_dim or o.head_dim
        self.q_proj = nn.Linear(width, o.heads * o.head_dim, bias=False)
        self.k_proj = nn.Linear(width, self.kv_heads * o.head_dim, bias=False)
        self.v_proj = nn.Linear(width, self.kv_heads * self.value_dim, bias=False)
        self.o_proj = nn.Linear(o.heads * self.value_dim, width, bias=False)
        self.frequencies = Frequencies(layers.inverse_frequencies(o.rotary_dim, o.rope_theta))

    @property
    def positional(self) -> bool:  # type: ignore[override]
        return self.options.rotary_dim > 0

    def project(self, x: Tensor, positions: Tensor) -> Inputs:
        """q, k and v; q and k turned by their position."""
        q, k, v = self.heads(x)
        return {"q": self.turn(q, positions), "k": self.turn(k, positions), "v": v}

    def emit(self, out: Tensor, x: Tensor) -> Tensor:
        """out: [..., H, Dv]."""
        return self.out(out.flatten(-2), x)

    def out(self, mixed: Tensor, x: Tensor, norm: RowNorm | None = None) -> Tensor:
        """[..., H * Dv] and the layer's input -> [..., width]."""
        if self.fused:
            return product(mixed, self.o_proj.weight, norm=norm, onto=self.onto(x))
        out: Tensor = self.o_proj(mixed.to(x.dtype))
        return out

    def fuse(self) -> None:
        if not self.fused:
            self._inward = Joined(self.q_proj, self.k_proj, self.v_proj)
        super().fuse()

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q [..., H, Dk], k [..., Hkv, Dk] and v [..., Hkv, Dv], without positions."""
        o = self.options
        if self.fused:
            q, k, v = self._inward(x, self.taken)
        else:
            q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        return (
            torch.unflatten(q, -1, (o.heads, o.head_dim)),
            torch.unflatten(k, -1, (self.kv_heads, o.head_dim)),
            torch.unflatten(v, -1, (self.kv_heads, self.value_dim)),
        )

    def turn(self, x: Tensor, positions: Tensor) -> Tensor:
        """Rotary positions, where the options ask for them: x [..., H, Dk]."""
        if not self.options.rotary_dim:
            return x
        frequencies, scale = self.frequencies.on(x)
        return rotary(x, positions, frequencies, scale)

    def replay_spec(self) -> dict[str, TensorSpec]:
        """What `project` returns of one token."""
        o, dtype = self.options, self.dtype
        return {
            "q": TensorSpec((o.heads, o.head_dim), dtype),
            "k": TensorSpec((self.kv_heads, o.head_dim), dtype),
            "v": TensorSpec((self.kv_heads, self.value_dim), dtype),
        }

    def per_query_head(self, x: Tensor) -> Tensor:
        """[T, Hkv, D] -> [T, H, D], each head repeated: for references."""
        return x.repeat_interleave(self.options.heads // self.kv_heads, dim=-2)
