"""Mamba-2: state space duality, a diagonal state space whose decay is one number per head."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from difyops.engine.kernels.spans import Spans
from difyops.engine.layers import GatedRMSNorm, RowNorm, product
from difyops.engine.mixers import base, chunks
from difyops.engine.mixers.base import FEW, Carry, Inputs, RecurrentMixer, within_length
from difyops.engine.mixers.chunks import by_head
from difyops.engine.mixers.convolution import ShortConvolution
from difyops.engine.state import LayerState, StateSpec, TensorSpec

if TYPE_CHECKING:
    from difyops.engine.kernels import mamba2_few


class Mamba2(RecurrentMixer):
    """h ← exp(Δ A) h + Δ x Bᵀ, y = h C + D x (arXiv:2405.21060, section 7), h: [H, P, N].

    x, B and C come out of one short convolution. Δ = softplus(dt + dt_bias), kept within limits;
    A = -exp(A_log). Modules are named as in Hugging Face's checkpoints.
    """

    class Options(base.Options):
        """`head_dim` is P, `state_dim` N. Heads in groups share B and C, and the norm is taken
        over each group. `dt_min` and `dt_max` are the limits of Δ. `bias` is that of both
        projections, `conv_width` is in tokens."""

        heads: int = Field(gt=0)
        head_dim: int = Field(gt=0)
        state_dim: int = Field(gt=0)
        groups: int = Field(1, gt=0)
        conv_width: int = Field(4, gt=1)
        conv_bias: bool = True
        bias: bool = False
        dt_min: float = Field(0.0, ge=0)
        dt_max: float = Field(math.inf, gt=0)
        norm_eps: float = Field(1e-5, gt=0)

        @model_validator(mode="after")
        def _shapes_agree(self) -> Self:
            if self.heads % self.groups:
                raise ValueError(f"groups: {self.groups} does not divide heads, {self.heads}")
            if self.dt_min > self.dt_max:
                raise ValueError(f"dt_min: {self.dt_min} is more than dt_max, {self.dt_max}")
            return self

    def __init__(self, width: int, options: Options) -> None:
        super().__init__()
        self.options = o = options
        self.inner = o.heads * o.head_dim
        mixed = self.inner + 2 * o.groups * o.state_dim
        self.in_proj = nn.Linear(width, self.inner + mixed + o.heads, bias=o.bias)
        self.conv1d = ShortConvolution(mixed, o.conv_width, bias=o.conv_bias)
        rate, step = chunks.initial_decay(o.heads)
        self.A_log, self.dt_bias = nn.Parameter(rate), nn.Parameter(step)
        self.D = nn.Parameter(torch.ones(o.heads))
        self.norm = GatedRMSNorm(self.inner, o.norm_eps, groups=o.groups, gate_first=True)
        self.out_proj = nn.Linear(self.inner, width, bias=o.bias)

    def state_spec(self) -> StateSpec:
        o, dtype = self.options, self.dtype
        return StateSpec(
            slot={
                "h": TensorSpec((o.heads, o.head_dim, o.state_dim), self.state_dtype),
                "tail": TensorSpec(self.conv1d.tail_shape, dtype),
            },
            replay={
                "xBC": TensorSpec((self.conv1d.in_channels,), dtype),
                "dt": TensorSpec((o.heads,), dtype),
            },
        )

    def project(self, x: Tensor, positions: Tensor) -> Inputs:
        if self.fused:
            mixed = product(x, self.in_proj.weight, self.in_proj.bias, norm=self.taken)
            parts = [self.inner, self.conv1d.in_channels, self.options.heads]
            return dict(zip(("gate", "xBC", "dt"), torch.split(mixed, parts, dim=-1), strict=True))
        mixed = self._in_proj(x, slice(self.inner, None))
        xbc, dt = torch.split(mixed, [self.conv1d.in_channels, self.options.heads], dim=-1)
        return {"xBC": xbc, "dt": dt}

    def scan(self, inputs: Inputs, carry: Carry, lengths: Tensor) -> tuple[Tensor, Carry]:
        """Blocks of the semiseparable matrix (arXiv:2405.21060, section 6)."""
        count = inputs["xBC"].shape[1]
        xbc, tail = self.conv1d.scan(inputs["xBC"], carry["tail"], lengths)
        x, B, C = self._heads(xbc)
        # A time step of 0 leaves the state as it is.
        dt = self._steps(inputs["dt"]).masked_fill(~within_length(lengths, count)[..., None], 0)
        skip = x * self._wide(self.D)[:, None]
        u, B, C, log_decay = (
            chunks.split(t) for t in (x * dt[..., None], B, C, dt * self._rates())
        )
        total, decay = chunks.decays(log_decay)
        since, until = total.exp()[..., None], (total[..., -1:] - total).exp()[..., None]
        attention, C, B = (C @ B.mT) * decay, C * since, B * until
        state, out = carry["h"], []
        for i in range(len(u)):
            out.append(C[i] @ state.mT + attention[i] @ u[i])
            state = state * since[i, :, :, -1:] + u[i].mT @ B[i]
        return chunks.join(out, count) + skip, {"h": state, "tail": tail}

    positional = False
    residual = True

    @property
    def in_place(self) -> bool:
        return self.fused

    def advance(self, inputs: Inputs, state: LayerState, slots: Tensor, spans: Spans) -> Tensor:
        from difyops.engine.kernels import decayed_chunk, mamba2

        o = self.options
        xbc = self.conv1d.advance(inputs["xBC"], state.slot["tail"], slots, spans)
        run = decayed_chunk.ssd if decayed_chunk.pays(spans, len(xbc)) else mamba2.run
        return run(
            xbc, inputs["dt"], state.slot["h"], slots, spans, self.A_log, self.dt_bias, self.D,
            o.groups, o.dt_min, o.dt_max,
        )  # fmt: skip

    def finish(self, out: Tensor, inputs: Inputs, x: Tensor) -> Tensor:
        out = self.norm(out, inputs["gate"])
        return self._out(out, x)

    def _out(self, mixed: Tensor, x: Tensor, norm: RowNorm | None = None) -> Tensor:
        weight, bias = self.out_proj.weight, self.out_proj.bias
        return product(mixed, weight, bias, norm=norm, onto=self.onto(x))

    def finish_few(
        self, inputs: Inputs, x: Tensor, state: LayerState, slots: Tensor, count: int, *, kept: bool
    ) -> Tensor:
        from difyops.engine.kernels import mamba2_few as kernel

        # Several groups have several norms: not what a product takes in.
        if kept or count > FEW or self.options.groups > 1:
            return super().finish_few(inputs, x, state, slots, count, kept=kept)
        gated = kernel.run(inputs, state.slot, slots, self._weights(), count, state.replay)
        return self._out(gated, x, RowNorm(self.norm.weight, self.norm.eps))

    def fold(self, state: LayerState, slots: Tensor, accepted: Tensor) -> None:
        if state.replay["xBC"].shape[1] > FEW:
            super().fold(state, slots, accepted)
            return
        from difyops.engine.kernels import mamba2_few as kernel

        kernel.fold(state.replay, state.slot, slots, accepted, self._weights())

    def _weights(self) -> mamba2_few.Weights:
        from difyops.engine.kernels.mamba2_few import Weights

        o, conv = self.options, self.conv1d
        return Weights(
            conv.weight, conv.bias, self.A_log, self.dt_bias, self.D, o.groups, o.dt_min, o.dt_max
        )

    def recur(self, inputs: Inputs, carry: Carry) -> tuple[Tensor, Carry]:
        xbc, tail = self.conv1d.recur(inputs["xBC"], carry["tail"])
        x, B, C = self._heads(xbc)
        dt = self._steps(inputs["dt"])[..., None]
        decay = (dt * self._rates()[:, None]).exp()
        state = carry["h"] * decay[..., None] + (dt * x)[..., None] * B[..., None, :]
        out = (state @ C[..., None])[..., 0] + x * self._wide(self.D)[:, None]
        return out, {"h": state, "tail": tail}

    def emit(self, out: Tensor, x: Tensor) -> Tensor:
        gate = self._in_proj(x, slice(self.inner))
        emitted: Tensor = self.out_proj(self.norm(out.flatten(-2), gate))
        return emitted

    def reference(self, x: Tensor) -> Tensor:
        o = self.options
        inputs = self.project(x, torch.arange(len(x), device=x.device))
        u, B, C = self._heads(self.conv1d.reference(inputs["xBC"]))
        dt, rates, skip = self._steps(inputs["dt"]), self._rates(), self._wide(self.D)
        state = u.new_zeros(o.heads, o.head_dim, o.state_dim)
        out = torch.empty_like(u)
        for t in range(len(x)):
            for h in range(o.heads):
                step = dt[t, h]
                state[h] = (step * rates[h]).exp() * state[h] + step * torch.outer(u[t, h], B[t, h])
                out[t, h] = state[h] @ C[t, h] + skip[h] * u[t, h]
        return self.emit(out, x)

    def _in_proj(self, x: Tensor, rows: slice) -> Tensor:
        """Some rows of in_proj: the gate is needed only where the layer ends."""
        bias = None if self.in_proj.bias is None else self.in_proj.bias[rows]
        return F.linear(x, self.in_proj.weight[rows], bias)

    def _heads(self, xbc: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[..., channels] -> x [..., H, P], B and C [..., H, N]."""
        o = self.options
        shared = o.groups * o.state_dim
        x, B, C = torch.split(self._wide(xbc), [self.inner, shared, shared], dim=-1)
        B, C = (by_head(t, o.groups, o.heads // o.groups) for t in (B, C))
        return by_head(x, o.heads), B, C

    def _steps(self, dt: Tensor) -> Tensor:
        """Δ, [..., H]."""
        step = F.softplus(self._wide(dt) + self._wide(self.dt_bias))
        return step.clamp(self.options.dt_min, self.options.dt_max)

    def _rates(self) -> Tensor:
        """A, [H]."""
        return -self._wide(self.A_log).exp()

    def _wide(self, x: Tensor) -> Tensor:
        return x.to(self.state_dtype)
