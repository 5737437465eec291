"""Softmax attention: grouped queries, rotary positions, QK-norm, an output gate, paged KV."""

from __future__ import annotations

from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.backends.cuda import SDPAParams, can_use_cudnn_attention
from torch.nn.attention.bias import causal_lower_right

from difyops.engine import layers
from difyops.engine.kernels.spans import Spans
from difyops.engine.layers import Joined, RMSNorm, product, rotary
from difyops.engine.mixers import base
from difyops.engine.mixers.base import Mixer, drafted_positions
from difyops.engine.state import LayerState, StateSpec, TensorSpec


class Softmax(Mixer):
    """softmax(q kᵀ / √Dk) v over everything before (arXiv:1706.03762), queries in groups that
    share keys (arXiv:2305.13245). Keys and values are kept in pages; a commit moves no data."""

    class Options(base.Options):
        """`value_dim` None: that of the keys. `rotary_dim` 0: no positions; `rope_theta` is their
        base. `gated`: the output is multiplied by sigmoid(gate), which q_proj makes beside each
        query (Qwen3.5). `norm_offset` is that of the QK-norms."""

        heads: int = Field(gt=0)
        kv_heads: int = Field(gt=0)
        head_dim: int = Field(gt=0)
        value_dim: int | None = Field(None, gt=0)
        rotary_dim: int = Field(0, ge=0, multiple_of=2)
        rope_theta: float = Field(10000.0, gt=0)
        qk_norm: bool = False
        norm_eps: float = Field(1e-6, gt=0)
        norm_offset: float = 0.0
        gated: bool = False
        bias: bool = False
        output_bias: bool = False

        @model_validator(mode="after")
        def _shapes_agree(self) -> Self:
            if self.heads % self.kv_heads:
                raise ValueError(f"kv_heads: {self.kv_heads} does not divide heads, {self.heads}")
            if self.rotary_dim > self.head_dim:
                raise ValueError(
                    f"rotary_dim: {self.rotary_dim} is more than head_dim, {self.head_dim}"
                )
            if self.gated and self.value_dim not in (None, self.head_dim):
                raise ValueError("value_dim: a gate needs values as wide as queries")
            return self

    residual = True

    def __init__(self, width: int, options: Options) -> None:
        super().__init__()
        self.options = o = options
        self.value_dim = o.value_dim or o.head_dim
        self.q_proj = nn.Linear(width, o.heads * o.head_dim * (1 + o.gated), bias=o.bias)
        self.k_proj = nn.Linear(width, o.kv_heads * o.head_dim, bias=o.bias)
        self.v_proj = nn.Linear(width, o.kv_heads * self.value_dim, bias=o.bias)
        self.o_proj = nn.Linear(o.heads * self.value_dim, width, bias=o.output_bias)
        if o.qk_norm:
            self.q_norm = RMSNorm(o.head_dim, o.norm_eps, o.norm_offset)
            self.k_norm = RMSNorm(o.head_dim, o.norm_eps, o.norm_offset)
        #: A family with another scaling of positions replaces these.
        self.frequencies = Frequencies(layers.inverse_frequencies(o.rotary_dim, o.rope_theta))

    def state_spec(self) -> StateSpec:
        o, dtype = self.options, self.k_proj.weight.dtype
        return StateSpec(
            token={
                "k": TensorSpec((o.kv_heads, o.head_dim), dtype),
                "v": TensorSpec((o.kv_heads, self.value_dim), dtype),
            }
        )

    def forward(self, x: Tensor) -> Tensor:
        q, k, v, gate = self._project(x, torch.arange(x.shape[1], device=x.device))
        qh, kh, vh = (t.transpose(1, 2) for t in (q, k, v))
        out = F.scaled_dot_product_attention(qh, kh, vh, is_causal=True, enable_gqa=True)
        return self._emit(out.transpose(1, 2), gate)

    def prefill(self, x: Tensor, state: LayerState, slots: Tensor, cu_seqlens: Tensor) -> Tensor:
        if self.fused:
            return self._paged(x, state, slots, Spans.packed(cu_seqlens))
        bounds = cu_seqlens.tolist()
        before = state.lengths[slots].tolist()
        spans = list(zip(bounds[:-1], bounds[1:], before, strict=True))
        positions = torch.cat(
            [torch.arange(b, b + stop - start, device=x.device) for start, stop, b in spans]
        )
        q, k, v, gate = self._project(x, positions)
        self._store(k, v, state, slots.repeat_interleave(cu_seqlens.diff()), positions)
        out = []
        for slot, (start, stop, b) in zip(slots, spans, strict=True):
            keys, values = k[start:stop], v[start:stop]
            if b:
                earlier = torch.arange(b, device=x.device)
                rows = state.rows(slot.expand(b), earlier)
                keys = torch.cat((state.token["k"][rows], keys))
                values = torch.cat((state.token["v"][rows], values))
            out.append(_causal(q[start:stop], keys, values))
        return self._emit(torch.cat(out), gate)

    def step(self, x: Tensor, state: LayerState, slots: Tensor) -> Tensor:
        return self.verify(x[:, None], state, slots)[:, 0]

    @property
    def graphable(self) -> bool:
        """Without the kernels the longest context shapes the work."""
        return self.fused

    @property
    def graphable_prefill(self) -> bool:
        return self.fused

    def fuse(self) -> None:
        if not self.fused:
            self._inward = Joined(self.q_proj, self.k_proj, self.v_proj)
        super().fuse()

    def verify(self, x: Tensor, state: LayerState, slots: Tensor) -> Tensor:
        count = x.shape[1]
        if self.fused:
            return self._paged(x.flatten(0, 1), state, slots, Spans(count)).view_as(x)
        positions = drafted_positions(state, slots, count)
        q, k, v, gate = self._project(x, positions)
        self._store(k, v, state, slots[:, None].expand_as(positions), positions)
        longest = int(positions.max()) + 1
        reach = torch.arange(longest, device=x.device)
        allowed = reach <= positions[..., None]
        rows = state.rows(slots[:, None].expand(-1, longest), reach.expand(len(slots), -1))
        # Rows behind a sequence's end may hold what another left, and a mask does not stop a nan
        # (0 * nan is one): they read the null page, which only finite tokens pad.
        rows = rows.masked_fill(~allowed[:, -1], 0)
        out = _attend(q, state.token["k"][rows], state.token["v"][rows], allowed)
        return self._emit(out, gate)

    def note(self, x: Tensor, state: LayerState, slots: Tensor) -> None:
        if self.fused:
            self._placed(x.flatten(0, 1), state, slots, Spans(x.shape[1]))
            return
        positions = drafted_positions(state, slots, x.shape[1])
        _, k, v, _ = self._project(x, positions)
        self._store(k, v, state, slots[:, None].expand_as(positions), positions)

    def _placed(
        self, x: Tensor, state: LayerState, slots: Tensor, spans: Spans
    ) -> tuple[Tensor, Tensor | None]:
        """Put the keys and values of each span's tokens, x [N, width], where they belong. -> q
        [N, H, Dk] and the gate [N, H, Dv]."""
        from difyops.engine.kernels import attention as kernel

        o = self.options
        q, gate, k, v = self._heads(*self._inward(x, self.taken))
        frequencies, scale = self.frequencies.on(x) if o.rotary_dim else (None, 1.0)
        norms = (self.q_norm.weight, self.k_norm.weight) if o.qk_norm else (None, None)
        q = kernel.place(
            q, k, v, *_pages(state, slots), spans, frequencies=frequencies, scale=scale,
            q_norm=norms[0], k_norm=norms[1], eps=o.norm_eps, offset=o.norm_offset,
        )  # fmt: skip
        return q, gate

    def _paged(self, x: Tensor, state: LayerState, slots: Tensor, spans: Spans) -> Tensor:
        """The tokens of each span, x [N, width], by kernels that find everything on the GPU; but
        a long prompt by a library's, which is told lengths."""
        from difyops.engine.kernels import attention as kernel

        q, gate = self._placed(x, state, slots, spans)
        if spans.begin is None or len(x) <= kernel.SHORT:
            out = kernel.attend(q, *_pages(state, slots), spans, gate)
        else:
            out = _long(q, state, slots, spans)
            out = out if gate is None else out * torch.sigmoid(gate)
        out = out.flatten(-2)
        return product(out, self.o_proj.weight, self.o_proj.bias, onto=self.onto(x))

    def commit(self, state: LayerState, slots: Tensor, accepted: Tensor) -> None:
        """Nothing to do: verify wrote behind the length, and the length moves."""

    def reference(self, x: Tensor) -> Tensor:
        o, length = self.options, x.shape[0]
        q, k, v, gate = self._project(x, torch.arange(length, device=x.device))
        k = k.repeat_interleave(o.heads // o.kv_heads, dim=1)
        v = v.repeat_interleave(o.heads // o.kv_heads, dim=1)
        scores = torch.einsum("thd,shd->hts", q, k) * o.head_dim**-0.5
        hidden = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        return self._emit(torch.einsum("hts,shd->thd", weights, v), gate)

    def _project(
        self, x: Tensor, positions: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """q [..., H, Dk], k [..., Hkv, Dk], v [..., Hkv, Dv] and the gate [..., H, Dv]."""
        o = self.options
        if self.fused:
            q, gate, k, v = self._heads(*self._inward(x, self.taken))
        else:
            q, gate, k, v = self._heads(self.q_proj(x), self.k_proj(x), self.v_proj(x))
        if o.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if o.rotary_dim:
            frequencies, scale = self.frequencies.on(x)
            q = rotary(q, positions, frequencies, scale)
            k = rotary(k, positions, frequencies, scale)
        return q, k, v, gate

    def _heads(
        self, q: Tensor, k: Tensor, v: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """What the projections answer -> q, the gate [..., H, Dv], k and v, by head."""
        o, gate = self.options, None
        if o.gated:
            q, gate = torch.unflatten(q, -1, (o.heads, 2 * o.head_dim)).chunk(2, dim=-1)
        else:
            q = torch.unflatten(q, -1, (o.heads, o.head_dim))
        k = torch.unflatten(k, -1, (o.kv_heads, o.head_dim))
        return q, gate, k, torch.unflatten(v, -1, (o.kv_heads, self.value_dim))

    def _store(
        self, k: Tensor, v: Tensor, state: LayerState, slots: Tensor, positions: Tensor
    ) -> None:
        rows = state.rows(slots, positions).flatten()
        state.token["k"][rows] = k.reshape(-1, *k.shape[-2:])
        state.token["v"][rows] = v.reshape(-1, *v.shape[-2:])

    def _emit(self, out: Tensor, gate: Tensor | None) -> Tensor:
        if gate is not None:
            out = out * torch.sigmoid(gate)
        emitted: Tensor = self.o_proj(out.flatten(-2))
        return emitted


class Frequencies:
    """Inverse frequencies of rotary positions, kept out of the module's dtype: rounded to bf16
    they would turn far positions by the wrong angle."""

    def __init__(self, inverse: Tensor, scale: float = 1.0) -> None:
        self._inverse = inverse
        self._scale = scale

    def on(self, x: Tensor) -> tuple[Tensor, float]:
        """The frequencies where x is, in float32 or wider, and the factor of cosine and sine."""
        wanted: dict[str, Any] = {"device": x.device, "dtype": layers.wide(x.dtype)}
        self._inverse = self._inverse.to(**wanted)
        return self._inverse, self._scale


class _Pages(NamedTuple):
    """Where the kernels find the keys and values of some slots."""

    k: Tensor
    v: Tensor
    table: Tensor
    lengths: Tensor
    slots: Tensor
    size: int


def _pages(state: LayerState, slots: Tensor) -> _Pages:
    k, v = state.token["k"], state.token["v"]
    return _Pages(k, v, state.table, state.lengths, slots, state.page_size)


def _long(q: Tensor, state: LayerState, slots: Tensor, spans: Spans) -> Tensor:
    """Each sequence by itself, its keys and values gathered from their pages: q [N, H, Dk], of the
    tokens of each span, whose keys are stored -> [N, H, Dv]."""
    begin, end = spans.pointers or (slots, slots)
    told = torch.stack((slots, state.lengths[slots], begin, end), dim=-1).tolist()
    out = q.new_zeros(*q.shape[:2], state.token["v"].shape[-1])
    for slot, before, first, last in told:
        reach = torch.arange(before + last - first, device=q.device)
        rows = state.rows(slots.new_full((), slot).expand_as(reach), reach)
        out[first:last] = _behind(q[first:last], state.token["k"][rows], state.token["v"][rows])
    return out


def _behind(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`_causal` where there may be much: no mask lies in memory, and the fastest library is asked.
    That one's causal mask is square, so it reads what is earlier apart, and the two are joined by
    the sums of their weights."""
    earlier = len(k) - len(q)
    if not earlier or q.dtype == torch.float32:
        return _causal(q, k, v)
    qh, kh, vh = (t.transpose(0, 1)[None] for t in (q, k, v))
    if not can_use_cudnn_attention(SDPAParams(qh, kh, vh, None, 0.0, False, True)):
        mask = causal_lower_right(len(q), len(k))
        out = F.scaled_dot_product_attention(qh, kh, vh, attn_mask=mask, enable_gqa=True)
        return out[0].transpose(0, 1)
    attend = torch.ops.aten._scaled_dot_product_cudnn_attention
    old, before = attend(qh, kh[:, :, :earlier], vh[:, :, :earlier], None, True, 0.0, False)[:2]
    new, among = attend(qh, kh[:, :, earlier:], vh[:, :, earlier:], None, True, 0.0, True)[:2]
    share = torch.sigmoid(among - before).view(*new.shape[:3], 1)
    return torch.lerp(old.float(), new.float(), share)[0].transpose(0, 1).to(q.dtype)


def _causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q: [T, H, Dk], the last T of k: [L, Hkv, Dk], v: [L, Hkv, Dv] -> [T, H, Dv]."""
    count, length = q.shape[0], k.shape[0]
    if count == length:
        qh, kh, vh = (t.transpose(0, 1)[None] for t in (q, k, v))
        out = F.scaled_dot_product_attention(qh, kh, vh, is_causal=True, enable_gqa=True)
        return out[0].transpose(0, 1)
    positions = torch.arange(length - count, length, device=q.device)
    allowed = torch.arange(length, device=q.device) <= positions[:, None]
    return _attend(q[None], k[None], v[None], allowed[None])[0]


def _attend(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor) -> Tensor:
    """q: [B, K, H, Dk], k: [B, L, Hkv, Dk], v: [B, L, Hkv, Dv], allowed: [B, K, L]
    -> [B, K, H, Dv]."""
    qh, kh, vh = (t.transpose(1, 2) for t in (q, k, v))
    out = F.scaled_dot_product_attention(qh, kh, vh, attn_mask=allowed[:, None], enable_gqa=True)
    return out.transpose(1, 2)
