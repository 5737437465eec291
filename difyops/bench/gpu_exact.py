"""What low precision changes: bf16 states beside float32 ones, and bf16 answers on the GPU beside
float32 scores on the CPU."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from difyops.bench import load as chats
from difyops.bench.gpu_engine import ask, greedy, running
from difyops.bench.gpu_model import SHAPES, Limits, Row, Wanted, build, filled
from difyops.engine import drafters, graphs, kernels, sources
from difyops.engine.chat import ChatTemplate
from difyops.engine.load import Loaded, load
from difyops.engine.models.decoder import Decoder
from difyops.errors import DifyopsError

#: The trained model that comes with difyops, as `difyops serve` names it.
TRAINED = "tiny"
#: Where drift is told, over how many tokens in front of there, in how many sequences at a time.
MARKS, WINDOW, BATCH = (1024, 2048, 4096), 128, 8
PROMPTS, ANSWER = 200, 64
GUESSES = 2
#: Answers that the CPU looks at in one pass.
READ_AT_ONCE = 50
#: Answers may part where the two largest float32 scores are nearer than this, in nats; parting
#: elsewhere is a failure. Counts are told below the others, too.
MARGIN = 0.5
MARGINS = (0.01, 0.05, 0.1, MARGIN)


def trained(dtype: str, device: str) -> Loaded:
    path = sources.resolve(TRAINED, sources.default_cache(), lambda said: None)
    return load(path, dtype=dtype, device=device)


def drift(wanted: Wanted, limits: Limits) -> Iterator[Row]:
    """Of the trained model and of the smallest released shape."""
    yield from drifting(TRAINED, trained("bfloat16", "cuda").model)
    name = next(iter(SHAPES))
    yield from drifting(name, build(SHAPES[name]))


@dataclass(frozen=True)
class Apart:
    """How far logits [B, V] are from others: |difference| at most and on average, the share of
    rows with the same largest one, and the standard deviation of the logits themselves."""

    most: float
    mean: float
    same: float
    spread: float

    @classmethod
    def of(cls, ours: Tensor, theirs: Tensor) -> Apart:
        ours, theirs = ours.float(), theirs.float()
        gap = (ours - theirs).abs()
        same = (ours.argmax(-1) == theirs.argmax(-1)).float().mean()
        numbers = torch.stack((gap.max(), gap.mean(), same, theirs.std(-1).mean()))
        return cls(*numbers.tolist())

    @classmethod
    def over(cls, parts: Sequence[Apart]) -> Apart:
        def mean(name: str) -> float:
            return statistics.fmean(getattr(part, name) for part in parts)

        return cls(max(p.most for p in parts), mean("mean"), mean("same"), mean("spread"))


@torch.inference_mode()
def drifting(name: str, model: Decoder, marks: Sequence[int] = MARKS) -> Iterator[Row]:
    """Both read the same tokens one by one: those that are drawn from the float32 states' scores,
    behind empty states."""
    if kernels.usable(model.embed.weight.device, model.dtype):
        model.fuse()
    steps: type[graphs.Captured] | type[graphs.Eager] = (
        graphs.Captured if graphs.possible(model) else graphs.Eager
    )
    wide = model.state_specs()
    narrow = [spec.stored_in(torch.bfloat16) for spec in wide]
    pools = [filled(model, BATCH, 0, marks[-1], specs) for specs in (wide, narrow)]
    slots = pools[0][1]
    exact, rounded = (steps(model, pool) for pool, _ in pools)
    dice = torch.Generator(model.embed.weight.device).manual_seed(0)
    tokens = [0] * BATCH
    window: deque[Apart] = deque(maxlen=WINDOW)
    for place in range(1, marks[-1] + 1):
        scores = exact.run(tokens, slots).logits
        window.append(Apart.of(rounded.run(tokens, slots).logits, scores))
        tokens = torch.multinomial(scores.float().softmax(-1), 1, generator=dice)[:, 0].tolist()
        if place in marks:
            apart = Apart.over(window)
            note = (
                f"logits differ by {apart.most:.3f} at most, {apart.mean:.4f} on average (they "
                f"spread by {apart.spread:.2f}); the same token is best at {apart.same:.2%}"
            )
            yield Row(name, "bf16 states", place, note=note, unit="tokens", facts=vars(apart))


@dataclass(frozen=True)
class Parting:
    """The first token of an answer that is not the float32 model's best, and how far the two
    largest scores are from each other there."""

    place: int
    gap: float


@torch.inference_mode()
def partings(
    model: Decoder, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]
) -> list[Parting | None]:
    """`model` is in float32, on the CPU. One pass tells: up to the parting both have read the
    same. Many are read at once, as the CPU's threads want it."""
    found: list[Parting | None] = []
    whole = [[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)]
    for start in range(0, len(whole), READ_AT_ONCE):
        rows = whole[start : start + READ_AT_ONCE]
        longest = max(map(len, rows))
        hidden = model(torch.tensor([row + [0] * (longest - len(row)) for row in rows]))
        for i, row in enumerate(rows):
            first = len(prompts[start + i])
            scores = model.logits(hidden[i, first - 1 : len(row) - 1])
            found.append(_parting(scores, row[first:]))
    return found


def _parting(scores: Tensor, answer: Sequence[int]) -> Parting | None:
    """scores: [T, V], of the T tokens of `answer`."""
    wrong = (scores.argmax(-1) != torch.tensor(answer)).nonzero()
    if not len(wrong):
        return None
    place = int(wrong[0])
    first, second = scores[place].topk(2).values.tolist()
    return Parting(place, first - second)


def summary(
    name: str, work: str, partings: Sequence[Parting | None], tokens: int, extra: str = ""
) -> Row:
    """`tokens` were compared in all."""
    gaps = [one.gap for one in partings if one is not None]
    below = {str(margin): sum(gap < margin for gap in gaps) for margin in MARGINS}
    note = f"{len(gaps)} of {len(partings)} answers part"
    if gaps:
        counts = ", ".join(f"{count} below {margin}" for margin, count in below.items())
        note += f"; top-2 gap there at most {max(gaps):.3f} nats ({counts})"
    facts: Mapping[str, Any] = {
        "answers": len(partings), "tokens": tokens, "part": len(gaps), "below": below,
        "largest": max(gaps, default=0.0),
        "places": [one.place for one in partings if one is not None],
    }  # fmt: skip
    return Row(name, work, len(partings), note=note + extra, unit="answers", facts=facts,
               failed=any(gap >= MARGIN for gap in gaps))  # fmt: skip


def chat_prompts(loaded: Loaded, count: int) -> list[list[int]]:
    """Conversations of different lengths, each of words in an order of its own."""
    words = loaded.tokenizer
    if words.chat_template is None:
        raise DifyopsError("the model has no chat template")
    template = ChatTemplate(words.chat_template, words.special)
    texts = [chats.prompt(chats.FEWEST_WORDS + number % 40, number) for number in range(count)]
    return [words.encode(template.render([dict(one) for one in text])) for text in texts]


def agreement(wanted: Wanted, limits: Limits) -> Iterator[Row]:
    there, here = trained("bfloat16", "cuda"), trained("float32", "cpu")
    yield from agreeing(there.model, here.model, chat_prompts(here, PROMPTS))


def agreeing(
    ours: Decoder, reference: Decoder, prompts: Sequence[Sequence[int]], tokens: int = ANSWER
) -> Iterator[Row]:
    """Plain, with guesses, and with kept prefixes, the second time; each beside float32 on the
    CPU, and beside the plain answers."""
    room = {"slots": 32, "context": max(map(len, prompts)) + tokens}
    plain: list[list[int]] = []
    for work, kind, size in (("plain", "off", 0), ("guesses", "mtp", 0), ("prefixes", "off", 1)):
        drafter = drafters.choose(kind, ours)
        options = {"drafter": drafter, "guesses": GUESSES} if drafter is not None else {}
        with running(ours, **room, **options, prefix_bytes=size << 28) as engine:
            said = [one.tokens for one in ask(engine, greedy(prompts, tokens))]
            if size:
                said = [one.tokens for one in ask(engine, greedy(prompts, tokens))]
        plain = plain or said
        other = sum(a != b for a, b in zip(plain, said, strict=True))
        extra = f"; {other} are not the plain ones" if said is not plain else ""
        found = partings(reference, prompts, said)
        dtype = str(ours.dtype).removeprefix("torch.")
        yield summary(TRAINED, f"{dtype}, {work}", found, sum(map(len, said)), extra)
