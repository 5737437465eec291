"""What a pass with guesses does beside the model: likeliest tokens, places that count, and what a
module of multi-token prediction reads. One or two launches each, so that a guess is cheap."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from difyops.engine.kernels.functions import ahead, wait

#: Tokens whose scores one program makes, columns of their weights at a time, and its warps.
_LINES, _COLUMNS, _WARPS, _STAGES = 64, 128, 4, 4


def likeliest(x: Tensor, weight: Tensor, scales: Tensor, out: Tensor) -> None:
    """`best` of the logits that a quantised head makes of x: x [B, K], weight [V, K], scales [V]
    -> out [B, 1], with rows of any stride. The head is read once, for up to 64 rows."""
    count, width = x.shape
    size = len(weight)
    parts = triton.cdiv(size, _LINES)
    tops = torch.empty(count, parts, dtype=torch.float32, device=x.device)
    which = torch.empty(count, parts, dtype=torch.int32, device=x.device)
    rows = max(16, triton.next_power_of_2(count))
    _score[(parts,)](
        x.contiguous(), weight.view(torch.uint8), scales, tops, which, count, size, width,
        ROWS=rows, LINES=_LINES, COLUMNS=_COLUMNS, num_warps=_WARPS, num_stages=_STAGES,
        **ahead(x),
    )  # fmt: skip
    _picked(tops, which, out)


def _picked(tops: Tensor, which: Tensor, out: Tensor) -> None:
    rows, parts = tops.shape
    _pick[(rows,)](
        tops, which, out, parts, out.shape[1], out.stride(0), out.stride(1),
        PARTS=triton.next_power_of_2(parts), num_warps=4, **ahead(tops),
    )  # fmt: skip


def judge(
    guesses: Tensor, best: Tensor, room: Tensor, stops: Tensor, answers: Tensor, last: Tensor
) -> None:
    """windows.judge; guesses, stops and answers may have any strides, the others are dense."""
    _judge[(len(best),)](
        guesses, best, room, stops, answers, last, guesses.stride(0), guesses.stride(1),
        stops.stride(0), stops.stride(1), answers.stride(0), answers.stride(1),
        GUESSES=guesses.shape[1], STOPS=stops.shape[1], num_warps=1, **ahead(best),
    )  # fmt: skip


def paired(
    tokens: Tensor, embedding: Tensor, kept: Tensor, slots: Tensor, rest: Tensor | None,
    embedding_norm: Tensor, hidden_norm: Tensor, eps: float, offset: float,
    accepted: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """What a module of multi-token prediction reads of J places: [norm(e), norm(h)] of each.

    tokens [B, J] with rows of any stride, embedding [V, W]; h is kept[slots] at the first place and
    rest [B, J or J - 1, W] behind it, a place earlier -> [B, J, 2 W]. With `accepted` ([B]), `kept`
    becomes the last accepted place of rest.
    """
    batch, count = tokens.shape
    width = kept.shape[1]
    out = torch.empty(batch, count, 2 * width, dtype=kept.dtype, device=kept.device)
    block = triton.next_power_of_2(width)
    _paired[(batch * count, 2)](
        tokens, embedding, kept, slots, kept if rest is None else rest, embedding_norm, hidden_norm,
        slots if accepted is None else accepted, out,
        tokens.stride(0), 0 if rest is None else rest.stride(0), count, width, eps, offset,
        MOVED=accepted is not None, BLOCK=block, num_warps=min(max(block // 256, 1), 8),
        **ahead(out.view(batch * count, -1)),
    )  # fmt: skip
    return out


@triton.jit
def _score(
    x, weight, scales, tops, which, count, size, width,
    ROWS: tl.constexpr, LINES: tl.constexpr, COLUMNS: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(0)
    n = part * LINES + tl.arange(0, LINES)
    m = tl.arange(0, ROWS)
    k = tl.arange(0, COLUMNS)
    place = weight + n.to(tl.int64)[:, None] * width + k[None, :]
    row = x + m[None, :] * width + k[:, None]
    total = tl.zeros([LINES, ROWS], tl.float32)
    scale = tl.load(scales + n, mask=n < size, other=0)
    wait(AHEAD)
    for start in range(0, width, COLUMNS):
        inside = start + k < width
        w = tl.load(place + start, mask=(n < size)[:, None] & inside[None, :], other=0)
        now = tl.load(row + start, mask=(m < count)[None, :] & inside[:, None], other=0)
        total += tl.dot(w.to(tl.float8e4nv, bitcast=True).to(now.dtype), now)
    total = tl.where((n < size)[:, None], total * scale[:, None], float("-inf"))
    top, where = tl.max(total, 0, return_indices=True)
    here = m * tl.num_programs(0) + part
    tl.store(tops + here, top, mask=m < count)
    tl.store(which + here, part * LINES + where, mask=m < count)


@triton.jit
def _pick(
    tops, which, out, parts, count, out_row, out_step, PARTS: tl.constexpr, AHEAD: tl.constexpr
):
    wait(AHEAD)
    row = tl.program_id(0)
    p = tl.arange(0, PARTS)
    top = tl.load(tops + row * parts + p, mask=p < parts, other=float("-inf"))
    where = tl.argmax(top, 0)
    found = tl.load(which + row * parts + where).to(tl.int64)
    tl.store(out + (row // count) * out_row + (row % count) * out_step, found)


@triton.jit
def _judge(
    guesses, best, room, stops, answers, last,
    guess_row, guess_step, stop_row, stop_step, answer_row, answer_step,
    GUESSES: tl.constexpr, STOPS: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    wait(AHEAD)
    row = tl.program_id(0)
    answer, tokens = answers + row * answer_row, best + row * (GUESSES + 1)
    stop = tl.load(stops + row * stop_row + tl.arange(0, STOPS) * stop_step)
    going = 1
    count = tl.full([], 1, tl.int64)
    for place in tl.static_range(GUESSES):
        guess = tl.load(guesses + row * guess_row + place * guess_step)
        token = tl.load(tokens + place)
        ended = tl.max((stop == token).to(tl.int32), 0)
        right = (guess == token) & (guess >= 0) & (ended == 0)
        going = going * right.to(tl.int32)
        count += going
        tl.store(answer + (1 + place) * answer_step, token)
        tl.store(answer + (2 + GUESSES + place) * answer_step, guess)
    tl.store(answer + (1 + GUESSES) * answer_step, tl.load(tokens + GUESSES))
    count = tl.minimum(count, tl.load(room + row))
    tl.store(answer, count)
    tl.store(last + row, tl.load(tokens + tl.maximum(count - 1, 0)))


@triton.jit
def _paired(
    tokens, embedding, kept, slots, rest, embedding_norm, hidden_norm, accepted, out,
    token_row, rest_row, count, width, eps, offset,
    MOVED: tl.constexpr, BLOCK: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    wait(AHEAD)
    at = tl.program_id(0).to(tl.int64)
    half = tl.program_id(1)
    row, place = at // count, at % count
    i = tl.arange(0, BLOCK)
    inside = i < width
    if half == 0:
        token = tl.load(tokens + row * token_row + place)
        raw = tl.load(embedding + token * width + i, mask=inside, other=0)
        norm = tl.load(embedding_norm + i, mask=inside, other=0)
    else:
        own = kept + tl.load(slots + row) * width + i
        if place == 0:
            raw = tl.load(own, mask=inside, other=0)
            if MOVED:
                taken = tl.load(accepted + row)
                new = tl.load(rest + row * rest_row + (taken - 1) * width + i,
                              mask=inside & (taken > 0), other=0)  # fmt: skip
                tl.store(own, new, mask=inside & (taken > 0))
        else:
            raw = tl.load(rest + row * rest_row + (place - 1) * width + i, mask=inside, other=0)
        norm = tl.load(hidden_norm + i, mask=inside, other=0)
    h = raw.to(tl.float32)
    h = h * tl.rsqrt(tl.sum(h * h, 0) / width + eps)
    if offset != 0:
        normed = h * (norm.to(tl.float32) + offset)
    else:
        normed = h.to(norm.dtype).to(tl.float32) * norm.to(tl.float32)
    tl.store(out + at * 2 * width + half * width + i, normed.to(out.dtype.element_ty), mask=inside)
