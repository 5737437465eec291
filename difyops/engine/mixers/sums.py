"""Causal sums over keys and values, chunk by chunk: the recurrence of every linear kind.

Two forms. `scan` and `recur` take features as they are. `log_scan` and `log_recur` take the
logarithms of positive features, which may be of any size: no exponential is ever above one.
In both, H / Hkv query heads share a key head, and k behind a sequence's length adds nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from difyops.engine.mixers.base import Carry, within_length
from difyops.engine.state import TensorSpec

CHUNK = 64
#: log_scan holds [B, LOG_CHUNK, LOG_CHUNK, H, M] numbers at a time.
LOG_CHUNK = 16
#: The running maximum of no keys: below every logarithm, and finite, so that it can be subtracted
#: from itself.
NOTHING = -1e30


def scan(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor, lengths: Tensor, log_decay: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """S_t = g S_{t-1} + k_t v_tᵀ and o_t = q_t S_t, in chunks: within one the masked product
    ((q kᵀ) ⊙ D) v with D_ts = g^(t-s), across them q S (arXiv:2307.08621, eq. 7).

    q: [B, T, H, Dk], k: [B, T, Hkv, Dk], v: [B, T, Hkv, Dv], state: [B, Hkv, Dk, Dv], lengths: [B],
    log_decay: log g [Hkv], zeros if None -> out [B, T, H, Dv] and the state after each length.
    """
    if log_decay is None:
        log_decay = state.new_zeros(state.shape[1])
    mine = within_length(lengths, k.shape[1])[..., None, None]
    q, k, v = (t.to(state.dtype) for t in (q, k * mine, v))
    # By head, then by time: [B, Hkv, H / Hkv, T, Dk], [B, Hkv, T, Dk] and [B, Hkv, T, Dv].
    q = grouped(q, k.shape[2]).permute(0, 2, 3, 1, 4)
    k, v = k.transpose(1, 2), v.transpose(1, 2)
    steps = torch.arange(min(CHUNK, k.shape[2]), device=k.device)
    within = _powers(log_decay, steps[:, None] - steps).tril()[:, None]  # [Hkv, 1, C, C]
    since = _powers(log_decay, steps + 1)[:, None, :, None]  # [Hkv, 1, C, 1]
    out = []
    for start in range(0, k.shape[2], CHUNK):
        qc, kc, vc = (t[..., start : start + CHUNK, :] for t in (q, k, v))
        size = kc.shape[2]
        scores = (qc @ kc[:, :, None].mT) * within[..., :size, :size]
        out.append(scores @ vc[:, :, None] + (qc * since[..., :size, :]) @ state[:, :, None])
        # The decay stops at a sequence's length, which may lie within this chunk or before it.
        count = (lengths - start).clamp(0, size)
        left = (count[:, None] - 1 - steps[:size]).clamp(min=0)
        until = _powers(log_decay, left).transpose(0, 1)[..., None]  # [B, Hkv, C, 1]
        kept = _powers(log_decay, count).transpose(0, 1)[..., None, None]
        state = state * kept + (kc * until).mT @ vc
    return torch.cat(out, dim=3).permute(0, 3, 1, 2, 4).flatten(2, 3), state


def recur(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor, log_decay: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """One token of `scan`: q [B, H, Dk], k [B, Hkv, Dk], v [B, Hkv, Dv] -> [B, H, Dv], state."""
    q, k, v = (t.to(state.dtype) for t in (q, k, v))
    if log_decay is not None:
        state = state * log_decay.exp()[:, None, None]
    state = state + k[..., None] * v[..., None, :]
    return (grouped(q, k.shape[1]) @ state).flatten(1, 2), state


def log_spec(
    heads: int, features: int, value_dim: int, dtype: torch.dtype
) -> dict[str, TensorSpec]:
    """What `log_scan` carries: S and z, the sums of k vᵀ and of k, each feature divided by e^m,
    where m is the largest logarithm of it so far."""
    return {
        "S": TensorSpec((heads, features, value_dim), dtype),
        "z": TensorSpec((heads, features), dtype),
        "m": TensorSpec((heads, features), dtype, fill=NOTHING),
    }


def log_scan(
    q: Tensor, k: Tensor, v: Tensor, carry: Carry, lengths: Tensor
) -> tuple[Tensor, Carry]:
    """o_t = Σ_s w_ts v_s / Σ_s w_ts with w_ts = Σ_f exp(q_tf + k_sf), s ≤ t.

    Every token has its own maximum, that of the keys up to it: one of the whole chunk would let a
    later key, if it is large, push what an earlier token sees below the smallest number. The
    denominator is at least 1, so it needs no ε, and the stabiliser cancels exactly.

    q: [B, T, H, M] and k: [B, T, Hkv, M], logarithms; v: [B, T, Hkv, Dv]; carry: see `log_spec`;
    lengths: [B] -> out [B, T, H, Dv] and the carry after each length.
    """
    sums, norms, top = carry["S"], carry["z"], carry["m"]
    behind = ~within_length(lengths, k.shape[1])[..., None, None]
    q, k, v = (t.to(sums.dtype) for t in (q, k.masked_fill(behind, -torch.inf), v))
    q = grouped(q, k.shape[2])
    out = []
    for start in range(0, k.shape[1], LOG_CHUNK):
        qc, kc, vc = (t[:, start : start + LOG_CHUNK] for t in (q, k, v))
        tops = torch.maximum(kc.cummax(1).values, top[:, None])  # [B, C, Hkv, M]
        largest = (qc + tops[:, :, :, None]).amax(-1, keepdim=True)
        earlier = (qc + top[:, None, :, None] - largest).exp()  # [B, C, Hkv, G, M]
        shifted = (qc - largest)[:, :, None] + kc[:, None, :, :, None]  # [B, C, C, Hkv, G, M]
        future = torch.ones(shifted.shape[1:3], dtype=torch.bool, device=q.device).triu(1)
        # Before the exponential: one that overflows has no gradient, not even times 0.
        shifted = shifted.masked_fill(future[..., None, None, None], -torch.inf)
        weights = shifted.exp().sum(-1)
        total = weights.sum(2) + torch.einsum("bthgm,bhm->bthg", earlier, norms)
        mixed = torch.einsum("btshg,bshv->bthgv", weights, vc)
        mixed = mixed + torch.einsum("bthgm,bhmv->bthgv", earlier, sums)
        out.append(mixed / total[..., None])
        last = tops[:, -1]
        rescale, added = (top - last).exp(), (kc - last[:, None]).exp()
        sums = sums * rescale[..., None] + torch.einsum("bshm,bshv->bhmv", added, vc)
        norms = norms * rescale + added.sum(1)
        top = last
    return torch.cat(out, dim=1).flatten(2, 3), {"S": sums, "z": norms, "m": top}


def log_recur(q: Tensor, k: Tensor, v: Tensor, carry: Carry) -> tuple[Tensor, Carry]:
    """One token of `log_scan`: q [B, H, M], k [B, Hkv, M], v [B, Hkv, Dv] -> [B, H, Dv]."""
    sums, norms, before = carry["S"], carry["z"], carry["m"]
    q, k, v = (t.to(sums.dtype) for t in (q, k, v))
    top = torch.maximum(before, k)
    rescale, added = (before - top).exp(), (k - top).exp()
    sums = sums * rescale[..., None] + added[..., None] * v[..., None, :]
    norms = norms * rescale + added
    q = grouped(q, k.shape[1]) + top[:, :, None]
    weights = (q - q.amax(-1, keepdim=True)).exp()  # [B, Hkv, G, M]
    out = (weights @ sums) / (weights @ norms[..., None])
    return out.flatten(1, 2), {"S": sums, "z": norms, "m": top}


def grouped(q: Tensor, heads: int) -> Tensor:
    """[..., H, D] -> [..., Hkv, H / Hkv, D]: the queries of each key head."""
    return q.reshape(*q.shape[:-2], heads, -1, q.shape[-1])


def _powers(log_decay: Tensor, exponents: Tensor) -> Tensor:
    """g^n for each head: [H] and [...] -> [H, ...]."""
    return torch.exp(log_decay.view(-1, *[1] * exponents.dim()) * exponents)
