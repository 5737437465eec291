"""From logits to a token, as pure functions over rows.

A row's random number depends on the request's seed and the position alone, so that what runs
beside a request, or whether it was preempted, changes no token.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from difyops.engine.layers import wide
from difyops.engine.request import Request, SamplingParams, TokenLogprob

NO_NUMBERS = "the model's scores are not numbers"


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
    chosen: dict[int, TokenLogprob | Exception] = {}
    if rest:
        found = _choose(logits[rest], [requests[i] for i in rest])
        chosen = dict(zip(rest, found, strict=True))
    for i, token in enumerate(best):
        if i not in chosen:
            chosen[i] = known(token)
    return [chosen[i] for i in range(len(requests))]


def _choose(logits: Tensor, requests: Sequence[Request]) -> list[TokenLogprob | Exception]:
    scores = logits.to(wide(logits.dtype))
    failed: dict[int, Exception] = {
        i: ValueError(NO_NUMBERS)
        for i, broken in enumerate(scores.isnan().any(-1).tolist())
        if broken
    }
    adjusted = scores
    changed = [i for i, request in enumerate(requests) if _is_adjusted(request)]
    if changed:
        adjusted = scores.clone()
        for i in changed:
            try:
                adjusted[i] = adjust(scores[i], requests[i])
            except Exception as error:
                failed[i] = error
    tokens = adjusted.argmax(-1).tolist()
    for i, request in enumerate(requests):
        if request.sampling.temperature > 0 and i not in failed:
            shares = probabilities(adjusted[i], request.sampling)
            tokens[i] = draw(shares, uniform(request.sampling.seed, len(request.tokens)))
    return [
        failed.get(i) or _reported(scores[i], token, requests[i].sampling.logprobs)
        for i, token in enumerate(tokens)
    ]


def known(best: int) -> TokenLogprob | Exception:
    """The choice of a greedy row whose best token is known, negative where it holds no numbers."""
    return TokenLogprob(best, float("nan")) if best >= 0 else ValueError(NO_NUMBERS)


def is_greedy(request: Request) -> bool:
    """Whether the largest score is all that matters."""
    s = request.sampling
    return s.temperature == 0 and s.logprobs is None and not _is_adjusted(request)


def _is_adjusted(request: Request) -> bool:
    s = request.sampling
    return bool(
        request.constraint
        or s.logit_bias
        or s.presence_penalty
        or s.frequency_penalty
        or s.repetition_penalty != 1
    )


def adjust(scores: Tensor, request: Request) -> Tensor:
    """Penalties, then logit_bias, then the grammar's mask: scores [V] -> [V].

    Presence and frequency penalties look at what was generated (as OpenAI defines them), the
    repetition penalty at the prompt too (CTRL, arXiv:1909.05858).
    """
    s = request.sampling
    scores = scores.clone()
    if s.repetition_penalty != 1:
        seen = torch.tensor(sorted(set(request.tokens)), device=scores.device)
        scores[seen] = torch.where(
            scores[seen] > 0,
            scores[seen] / s.repetition_penalty,
            scores[seen] * s.repetition_penalty,
        )
    if (s.presence_penalty or s.frequency_penalty) and request.generated:
        generated = torch.tensor(request.generated, device=scores.device)
        seen, counts = torch.unique(generated, return_counts=True)
        scores[seen] -= s.presence_penalty + s.frequency_penalty * counts.to(scores.dtype)
    if s.logit_bias:
        where = torch.tensor(list(s.logit_bias), device=scores.device)
        by = torch.tensor(list(s.logit_bias.values()), dtype=scores.dtype, device=scores.device)
        scores[where] += by
    if request.constraint is not None and (bits := request.constraint.mask()) is not None:
        words = torch.from_numpy(bits).to(scores.device)
        shifts = torch.arange(32, dtype=torch.int32, device=scores.device)
        allowed = ((words[:, None] >> shifts) & 1).flatten()[: scores.numel()].bool()
        scores.masked_fill_(~allowed, float("-inf"))
    return scores


def probabilities(scores: Tensor, sampling: SamplingParams) -> Tensor:
    """The distribution that is sampled from: scores [V] -> [V], float64, summing to 1.

    Temperature first, then top_k, top_p (nucleus, arXiv:1904.09751) and min_p (arXiv:2407.01082),
    each over what the one before it left.
    """
    scores = scores.to(torch.float64) / sampling.temperature
    if 0 < sampling.top_k < scores.numel():
        least = scores.topk(sampling.top_k).values[-1]
        scores = scores.masked_fill(scores < least, float("-inf"))
    shares = scores.softmax(-1)
    if sampling.top_p < 1:
        shares = shares.masked_fill(shares < _nucleus(shares, sampling.top_p), 0.0)
    if sampling.min_p > 0:
        shares = shares.masked_fill(shares < sampling.min_p * shares.max(), 0.0)
    return shares / shares.sum()


def _nucleus(shares: Tensor, top_p: float) -> Tensor:
    """The smallest share in the smallest set that reaches `top_p`; its equals stay, too."""
    # The set is mostly small: sorting 50,000 tokens takes 8 ms, the first 256 of them 0.2 ms.
    for size in (256, 4096, shares.numel()):
        ordered = shares.topk(min(size, shares.numel())).values
        reached = ordered.cumsum(-1)
        if reached[-1] >= top_p:
            break
    count = int((reached < top_p).sum())
    return ordered[min(count, ordered.numel() - 1)]


def draw(shares: Tensor, number: float) -> int:
    """The token at `number` (0..1) of the cumulative distribution: shares [V], float64."""
    reached = shares.cumsum(-1)
    # Scaled by the sum as it came out: a number near 1 must not fall behind the last token.
    place = torch.searchsorted(reached, reached[-1:] * number, right=True)
    return int(place.clamp_max(int(shares.nonzero()[-1])))


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) with 53 random bits, for one position of one request."""
    text = f"{seed}:{position}".encode()
    digest = hashlib.blake2b(text, digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


def _reported(scores: Tensor, token: int, alternatives: int | None) -> TokenLogprob:
    if alternatives is None:
        return TokenLogprob(token, float("nan"))
    logprobs = scores.log_softmax(-1)
    top = logprobs.topk(alternatives) if alternatives else None
    return TokenLogprob(
        token,
        float(logprobs[token]),
        tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True)) if top else (),
    )
