"""NormAttention of TransNormer: linear attention with a norm for its denominator
(arXiv:2210.10340)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from difyops.engine.kernels.spans import Spans
from difyops.engine.layers import RMSNorm
from difyops.engine.mixers import sums
from difyops.engine.mixers.base import Carry, Inputs
from difyops.engine.mixers.heads import HeadMixer, HeadOptions
from difyops.engine.state import LayerState, StateSpec, TensorSpec


class Norm(HeadMixer):
    """O = RMSNorm(φ(Q) (φ(K)ᵀ V)), causal, φ(x) = elu(x) + 1, over all heads together.
    Without a denominator its gradients are bounded."""

    class Options(HeadOptions):
        """`rotary_dim`: the features are turned, so that scores depend on distances alone."""

        norm_eps: float = Field(1e-6, gt=0)

    options: Options

    def __init__(self, width: int, options: Options) -> None:
        super().__init__(width, options)
        self.norm = RMSNorm(options.heads * self.value_dim, options.norm_eps)

    def state_spec(self) -> StateSpec:
        shape = (self.kv_heads, self.options.head_dim, self.value_dim)
        return StateSpec(slot={"S": TensorSpec(shape, self.state_dtype)}, replay=self.replay_spec())

    def project(self, x: Tensor, positions: Tensor) -> Inputs:
        """φ(q), φ(k) and v; the features turned by their position."""
        q, k, v = self.heads(x)
        q, k = (self.turn(F.elu(t) + 1, positions) for t in (q, k))
        return {"q": q, "k": k, "v": v}

    def scan(self, inputs: Inputs, carry: Carry, lengths: Tensor) -> tuple[Tensor, Carry]:
        out, state = sums.scan(inputs["q"], inputs["k"], inputs["v"], carry["S"], lengths)
        return out, {"S": state}

    def recur(self, inputs: Inputs, carry: Carry) -> tuple[Tensor, Carry]:
        out, state = sums.recur(inputs["q"], inputs["k"], inputs["v"], carry["S"])
        return out, {"S": state}

    residual = True

    @property
    def in_place(self) -> bool:
        return self.fused

    def advance(self, inputs: Inputs, state: LayerState, slots: Tensor, spans: Spans) -> Tensor:
        from difyops.engine.kernels import sums as kernel

        q, k, v = (inputs[name] for name in "qkv")
        return kernel.run(q, k, v, state.slot["S"], slots, spans)

    def emit(self, out: Tensor, x: Tensor) -> Tensor:
        # Normed before it is rounded: the sums grow with the context.
        if self.fused:
            return self.out(out.flatten(-2), x, self.norm.over_rows)
        return self.out(self.norm(out.flatten(-2)), x)

    def reference(self, x: Tensor) -> Tensor:
        inputs = self.project(x, torch.arange(x.shape[0], device=x.device))
        k, v = self.per_query_head(inputs["k"]), self.per_query_head(inputs["v"])
        scores = torch.einsum("thd,shd->hts", inputs["q"], k).tril()
        return self.emit(torch.einsum("hts,shd->thd", scores, v), x)
