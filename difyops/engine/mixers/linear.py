"""Linear attention: a kernel's feature map in place of softmax (arXiv:2006.16236)."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from difyops.engine.kernels.spans import Spans
from difyops.engine.mixers import sums
from difyops.engine.mixers.base import Carry, Inputs
from difyops.engine.mixers.heads import HeadMixer, HeadOptions
from difyops.engine.state import LayerState, StateSpec, TensorSpec


class Linear(HeadMixer):
    """o_t = φ(q_t)ᵀ S_t / (φ(q_t)ᵀ z_t + ε) with the sums over s ≤ t S_t = Σ φ(k_s) v_sᵀ and
    z_t = Σ φ(k_s) (eq. 18-20).

    φ is `elu`(x) + 1, the paper's, or `exp`(x), each by dimension. exp is never computed as it
    stands: what is summed is exp(q_d + k_d) over the dimensions d, relative to the largest key so
    far in that dimension (see sums.py), which changes nothing, so it takes no ε.
    """

    class Options(HeadOptions):
        """`rotary_dim`: queries and keys are turned before the feature map."""

        feature: Literal["elu", "exp"] = "elu"
        eps: float = Field(1e-6, ge=0)

    options: Options

    def state_spec(self) -> StateSpec:
        o, dtype = self.options, self.state_dtype
        if o.feature == "exp":
            slot = sums.log_spec(self.kv_heads, o.head_dim, self.value_dim, dtype)
        else:
            slot = {
                "S": TensorSpec((self.kv_heads, o.head_dim, self.value_dim), dtype),
                "z": TensorSpec((self.kv_heads, o.head_dim), dtype),
            }
        return StateSpec(slot=slot, replay=self.replay_spec())

    def scan(self, inputs: Inputs, carry: Carry, lengths: Tensor) -> tuple[Tensor, Carry]:
        q, k, v = (inputs[name].to(self.state_dtype) for name in "qkv")
        if self.options.feature == "exp":
            return sums.log_scan(q, k, v, carry, lengths)
        # A value of 1 beside the others sums the keys: the last column of the state is z.
        v = torch.cat((v, torch.ones_like(v[..., :1])), dim=-1)
        both = torch.cat((carry["S"], carry["z"][..., None]), dim=-1)
        out, both = sums.scan(_elu(q), _elu(k), v, both, lengths)
        mixed = out[..., :-1] / (out[..., -1:] + self.options.eps)
        return mixed, {"S": both[..., :-1], "z": both[..., -1]}

    def recur(self, inputs: Inputs, carry: Carry) -> tuple[Tensor, Carry]:
        q, k, v = (inputs[name].to(self.state_dtype) for name in "qkv")
        if self.options.feature == "exp":
            return sums.log_recur(q, k, v, carry)
        q, k = _elu(q), _elu(k)
        out, state = sums.recur(q, k, v, carry["S"])
        z = carry["z"] + k
        total = sums.grouped(q, self.kv_heads) @ z[..., None]
        return out / (total.flatten(1, 2) + self.options.eps), {"S": state, "z": z}

    @property
    def residual(self) -> bool:  # type: ignore[override]
        return self.options.feature == "elu"

    @property
    def in_place(self) -> bool:
        return self.fused and self.options.feature == "elu"

    def advance(self, inputs: Inputs, state: LayerState, slots: Tensor, spans: Spans) -> Tensor:
        from difyops.engine.kernels import sums as kernel

        q, k, v = (inputs[name] for name in "qkv")
        return kernel.run(
            q, k, v, state.slot["S"], slots, spans,
            norms=state.slot["z"], eps=self.options.eps, elu=True, dtype=self.dtype,
        )  # fmt: skip

    def reference(self, x: Tensor) -> Tensor:
        inputs = self.project(x, torch.arange(x.shape[0], device=x.device))
        q, k, v = inputs["q"], self.per_query_head(inputs["k"]), self.per_query_head(inputs["v"])
        if self.options.feature == "exp":
            weights, eps = torch.einsum("thd,shd->hts", q.exp(), k.exp()).tril(), 0.0
        else:
            weights, eps = torch.einsum("thd,shd->hts", _elu(q), _elu(k)).tril(), self.options.eps
        out = torch.einsum("hts,shd->thd", weights, v)
        return self.emit(out / (weights.sum(-1).T[..., None] + eps), x)


def _elu(x: Tensor) -> Tensor:
    return F.elu(x) + 1
