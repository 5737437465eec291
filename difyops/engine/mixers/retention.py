"""Retention of RetNet: linear attention that forgets at a fixed rate (arXiv:2307.08621)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from difyops.engine.kernels.spans import Spans
from difyops.engine.mixers import sums
from difyops.engine.mixers.base import Carry, Inputs
from difyops.engine.mixers.heads import HeadMixer, HeadOptions
from difyops.engine.state import LayerState, StateSpec, TensorSpec


class Retention(HeadMixer):
    """S_t = g S_{t-1} + k_t v_tᵀ, o_t = q_t S_t, with g = 1 - 2^(-5-h) for head h (eq. 5-8).

    Each head is divided by its RMS (no affine part), multiplied by swish(x W_g), and projected.
    Keys are scaled by Dk^(-1/2).
    """

    class Options(HeadOptions):
        """`rotary_dim`: the paper's e^{inθ}, to which g is the decay. With `kv_heads`, query heads
        that share keys share g."""

        norm_eps: float = Field(1e-6, gt=0)

    options: Options

    def __init__(self, width: int, options: Options) -> None:
        super().__init__(width, options)
        self.g_proj = nn.Linear(width, options.heads * self.value_dim, bias=False)

    def state_spec(self) -> StateSpec:
        shape = (self.kv_heads, self.options.head_dim, self.value_dim)
        return StateSpec(slot={"S": TensorSpec(shape, self.state_dtype)}, replay=self.replay_spec())

    def project(self, x: Tensor, positions: Tensor) -> Inputs:
        """q, k and v, turned and scaled."""
        inputs = super().project(x, positions)
        return inputs | {"k": inputs["k"] * self.options.head_dim**-0.5}

    def scan(self, inputs: Inputs, carry: Carry, lengths: Tensor) -> tuple[Tensor, Carry]:
        q, k, v = (inputs[name] for name in "qkv")
        out, state = sums.scan(q, k, v, carry["S"], lengths, self._log_decay(carry["S"]))
        return out, {"S": state}

    def recur(self, inputs: Inputs, carry: Carry) -> tuple[Tensor, Carry]:
        q, k, v = (inputs[name] for name in "qkv")
        out, state = sums.recur(q, k, v, carry["S"], self._log_decay(carry["S"]))
        return out, {"S": state}

    @property
    def in_place(self) -> bool:
        return self.fused

    def advance(self, inputs: Inputs, state: LayerState, slots: Tensor, spans: Spans) -> Tensor:
        from difyops.engine.kernels import sums as kernel

        q, k, v = (inputs[name] for name in "qkv")
        decay = self._log_decay(state.slot["S"])
        return kernel.run(q, k, v, state.slot["S"], slots, spans, log_decay=decay)

    def emit(self, out: Tensor, x: Tensor) -> Tensor:
        out = F.rms_norm(out, out.shape[-1:], eps=self.options.norm_eps)
        return super().emit(out.to(x.dtype) * F.silu(self.g_proj(x)).view_as(out), x)

    def reference(self, x: Tensor) -> Tensor:
        """The parallel form (eq. 5): (Q Kᵀ ⊙ D) V with D_ts = g^(t-s)."""
        positions = torch.arange(x.shape[0], device=x.device)
        inputs = self.project(x, positions)
        k, v = self.per_query_head(inputs["k"]), self.per_query_head(inputs["v"])
        rate = 1 - 2.0 ** (-5 - torch.arange(self.kv_heads, dtype=x.dtype, device=x.device))
        rate = rate.repeat_interleave(self.options.heads // self.kv_heads)
        decay = (rate[:, None, None] ** (positions[:, None] - positions)).tril()
        scores = torch.einsum("thd,shd->hts", inputs["q"], k) * decay
        return self.emit(torch.einsum("hts,shd->thd", scores, v), x)

    def _log_decay(self, like: Tensor) -> Tensor:
        """log g: [Hkv]."""
        head = torch.arange(self.kv_heads, dtype=like.dtype, device=like.device)
        return torch.log1p(-torch.exp(-(5 + head) * math.log(2)))
