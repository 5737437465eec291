"""From logits to a token, as functions over rows.

A row's random number depends on the request's seed and the position alone, so that what runs
beside a request, or whether it was preempted, changes no token. Nothing but `choose` waits for a
GPU.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from difyops.engine.layers import wide
from difyops.engine.request import Request, SamplingParams, TokenLogprob
from difyops.engine.transfer import sent

NO_NUMBERS = "the model's scores are not numbers"
#: Rows that are drawn at once. A GPU is full with as many, and shares in float64 are large; on a
#: CPU those of one row still lie in its cache.
ROWS_GPU, ROWS_CPU = 32, 1
#: Tokens whose shares are added up first, to find where a token is drawn.
BLOCK = 512


def choose(
    logits: Tensor, requests: Sequence[Request], best: Sequence[int] | None = None
) -> list[TokenLogprob | Exception]:
    """The next token of each request: logits [R, V], row i for requests[i].

    `best` is the largest logit's token of each row where that is known already, negative for a row
    that holds no numbers: only the rows that need more than that are looked at.

    For a row that holds no numbers, or whose grammar fails, the exception that says so: the other
    rows are nobody else's business. Log-probabilities are the model's own: of the logits
    before penalties, grammar and temperature; nan where none were asked for.
    """
    if best is None:
        return _choose(logits, requests)
    rest = [i for i, request in enumerate(requests) if not is_greedy(request)]
    found: list[TokenLogprob | Exception] = [known(token) for token in best]
    if rest:
        chosen = _choose(part(logits, rest), [requests[i] for i in rest])
        for i, choice in zip(rest, chosen, strict=True):
            found[i] = choice
    return found


def known(token: int) -> TokenLogprob | Exception:
    """The choice of a token that was found already; negative: there are no numbers."""
    return TokenLogprob(token, float("nan")) if token >= 0 else ValueError(NO_NUMBERS)


def is_greedy(request: Request) -> bool:
    """Whether the largest score is all that matters."""
    s = request.sampling
    return s.temperature == 0 and not s.logit_bias and is_free(request)


def is_free(request: Request) -> bool:
    """Whether its next token can be chosen before the host has seen the last one."""
    s = request.sampling
    return (
        request.constraint is None
        and s.logprobs is None
        and not s.presence_penalty
        and not s.frequency_penalty
        and s.repetition_penalty == 1
    )


def pick(logits: Tensor, requests: Sequence[Request], positions: Sequence[int]) -> Tensor:
    """The tokens of free requests at these positions: logits [R, V] -> [R], negative for a row that
    holds no numbers."""
    return _tokens(logits.to(wide(logits.dtype)), requests, positions)[0]


def _choose(logits: Tensor, requests: Sequence[Request]) -> list[TokenLogprob | Exception]:
    scores = logits.to(wide(logits.dtype))
    positions = [len(request.tokens) for request in requests]
    chosen, failed = _tokens(scores, requests, positions)
    found = [failed.get(i) or known(token) for i, token in enumerate(chosen.tolist())]
    asked = [
        i
        for i, choice in enumerate(found)
        if isinstance(choice, TokenLogprob) and requests[i].sampling.logprobs is not None
    ]
    if asked:
        counts = [requests[i].sampling.logprobs or 0 for i in asked]
        reports = _reported(part(scores, asked), part(chosen, asked), counts)
        for i, report in zip(asked, reports, strict=True):
            found[i] = report
    return found


def _tokens(
    scores: Tensor, requests: Sequence[Request], positions: Sequence[int]
) -> tuple[Tensor, dict[int, Exception]]:
    """Tokens [R], negative without numbers, and by row why a grammar failed."""
    adjusted, failed = adjust(scores, requests)
    chosen = adjusted.argmax(-1)
    drawn = [i for i, request in enumerate(requests) if request.sampling.temperature > 0]
    at_once = ROWS_GPU if scores.is_cuda else ROWS_CPU
    for start in range(0, len(drawn), at_once):
        rows = drawn[start : start + at_once]
        params = [requests[i].sampling for i in rows]
        numbers = [uniform(requests[i].sampling.seed, positions[i]) for i in rows]
        shares = probabilities(part(adjusted, rows), params)
        tokens = draw(shares, sent(numbers, scores.device, torch.float64))
        chosen[sent(rows, scores.device)] = tokens
    # The largest is nan where any is: a mask may have hidden it.
    return chosen.masked_fill(scores.amax(-1).isnan(), -1), failed


def adjust(scores: Tensor, requests: Sequence[Request]) -> tuple[Tensor, dict[int, Exception]]:
    """Penalties, then logit_bias, then the grammar's mask: scores [R, V] -> [R, V], and by row why
    a grammar failed. What was given stays as it is.

    Presence and frequency penalties look at what was generated (as OpenAI defines them), the
    repetition penalty at the prompt too (CTRL, arXiv:1909.05858).
    """
    given, sampling = scores, [request.sampling for request in requests]
    seen = [
        (i, token, s.repetition_penalty)
        for i, s in enumerate(sampling)
        if s.repetition_penalty != 1
        for token in set(requests[i].tokens)
    ]
    if seen:
        scores = scores.clone()
        where, (by,) = _entries(seen, scores)
        scores[where] = torch.where(scores[where] > 0, scores[where] / by, scores[where] * by)
    said = [
        (i, token, s.presence_penalty, s.frequency_penalty, count)
        for i, s in enumerate(sampling)
        if s.presence_penalty or s.frequency_penalty
        for token, count in Counter(requests[i].generated).items()
    ]
    if said:
        scores = scores.clone() if scores is given else scores
        where, (presence, frequency, count) = _entries(said, scores)
        scores[where] -= presence + frequency * count
    biased = [(i, token, by) for i, s in enumerate(sampling) for token, by in s.logit_bias.items()]
    if biased:
        scores = scores.clone() if scores is given else scores
        where, (by,) = _entries(biased, scores)
        scores[where] += by
    masks, failed = _masks(requests)
    if masks:
        scores = scores.clone() if scores is given else scores
        _forbid(scores, masks)
    return scores, failed


def _entries(
    rows: Sequence[tuple[float, ...]], scores: Tensor
) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """(row, token, values…) of each -> where that is in `scores`, and the values."""
    places = sent([row[:2] for row in rows], scores.device).T
    values = sent([row[2:] for row in rows], scores.device, scores.dtype).T
    return (places[0], places[1]), values


def _masks(requests: Sequence[Request]) -> tuple[dict[int, Tensor], dict[int, Exception]]:
    """By row, the allowed tokens as packed bits ([ceil(V / 32)] int32), and why there are none."""
    masks: dict[int, Tensor] = {}
    failed: dict[int, Exception] = {}
    for i, request in enumerate(requests):
        try:
            bits = request.constraint.mask() if request.constraint is not None else None
        except Exception as error:
            failed[i] = error
        else:
            if bits is not None:
                masks[i] = torch.from_numpy(np.array(bits))
    return masks, failed


def _forbid(scores: Tensor, masks: dict[int, Tensor]) -> None:
    words = torch.stack(list(masks.values()))
    if scores.is_cuda:
        words = words.pin_memory().to(scores.device, non_blocking=True)
    shifts = torch.arange(32, dtype=torch.int32, device=scores.device)
    allowed = ((words[..., None] >> shifts) & 1).flatten(1)[:, : scores.shape[1]].bool()
    if len(masks) == len(scores):
        scores.masked_fill_(~allowed, float("-inf"))
    else:
        rows = sent(list(masks), scores.device)
        scores[rows] = scores[rows].masked_fill(~allowed, float("-inf"))


def probabilities(scores: Tensor, sampling: Sequence[SamplingParams]) -> Tensor:
    """The distributions that are sampled from: scores [R, V] -> [R, V], float64, each summing to 1.

    Temperature first, then top_k, top_p (nucleus, arXiv:1904.09751) and min_p (arXiv:2407.01082),
    each over what the one before it left.
    """
    size = scores.shape[1]
    scores = scores.to(torch.float64) / _column((s.temperature for s in sampling), scores)
    if most := max((s.top_k for s in sampling if s.top_k < size), default=0):
        last = sent([[max(min(s.top_k, most) - 1, 0)] for s in sampling], scores.device)
        unlimited = sent([[not 0 < s.top_k < size] for s in sampling], scores.device, torch.bool)
        least = scores.topk(most).values.gather(-1, last).masked_fill_(unlimited, float("-inf"))
        scores = scores.masked_fill_(scores < least, float("-inf"))
    shares = scores.softmax(-1)
    if any(s.top_p < 1 for s in sampling):
        least = _nucleus(shares, _column((s.top_p for s in sampling), scores))
        shares = shares.masked_fill_(shares < least, 0.0)
    if any(s.min_p > 0 for s in sampling):
        least = _column((s.min_p for s in sampling), scores) * shares.amax(-1, keepdim=True)
        shares = shares.masked_fill_(shares < least, 0.0)
    return shares.div_(shares.sum(-1, keepdim=True))


def _nucleus(shares: Tensor, top_p: Tensor) -> Tensor:
    """The smallest share in the smallest set of each row that reaches `top_p` ([R, 1]), 0 where
    that is 1; its equals stay, too: [R, 1]."""
    if shares.is_cuda:
        ordered = shares.sort(-1, descending=True).values
        reached = ordered.cumsum(-1)
    else:
        # The set is mostly small: sorting 50,000 tokens takes 8 ms, the first 256 of them 0.2 ms.
        for size in (256, 4096, shares.shape[1]):
            ordered = shares.topk(min(size, shares.shape[1])).values
            reached = ordered.cumsum(-1)
            if (reached[:, -1:] >= top_p).all():
                break
    count = (reached < top_p).sum(-1, keepdim=True)
    least = ordered.gather(-1, count.clamp_max(ordered.shape[1] - 1))
    return least.masked_fill(top_p >= 1, 0.0)


def draw(shares: Tensor, numbers: Tensor) -> Tensor:
    """The token at each number (0..1) of the cumulative distribution: shares [R, V] and numbers
    [R], float64 -> [R]."""
    blocks = torch.unflatten(F.pad(shares, (0, -shares.shape[1] % BLOCK)), -1, (-1, BLOCK))
    sums = blocks.sum(-1)
    reached = sums.cumsum(-1)
    # Scaled by the sum as it came out: a number near 1 must not fall behind the last token.
    target = reached[:, -1:] * numbers[:, None]
    block = torch.searchsorted(reached, target, right=True).minimum(_last(sums))
    within = blocks.gather(1, block[..., None].expand(-1, -1, BLOCK))[:, 0]
    before = torch.where(block > 0, reached.gather(1, (block - 1).clamp_min(0)), 0.0)
    place = torch.searchsorted(before + within.cumsum(-1), target, right=True)
    return (block * BLOCK + place.minimum(_last(within)))[:, 0]


def _last(shares: Tensor) -> Tensor:
    """The last place of each row that holds anything: [R, N] -> [R, 1]."""
    places = torch.arange(shares.shape[1], device=shares.device)
    return places.where(shares > 0, 0).amax(-1, keepdim=True)


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) with 53 random bits, for one position of one request."""
    text = f"{seed}:{position}".encode()
    digest = hashlib.blake2b(text, digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


def part(rows: Tensor, which: Sequence[int]) -> Tensor:
    """Some of the rows, in order."""
    if len(which) == len(rows):
        return rows
    if len(which) == 1:
        return rows[which[0]][None]
    return rows[sent(which, rows.device)]


def _column(values: Iterable[float], like: Tensor) -> Tensor:
    return sent([[value] for value in values], like.device, torch.float64)


def _reported(scores: Tensor, tokens: Tensor, counts: Sequence[int]) -> list[TokenLogprob]:
    """Tokens [R] with their own logarithms and those of the likeliest `counts` of each row."""
    logprobs = scores.log_softmax(-1)
    own = logprobs.gather(-1, tokens[:, None])[:, 0].tolist()
    top = logprobs.topk(max(counts))
    tops = zip(top.indices.tolist(), top.values.tolist(), counts, strict=True)
    return [
        TokenLogprob(token, mine, tuple(zip(ids[:count], values[:count], strict=True)))
        for token, mine, (ids, values, count) in zip(tokens.tolist(), own, tops, strict=True)
    ]
