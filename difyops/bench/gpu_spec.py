"""What guessing ahead gains at acceptances that are set (drafters.SyntheticAcceptance): the module
of multi-token prediction and the model run at their full cost, and guesses are right by dice."""

from __future__ import annotations

from collections.abc import Iterator

from difyops.bench.gpu_engine import Heard, ask, greedy, prompts, running
from difyops.bench.gpu_model import SHAPES, Limits, Row, Wanted, build, step_limit
from difyops.engine.drafters import Mtp, SyntheticAcceptance
from difyops.engine.models.decoder import Decoder
from difyops.engine.models.mtp import modules
from difyops.engine.runner import Engine

#: Its released checkpoint has one module.
SHAPE = "qwen3.5-0.8b"
SEQUENCES = (1, 8, 64)
#: Guesses of a pass -> acceptances of each guess, if those before it came true; None: adaptive.
RATES: dict[int | None, tuple[float, ...]] = {
    1: (0.5, 0.7, 0.85, 0.9), 2: (0.5, 0.7, 0.9), 4: (0.5, 0.7, 0.9), None: (0.5, 0.7, 0.9),
}  # fmt: skip
#: Tokens of each sequence. Answers are long: what counts lies between the last one's beginning and
#: the first one's end.
PROMPT, ANSWER = 128, 512


def speculation(wanted: Wanted, limits: Limits) -> Iterator[Row]:
    model = build({**SHAPES[SHAPE], "mtp_num_hidden_layers": 1})
    for size in SEQUENCES:
        yield from compared(SHAPE, model, size, step_limit(model, size, limits))


def compared(name: str, model: Decoder, size: int, limit: float) -> Iterator[Row]:
    """Without guesses, then with each number of them at each acceptance."""
    options = {"slots": size, "context": PROMPT + ANSWER}
    with running(model, **options) as engine:
        off = _speed(engine, size)
    yield Row(name, "speculation off", size, size / off, off, limit)
    device = model.embed.weight.device
    for guesses, rates in _together():
        drafter = SyntheticAcceptance(Mtp(model, modules(model)), rates[0], 0, device)
        with running(model, **options, drafter=drafter, guesses=guesses) as engine:
            for rate in rates:
                drafter.draw(rate)
                if guesses is None:
                    _speed(engine, size)  # it learns
                speed = _speed(engine, size)
                many = "adaptive" if guesses is None else str(guesses)
                yield Row(
                    name, f"guesses: {many} at {rate:.0%}", size, size / speed, speed, limit,
                    note=f"{speed / off:.2f} x off",
                    facts={"acceptance": rate, "guesses": guesses, "gain": speed / off},
                )  # fmt: skip


def _together() -> Iterator[tuple[int | None, tuple[float, ...]]]:
    """Guesses, and the acceptances that one engine meets: what adapts meets one."""
    for guesses, rates in RATES.items():
        if guesses is None:
            yield from ((None, (rate,)) for rate in rates)
        else:
            yield guesses, rates


def _speed(engine: Engine, size: int) -> float:
    """Tokens a second of all sequences while all of them run."""
    vocabulary = engine.model.shape.vocabulary
    heard = ask(engine, greedy(prompts(vocabulary, size, PROMPT), ANSWER))
    begun, ended = max(one.times[0] for one in heard), min(one.times[-1] for one in heard)
    return sum(_between(one, begun, ended) for one in heard) / (ended - begun)


def _between(one: Heard, begun: float, ended: float) -> int:
    made = zip(one.times, one.counts, strict=True)
    return sum(count for at, count in made if begun < at <= ended)
