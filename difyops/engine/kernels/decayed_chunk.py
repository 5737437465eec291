"""Causal sums over keys and values with a decay for each head and token, chunk by chunk: prompts
through Mamba-2, linear attention, its normed kind and retention.

S_t = e^{g_t} S_{t-1} + w_t k_t v_tᵀ and o_t = q_t S_t, in blocks of the semiseparable matrix
(arXiv:2405.21060, section 6). A sequence is cut into segments of several chunks, so that few
states go through memory. Three launches: what each segment adds to the state; the state before
each segment, one after the other; the outputs, where a program goes through the chunks of its
segment with the state in registers. Which segment is whose is found on the GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from difyops.engine.kernels.functions import owner, pieces_before, softplus
from difyops.engine.kernels.spans import Spans

#: Tokens of a segment; half of it where there are few, so that there are enough programs.
_SEGMENT, _FEW = 512, 1024
#: Tokens of a chunk, a divisor; values that a program holds the state of; warps; stages of the
#: first and of the third launch. Mamba-2's and the others', measured on an H200.
_STEPPED, _PLAIN = (32, 64, 4, 3, 3), (64, 128, 4, 2, 2)
#: Numbers of the state that a program of the second launch carries.
_BLOCK = 1024


def pays(spans: Spans, tokens: int) -> bool:
    """Whether so many packed tokens are worth three launches. Only their number and that of the
    sequences are known: a few tokens each, as a commit folds, are sooner read one by one."""
    return spans.begin is not None and spans.kept and tokens > max(64, 16 * len(spans.begin))


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
) -> Tensor:
    """kernels.sums.run for packed spans: g = log_decay and w = 1 -> [N, H, Dv], q's dtype."""
    return _run(q, k, v, state, slots, spans, rate=log_decay, norms=norms, eps=eps, elu=elu)


def ssd(
    xbc: Tensor,
    dt: Tensor,
    state: Tensor,
    slots: Tensor,
    spans: Spans,
    rate: Tensor,
    dt_bias: Tensor,
    skip: Tensor,
    groups: int,
    dt_min: float,
    dt_max: float,
) -> Tensor:
    """kernels.mamba2.run for packed spans: k = B, q = C, v = x, w = Δ and g = Δ A
    -> [N, H * P], xbc's dtype."""
    heads, head_dim, state_dim = state.shape[1:]
    sizes = [heads * head_dim, groups * state_dim, groups * state_dim]
    x, b, c = torch.split(xbc, sizes, dim=-1)
    b, c = (torch.unflatten(t, -1, (groups, state_dim)) for t in (b, c))
    x = torch.unflatten(x, -1, (heads, head_dim))
    return _run(
        c, b, x, state, slots, spans, rate=rate, dt=dt, bias=dt_bias, skip=skip,
        limits=(dt_min, dt_max),
    ).flatten(1)  # fmt: skip


def _run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    slots: Tensor,
    spans: Spans,
    *,
    rate: Tensor | None,
    dt: Tensor | None = None,
    bias: Tensor | None = None,
    skip: Tensor | None = None,
    limits: tuple[float, float] = (0.0, 0.0),
    norms: Tensor | None = None,
    eps: float = 0.0,
    elu: bool = False,
) -> Tensor:
    """q [N, Hq, Dk], k [N, Hk, Dk], v [N, H, Dv], dense but for the stride of their rows, and a
    state of H heads -> [N, max(Hq, H), Dv]: heads of q share a state, or states share q and k.

    With `dt` ([N, H]) w is Δ, within its limits, and the state [.., Dv, Dk]; else [.., Dk, Dv].
    """
    count, heads, value_dim = v.shape
    key_dim, (begin, end) = k.shape[-1], spans.pointers or (slots, slots)
    shared, apart = max(q.shape[1] // heads, 1), heads // k.shape[1]
    chunk, tile, warps, *stages = _PLAIN if dt is None else _STEPPED
    segment = _SEGMENT if count > _FEW else _SEGMENT // 2
    pieces = triton.cdiv(count, segment) + len(slots)
    parts = torch.empty(pieces, heads, key_dim * value_dim, dtype=torch.float32, device=q.device)
    norm_parts = q if norms is None else parts.new_empty(pieces, heads, key_dim)
    totals = parts.new_empty(pieces, heads)
    out = torch.empty(count, heads * shared, value_dim, dtype=q.dtype, device=q.device)
    keys = max(16, triton.next_power_of_2(key_dim))
    # What does not fit into a multiprocessor is cut smaller.
    tile = tile * 128 // max(keys, 128) if q.dtype == torch.bfloat16 else 16
    values = max(16, min(triton.next_power_of_2(value_dim), tile))
    grid = (pieces, heads, triton.cdiv(value_dim, values))
    decay = (
        q if dt is None else dt, q if rate is None else rate, q if bias is None else bias,
        0 if dt is None else dt.stride(0), *limits,
    )  # fmt: skip
    form = dict(
        STEPPED=dt is not None, DECAYED=rate is not None, NORMED=norms is not None, ELU=elu,
        SEGMENT=segment, CHUNK=chunk, KEYS=keys, VALUES=values,
    )  # fmt: skip
    _sum[grid](
        k, v, *decay, begin, end, parts, norm_parts, totals, k.stride(0), v.stride(0),
        len(slots), apart, key_dim, value_dim, **form, num_warps=warps, num_stages=stages[0],
    )  # fmt: skip
    for part, whole in ((parts, state), (norm_parts, norms)):
        if whole is not None:
            size = whole[0, 0].numel()
            _carry[(len(slots), heads, triton.cdiv(size, _BLOCK))](
                part, whole, totals, slots, begin, end, whole.stride(0), size,
                DECAYED=rate is not None, SEGMENT=segment, BLOCK=_BLOCK, num_warps=4,
            )  # fmt: skip
    _mix[grid](
        q, k, v, *decay, begin, end, parts, norm_parts, q if skip is None else skip, out,
        q.stride(0), k.stride(0), v.stride(0), len(slots), apart, eps, key_dim, value_dim,
        **form, SHARED=shared, SKIP=skip is not None, num_warps=warps, num_stages=stages[1],
    )  # fmt: skip
    return out


@triton.jit
def _feature(x, inside, ELU: tl.constexpr):
    if ELU:
        wide = x.to(tl.float32)
        wide = tl.where(wide > 0, wide + 1, tl.exp(tl.minimum(wide, 0)))
        return tl.where(inside, wide, 0).to(x.dtype)
    else:
        return x


@triton.jit
def _decays(raw, there, speed, shift, dt_min, dt_max, STEPPED: tl.constexpr, DECAYED: tl.constexpr):
    """The weight of each token, and the sum of the logarithms of the decays up to it."""
    weight = tl.where(there, 1.0, 0.0)
    if STEPPED:
        delay = softplus(raw.to(tl.float32) + shift)
        weight = tl.where(there, tl.minimum(tl.maximum(delay, dt_min), dt_max), 0.0)
    since = tl.zeros_like(weight)
    if DECAYED:
        since = tl.cumsum(weight * speed, 0)
    return weight, since


@triton.jit
def _raw(dt, t, count, dt_step, STEPPED: tl.constexpr):
    """The time steps as they were projected, loaded a chunk before they are needed."""
    if STEPPED:
        return tl.load(dt + t * dt_step, mask=t < count, other=0)
    else:
        return 0.0


@triton.jit
def _shares(c, weight, since, DECAYED: tl.constexpr):
    """What of each token of a chunk is left for each later one."""
    later = c[:, None] >= c[None, :]
    if DECAYED:
        # Masked before the exponential: behind the diagonal it may be of any size.
        between = tl.where(later, since[:, None] - since[None, :], -1e30)
        return tl.exp(between) * weight[None, :]
    else:
        return tl.where(later, 1.0, 0.0)


@triton.jit
def _folded(s, key, value, weight, since, DECAYED: tl.constexpr):
    """The state behind a chunk: key [KEYS, CHUNK], value [CHUNK, VALUES]."""
    if DECAYED:
        last = tl.min(since, 0)
        key = (key * (weight * tl.exp(last - since))[None, :]).to(value.dtype)
        s *= tl.exp(last)
    return tl.dot(key, value, s, input_precision="ieee")


@triton.jit
def _speed(rate, bias, head, STEPPED: tl.constexpr, DECAYED: tl.constexpr):
    """Of a head: g of a token that weighs 1, and what its time steps are shifted by."""
    speed, shift = 0.0, 0.0
    if DECAYED:
        speed = tl.load(rate + head).to(tl.float32)
    if STEPPED:
        speed, shift = -tl.exp(speed), tl.load(bias + head).to(tl.float32)
    return speed, shift


@triton.jit(do_not_specialize=["sequences"])
def _sum(
    k, v, dt, rate, bias, dt_step, dt_min, dt_max, begin, end, parts, norm_parts, totals,
    k_step, v_step, sequences, apart, key_dim, value_dim,
    STEPPED: tl.constexpr, DECAYED: tl.constexpr, NORMED: tl.constexpr, ELU: tl.constexpr,
    SEGMENT: tl.constexpr, CHUNK: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    piece, head, heads = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    row, number = owner(begin, end, sequences, piece, SEGMENT)
    if row == sequences:
        return
    first = tl.load(begin + row) + number * SEGMENT
    count = tl.minimum(tl.load(end + row) - first, SEGMENT).to(tl.int32)
    c, i = tl.arange(0, CHUNK), tl.arange(0, KEYS)
    j = tl.program_id(2) * VALUES + tl.arange(0, VALUES)
    k += first * k_step + (head // apart) * key_dim
    v += first * v_step + head * value_dim
    dt += first * dt_step + head
    speed, shift = _speed(rate, bias, head, STEPPED, DECAYED)
    s = tl.zeros([KEYS, VALUES], tl.float32)
    z = tl.zeros([KEYS], tl.float32)
    total = 0.0
    raw = _raw(dt, c, count, dt_step, STEPPED)
    for n in range(0, count, CHUNK):
        t = n + c
        there = t < count
        weight, since = _decays(raw, there, speed, shift, dt_min, dt_max, STEPPED, DECAYED)
        raw = _raw(dt, t + CHUNK, count, dt_step, STEPPED)
        inside = there[None, :] & (i < key_dim)[:, None]
        key = tl.load(k + t[None, :] * k_step + i[:, None], mask=inside, other=0)
        key = _feature(key, inside, ELU)
        value = tl.load(
            v + t[:, None] * v_step + j[None, :],
            mask=there[:, None] & (j < value_dim)[None, :],
            other=0,
        )
        if NORMED:
            z += tl.sum(key.to(tl.float32), 1)
        total += tl.min(since, 0)
        s = _folded(s, key, value, weight, since, DECAYED)
    base = piece * heads + head
    place = parts + base * key_dim * value_dim + _flat(i, j, key_dim, value_dim, STEPPED)
    tl.store(place, s, mask=(i < key_dim)[:, None] & (j < value_dim)[None, :])
    if tl.program_id(2) == 0:
        if DECAYED:
            tl.store(totals + base, total)
        if NORMED:
            tl.store(norm_parts + base * key_dim + i, z, mask=i < key_dim)


@triton.jit
def _flat(i, j, key_dim, value_dim, STEPPED: tl.constexpr):
    """Where key i and value j meet in a head's state."""
    if STEPPED:
        return j[None, :] * key_dim + i[:, None]
    else:
        return i[:, None] * value_dim + j[None, :]


@triton.jit
def _carry(
    parts, state, totals, slots, begin, end, state_step, size,
    DECAYED: tl.constexpr, SEGMENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    head, heads = tl.program_id(1), tl.num_programs(1)
    at = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    mine = at < size
    slot = tl.load(slots + row)
    kept = state + slot * state_step + head * size + at
    s = tl.load(kept, mask=mine, other=0).to(tl.float32)
    first = pieces_before(begin, end, row, SEGMENT)
    count = tl.cdiv(tl.load(end + row) - tl.load(begin + row), SEGMENT)
    totals += first * heads + head
    parts += (first * heads + head) * size + at
    added = tl.load(parts, mask=mine & (count > 0), other=0)
    for n in range(0, count):
        following = parts + heads.to(tl.int64) * size
        later = tl.load(following, mask=mine & (n + 1 < count), other=0)
        tl.store(parts, s, mask=mine)
        if DECAYED:
            s *= tl.exp(tl.load(totals + n * heads))
        s += added
        added = later
        parts = following
    tl.store(kept, s.to(state.dtype.element_ty), mask=mine & (slot > 0))


@triton.jit(do_not_specialize=["sequences"])
def _mix(
    q, k, v, dt, rate, bias, dt_step, dt_min, dt_max, begin, end, parts, norm_parts, skip, out,
    q_step, k_step, v_step, sequences, apart, eps, key_dim, value_dim,
    STEPPED: tl.constexpr, DECAYED: tl.constexpr, NORMED: tl.constexpr, ELU: tl.constexpr,
    SEGMENT: tl.constexpr, CHUNK: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr,
    SHARED: tl.constexpr, SKIP: tl.constexpr,
):  # fmt: skip
    piece, head, heads = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    row, number = owner(begin, end, sequences, piece, SEGMENT)
    if row == sequences:
        return
    first = tl.load(begin + row) + number * SEGMENT
    count = tl.minimum(tl.load(end + row) - first, SEGMENT).to(tl.int32)
    c, i = tl.arange(0, CHUNK), tl.arange(0, KEYS)
    j = tl.program_id(2) * VALUES + tl.arange(0, VALUES)
    base = piece * heads + head
    place = parts + base * key_dim * value_dim + _flat(i, j, key_dim, value_dim, STEPPED)
    s = tl.load(place, mask=(i < key_dim)[:, None] & (j < value_dim)[None, :], other=0)
    z = tl.zeros([KEYS], tl.float32)
    if NORMED:
        z = tl.load(norm_parts + base * key_dim + i, mask=i < key_dim, other=0)
    k += first * k_step + (head // apart) * key_dim
    v += first * v_step + head * value_dim
    q += first * q_step
    out += first * heads * SHARED * value_dim
    dt += first * dt_step + head
    speed, shift = _speed(rate, bias, head, STEPPED, DECAYED)
    raw = _raw(dt, c, count, dt_step, STEPPED)
    through = 0.0
    if SKIP:
        through = tl.load(skip + head).to(tl.float32)
    for n in range(0, count, CHUNK):
        t = n + c
        there = t < count
        weight, since = _decays(raw, there, speed, shift, dt_min, dt_max, STEPPED, DECAYED)
        raw = _raw(dt, t + CHUNK, count, dt_step, STEPPED)
        inside = there[None, :] & (i < key_dim)[:, None]
        key = tl.load(k + t[None, :] * k_step + i[:, None], mask=inside, other=0)
        key = _feature(key, inside, ELU)
        shown = there[:, None] & (j < value_dim)[None, :]
        value = tl.load(v + t[:, None] * v_step + j[None, :], mask=shown, other=0)
        kind = value.dtype
        before = s.to(kind)
        share = _shares(c, weight, since, DECAYED)
        for member in tl.static_range(SHARED):
            at = head * SHARED + member
            asked = there[:, None] & (i < key_dim)[None, :]
            query = tl.load(
                q + (at // apart) * key_dim + t[:, None] * q_step + i[None, :], mask=asked, other=0
            )
            query = _feature(query, asked, ELU)
            scores = tl.dot(query, key, input_precision="ieee") * share
            mixed = tl.dot(query, before, input_precision="ieee")
            if DECAYED:
                mixed *= tl.exp(since)[:, None]
            mixed = tl.dot(scores.to(kind), value, mixed, input_precision="ieee")
            if NORMED:
                under = tl.sum(scores, 1) + tl.sum(query.to(tl.float32) * z[None, :], 1)
                mixed = mixed / (under + eps)[:, None]
            if SKIP:
                mixed += value.to(tl.float32) * through
            tl.store(
                out + (t[:, None] * heads * SHARED + at) * value_dim + j[None, :],
                mixed.to(out.dtype.element_ty),
                mask=shown,
            )
        if NORMED:
            z += tl.sum(key.to(tl.float32), 1)
        s = _folded(s, key, value, weight, since, DECAYED)
