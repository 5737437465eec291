"""Causal sums over keys and values token by token: linear attention, its normed kind, retention.
The state stays in registers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from difyops.engine.kernels import decayed_chunk
from difyops.engine.kernels.functions import ahead, wait
from difyops.engine.kernels.spans import Spans

#: Values that one program holds the state of, and its warps; see gated_delta.py.
_STEP, _PROMPT = (64, 4), (8, 1)
#: For up to so many sequences, where keys are summed, too: one tile changes their sums in place,
#: and a launch is saved.
_FEW, _WHOLE = 8, (128, 8)


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    slots: Tensor,
    spans: Spans,
    *,
    log_decay: Tensor | None = None,
    norms: Tensor | None = None,
    eps: float = 0.0,
    elu: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """mixers.sums.recur for each token of each span: q [N, H, Dk], k [N, Hkv, Dk], v [N, Hkv, Dv],
    each dense but for the stride of its rows; state [slots + 1, Hkv, Dk, Dv], slots [B] ->
    [N, H, Dv], in `dtype`, or in q's where it is read chunk by chunk (decayed_chunk.py).

    With `norms` ([slots + 1, Hkv, Dk], the sums of k) the output is divided by q · norms + eps;
    with `elu` q and k are taken through elu(x) + 1 first. `log_decay`: [Hkv].
    """
    if decayed_chunk.pays(spans, len(q)):
        return decayed_chunk.run(
            q, k, v, state, slots, spans, log_decay=log_decay, norms=norms, eps=eps, elu=elu
        )
    heads, key_dim, value_dim = state.shape[1:]
    out = torch.empty(*q.shape[:2], value_dim, dtype=dtype, device=q.device)
    tile, warps = _STEP if spans.short else _PROMPT
    if norms is not None and spans.short and len(slots) <= _FEW:
        tile, warps = _WHOLE
    tile = min(tile, triton.next_power_of_2(value_dim))
    tiles = triton.cdiv(value_dim, tile)
    # Every tile needs the norms, and none may change them while another reads.
    after = norms if norms is None or tiles == 1 else norms.new_empty(len(slots), *norms.shape[1:])
    pointers = spans.pointers
    _run[(len(slots), heads, tiles)](
        q, k, v, state, state if norms is None else norms, state if after is None else after,
        slots, *(pointers or (slots, slots)), state if log_decay is None else log_decay, out,
        q.stride(0), k.stride(0), v.stride(0), state.stride(0),
        0 if norms is None else norms.stride(0), spans.count, eps, key_dim, value_dim,
        SHARED=q.shape[1] // heads, ELU=elu, NORMED=norms is not None,
        DECAYED=log_decay is not None, PACKED=pointers is not None, KEPT=spans.kept,
        APART=tiles > 1, KEYS=triton.next_power_of_2(key_dim), VALUES=tile, num_warps=warps,
        **ahead(q),
    )  # fmt: skip
    if after is not None and tiles > 1 and spans.kept:
        norms.index_copy_(0, slots, after)  # type: ignore[union-attr]
    return out


@triton.jit
def _feature(x, ELU: tl.constexpr):
    if ELU:
        return tl.where(x > 0, x + 1, tl.exp(tl.minimum(x, 0)))
    else:
        return x


@triton.jit
def _run(
    q, k, v, state, norms, after, slots, begin, end, log_decay, out,
    q_step, k_step, v_step, state_step, norms_step, count, eps, key_dim, value_dim,
    SHARED: tl.constexpr, ELU: tl.constexpr, NORMED: tl.constexpr, DECAYED: tl.constexpr,
    PACKED: tl.constexpr, KEPT: tl.constexpr, APART: tl.constexpr,
    KEYS: tl.constexpr, VALUES: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    head, heads = tl.program_id(1), tl.num_programs(1)
    slot = tl.load(slots + row)
    i = tl.arange(0, KEYS)
    j = tl.program_id(2) * VALUES + tl.arange(0, VALUES)
    inside = i < key_dim
    mine = inside[:, None] & (j < value_dim)[None, :]
    place = state + slot * state_step + head * key_dim * value_dim
    place = place + i[:, None] * value_dim + j[None, :]
    s = tl.load(place, mask=mine, other=0).to(tl.float32)
    wait(AHEAD)
    z = tl.zeros([KEYS], tl.float32)
    if NORMED:
        total = slot * norms_step + head * key_dim + i
        z = tl.load(norms + total, mask=inside, other=0).to(tl.float32)
    decay = 1.0
    if DECAYED:
        decay = tl.exp(tl.load(log_decay + head).to(tl.float32))
    if PACKED:
        first, last = tl.load(begin + row), tl.load(end + row)
    else:
        first, last = row * count, row * count + count
    # What the next token needs is on its way while this one is computed.
    there = first < last
    from_k, from_v = k + head * key_dim + i, v + head * value_dim + j
    next_key = tl.load(from_k + first * k_step, mask=there & inside, other=0)
    next_value = tl.load(from_v + first * v_step, mask=there & (j < value_dim), other=0)
    for t in range(first, last):
        key, value = next_key.to(tl.float32), next_value
        there = t + 1 < last
        next_key = tl.load(from_k + (t + 1) * k_step, mask=there & inside, other=0)
        next_value = tl.load(from_v + (t + 1) * v_step, mask=there & (j < value_dim), other=0)
        key = tl.where(inside, _feature(key, ELU), 0)
        s = s * decay + key[:, None] * value.to(tl.float32)[None, :]
        z = z + key
        for member in tl.static_range(SHARED):
            at = head * SHARED + member
            query = tl.load(q + t * q_step + at * key_dim + i, mask=inside, other=0)
            query = tl.where(inside, _feature(query.to(tl.float32), ELU), 0)
            mixed = tl.sum(query[:, None] * s, 0)
            if NORMED:
                mixed = mixed / (tl.sum(query * z, 0) + eps)
            here = out + (t * heads * SHARED + at) * value_dim + j
            tl.store(here, mixed.to(out.dtype.element_ty), mask=j < value_dim)
    if KEPT:
        tl.store(place, s.to(state.dtype.element_ty), mask=mine & (slot > 0))
        if NORMED:
            if APART:
                total = row * heads * key_dim + head * key_dim + i
                # The null slot's stay zero.
                z = tl.where(slot > 0, z, 0)
                one = inside & (tl.program_id(2) == 0)
            else:
                one = inside & (slot > 0)
            tl.store(after + total, z.to(norms.dtype.element_ty), mask=one)
