"""Gated DeltaNet: a matrix that forgets by a gate and is corrected by the delta rule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from difyops.engine.kernels.spans import Spans
from difyops.engine.layers import GatedRMSNorm, Joined, product
from difyops.engine.mixers import base, chunks
from difyops.engine.mixers.base import FEW, Carry, Inputs, RecurrentMixer, within_length
from difyops.engine.mixers.chunks import by_head
from difyops.engine.mixers.convolution import ShortConvolution
from difyops.engine.state import LayerState, StateSpec, TensorSpec

if TYPE_CHECKING:
    from difyops.engine.kernels import gated_delta_few


class GatedDelta(RecurrentMixer):
    """S ← e^g S + β k (vᵀ - kᵀ e^g S), out = qᵀS / √Dk, S: [Hv, Dk, Dv] (arXiv:2412.06464).

    q, k and v come out of one short convolution; q and k are L2-normed.
    g = -exp(A_log) softplus(a + dt_bias), β = sigmoid(b). Modules are named as in Qwen3.5.
    """

    class Options(base.Options):
        """Each key head (and its query) serves `value_heads / key_heads` value heads that follow
        one another. `conv_width` is in tokens."""

        key_heads: int = Field(gt=0)
        value_heads: int = Field(gt=0)
        key_dim: int = Field(gt=0)
        value_dim: int = Field(gt=0)
        conv_width: int = Field(4, gt=1)
        norm_eps: float = Field(1e-6, gt=0)

        @model_validator(mode="after")
        def _shapes_agree(self) -> Self:
            if self.value_heads % self.key_heads:
                raise ValueError(
                    f"key_heads: {self.key_heads} does not divide value_heads, {self.value_heads}"
                )
            return self

    def __init__(self, width: int, options: Options) -> None:
        super().__init__()
        self.options = o = options
        keys, values = o.key_heads * o.key_dim, o.value_heads * o.value_dim
        self.in_proj_qkv = nn.Linear(width, 2 * keys + values, bias=False)
        self.in_proj_z = nn.Linear(width, values, bias=False)
        self.in_proj_b = nn.Linear(width, o.value_heads, bias=False)
        self.in_proj_a = nn.Linear(width, o.value_heads, bias=False)
        self.conv1d = ShortConvolution(2 * keys + values, o.conv_width, bias=False)
        rate, step = chunks.initial_decay(o.value_heads)
        self.A_log, self.dt_bias = nn.Parameter(rate), nn.Parameter(step)
        self.norm = GatedRMSNorm(o.value_dim, o.norm_eps)
        self.out_proj = nn.Linear(values, width, bias=False)

    def state_spec(self) -> StateSpec:
        o, dtype = self.options, self.dtype
        heads = TensorSpec((o.value_heads,), dtype)
        return StateSpec(
            slot={
                "S": TensorSpec((o.value_heads, o.key_dim, o.value_dim), self.state_dtype),
                "tail": TensorSpec(self.conv1d.tail_shape, dtype),
            },
            replay={
                "qkv": TensorSpec((self.conv1d.in_channels,), dtype),
                "a": heads,
                "b": heads,
            },
        )

    def project(self, x: Tensor, positions: Tensor) -> Inputs:
        if self.fused:
            return dict(zip(("qkv", "z", "b", "a"), self._inward(x, self.taken), strict=True))
        return {"qkv": self.in_proj_qkv(x), "a": self.in_proj_a(x), "b": self.in_proj_b(x)}

    def scan(self, inputs: Inputs, carry: Carry, lengths: Tensor) -> tuple[Tensor, Carry]:
        """Chunks in WY form (arXiv:2406.06484, section 3; decays as in arXiv:2412.06464).

        Within a chunk each correction depends on those before it: a triangular system, solved for
        all chunks at once. What is left of it depends on the state in front of the chunk.
        """
        count = inputs["qkv"].shape[1]
        qkv, tail = self.conv1d.scan(inputs["qkv"], carry["tail"], lengths)
        q, k, v = self._heads(qkv)
        g, beta = self._gates(inputs["a"], inputs["b"])
        inside = within_length(lengths, count)[..., None]
        # Without decay and without a correction the state stays as it is.
        g, beta = g.masked_fill(~inside, 0), beta.masked_fill(~inside, 0)
        q, k, v, g, beta = (chunks.split(tensor) for tensor in (q, k, v, g, beta))
        total, decay = chunks.decays(g)
        since, until = total.exp()[..., None], (total[..., -1:] - total).exp()[..., None]
        corrected = beta[..., None] * k
        system = (corrected @ k.mT) * decay
        u, w = torch.linalg.solve_triangular(
            system,
            torch.cat((beta[..., None] * v, corrected * since), dim=-1),
            upper=False,
            unitriangular=True,
        ).split((v.shape[-1], k.shape[-1]), dim=-1)
        attention, q, k = (q @ k.mT) * decay, q * since, k * until
        state, out = carry["S"], []
        for i in range(len(q)):
            new = u[i] - w[i] @ state
            out.append(q[i] @ state + attention[i] @ new)
            state = state * since[i, :, :, -1:] + k[i].mT @ new
        return chunks.join(out, count), {"S": state, "tail": tail}

    def fuse(self) -> None:
        if not self.fused:
            self._inward = Joined(self.in_proj_qkv, self.in_proj_z, self.in_proj_b, self.in_proj_a)
        super().fuse()

    positional = False
    residual = True

    @property
    def in_place(self) -> bool:
        return self.fused

    def advance(self, inputs: Inputs, state: LayerState, slots: Tensor, spans: Spans) -> Tensor:
        from difyops.engine.kernels import gated_delta, gated_delta_chunk, norm

        o, z = self.options, inputs.get("z")  # a commit's inputs have none: nothing is put out
        qkv = self.conv1d.advance(inputs["qkv"], state.slot["tail"], slots, spans)
        rest = inputs["a"], inputs["b"], state.slot["S"], slots, spans
        rates = self.A_log, self.dt_bias, o.key_heads
        weight, eps = self.norm.weight, self.norm.eps
        if z is not None and gated_delta_chunk.pays(spans, len(qkv)):
            return gated_delta_chunk.run(qkv, *rest, *rates, z, weight, eps)
        out = gated_delta.run(qkv, *rest, *rates)
        return out if z is None else norm.gated_norm(out, z, weight, eps, o.value_heads, False)

    def finish(self, out: Tensor, inputs: Inputs, x: Tensor) -> Tensor:
        return self._out(out, x)

    def _out(self, normed: Tensor, x: Tensor) -> Tensor:
        return product(normed, self.out_proj.weight, onto=self.onto(x))

    def finish_few(
        self, inputs: Inputs, x: Tensor, state: LayerState, slots: Tensor, count: int, *, kept: bool
    ) -> Tensor:
        from difyops.engine.kernels import gated_delta_few as kernel

        if count > FEW or (kept and len(slots) > kernel.MOST):
            return super().finish_few(inputs, x, state, slots, count, kept=kept)
        normed = kernel.run(
            inputs, state.slot, slots, self._weights(), self.options.key_heads, count,
            replay=None if kept else state.replay,
        )  # fmt: skip
        return self._out(normed, x)

    def fold(self, state: LayerState, slots: Tensor, accepted: Tensor) -> None:
        if state.replay["qkv"].shape[1] > FEW:
            super().fold(state, slots, accepted)
        else:
            self._fold([self], [state], slots, accepted)

    @staticmethod
    def stack(mixers: Sequence[GatedDelta]) -> None:
        for weights in zip(
            *((m.conv1d.weight, m.A_log, m.dt_bias) for m in mixers), strict=True
        ):  # evenly apart, so that one launch finds them all
            for weight, part in zip(weights, torch.stack([w.data for w in weights]), strict=True):
                weight.data = part

    @staticmethod
    def commit_all(
        mixers: Sequence[GatedDelta], states: Sequence[LayerState], slots: Tensor, accepted: Tensor
    ) -> None:
        if mixers[0].in_place and states[0].replay["qkv"].shape[1] <= FEW:
            mixers[0]._fold(mixers, states, slots, accepted)
        else:
            RecurrentMixer.commit_all(mixers, states, slots, accepted)

    @staticmethod
    def _fold(
        mixers: Sequence[GatedDelta], states: Sequence[LayerState], slots: Tensor, accepted: Tensor
    ) -> None:
        from difyops.engine.kernels import gated_delta_few as kernel

        kernel.fold(
            [state.replay for state in states], [state.slot for state in states], slots, accepted,
            [mixer._weights() for mixer in mixers], mixers[0].options.key_heads,
        )  # fmt: skip

    def _weights(self) -> gated_delta_few.Weights:
        from difyops.engine.kernels.gated_delta_few import Weights

        return Weights(
            self.conv1d.weight, self.A_log, self.dt_bias, self.norm.weight, self.norm.eps
        )

    def recur(self, inputs: Inputs, carry: Carry) -> tuple[Tensor, Carry]:
        qkv, tail = self.conv1d.recur(inputs["qkv"], carry["tail"])
        q, k, v = self._heads(qkv)
        g, beta = self._gates(inputs["a"], inputs["b"])
        state = carry["S"] * g.exp()[..., None, None]
        new = beta[..., None] * (v - (k[..., None, :] @ state)[..., 0, :])
        state = state + k[..., None] * new[..., None, :]
        return (q[..., None, :] @ state)[..., 0, :], {"S": state, "tail": tail}

    def emit(self, out: Tensor, x: Tensor) -> Tensor:
        z = by_head(self.in_proj_z(x), self.options.value_heads)
        emitted: Tensor = self.out_proj(self.norm(out, z).flatten(-2))
        return emitted

    def reference(self, x: Tensor) -> Tensor:
        o = self.options
        inputs = self.project(x, torch.arange(len(x), device=x.device))
        q, k, v = self._heads(self.conv1d.reference(inputs["qkv"]))
        g, beta = self._gates(inputs["a"], inputs["b"])
        state = v.new_zeros(o.value_heads, o.key_dim, o.value_dim)
        out = torch.empty_like(v)
        for t in range(len(x)):
            for h in range(o.value_heads):
                kept = g[t, h].exp() * state[h]
                state[h] = kept + torch.outer(k[t, h], beta[t, h] * (v[t, h] - k[t, h] @ kept))
                out[t, h] = q[t, h] @ state[h]
        return self.emit(out, x)

    def _heads(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[..., C] -> q and k [..., Hv, Dk], normed, and v [..., Hv, Dv]."""
        o = self.options
        keys, values = o.key_heads * o.key_dim, o.value_heads * o.value_dim
        q, k, v = torch.split(qkv.to(self.state_dtype), [keys, keys, values], dim=-1)
        q, k = (_normed(by_head(t, o.key_heads, o.value_heads // o.key_heads)) for t in (q, k))
        return q * o.key_dim**-0.5, k, by_head(v, o.value_heads)

    def _gates(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """g and β, [..., Hv] each."""
        dtype = self.state_dtype
        step = F.softplus(a.to(dtype) + self.dt_bias.to(dtype))
        return -self.A_log.to(dtype).exp() * step, b.to(dtype).sigmoid()


def _normed(x: Tensor) -> Tensor:
    # The eps of every released checkpoint; no config has a key for it.
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)
