"""What guessing ahead gains on a GPU at acceptances that are set (SyntheticAcceptance)."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from difyops.bench.gpu_model import SHAPES, Row, Subject, build
from difyops.engine import drafters
from difyops.engine.models.decoder import Decoder
from difyops.engine.models.mtp import modules
from difyops.engine.request import Output, Request, SamplingParams
from difyops.engine.runner import Engine
from difyops.engine.speculate import OnDevice
from difyops.errors import DifyopsError

#: Acceptance of each guess, if those before it came true -> guesses of a pass; None: adaptive.
RATES = (0.5, 0.7, 0.9)
GUESSES = (1, 2, 4, None)
#: Of each sequence, in tokens. Answers are long: what is measured lies between the last beginning
#: and the first end.
PROMPT, ANSWER = 128, 512


@dataclass(frozen=True)
class Gain:
    """`guesses` None: as many as pay. `gain`: `rate` beside that of the same engine without any."""

    sequences: int
    acceptance: float
    guesses: int | None
    rate: float  # tokens a second
    gain: float


def rows(subject: Subject) -> Iterator[Row]:
    """Of a shape that has a published module of multi-token prediction."""
    config = SHAPES[subject.name]
    if config["model_type"] != "qwen3_5_text":
        return
    model = build({**config, "mtp_num_hidden_layers": 1})
    model.fuse()
    for gain in measure(model, subject.wanted.sequences):
        guesses = "adaptive" if gain.guesses is None else gain.guesses
        yield Row(
            subject.name,
            f"guesses {guesses} at {gain.acceptance}" if gain.guesses != 0 else "no guesses",
            gain.sequences,
            gain.sequences / gain.rate,
            gain.rate,
            note=f"{gain.gain:.2f} x without",
            facts=vars(gain),
        )


def measure(model: Decoder, sequences: Sequence[int]) -> Iterator[Gain]:
    """`model` has a module of multi-token prediction, and lies on a GPU."""
    for size in sequences:
        off = _Run(model, size, None, 0)
        base = off.tokens_per_second()
        off.engine.stop()
        yield Gain(size, 0.0, 0, base, 1.0)
        for guesses in GUESSES:
            rates = (0.5, 0.7, 0.85, 0.9) if guesses == 1 else RATES
            synthetic = drafters.SyntheticAcceptance(
                drafters.Mtp(model, modules(model)), rates[0], 0, model.embed.weight.device
            )
            run = _Run(model, size, synthetic, guesses)
            for rate in rates:
                synthetic.draw(rate)
                speed = run.tokens_per_second()
                yield Gain(size, rate, guesses, speed, speed / base)
            run.engine.stop()


class _NoText:
    """In place of a tokenizer."""

    stopped = False

    def push(self, token: int) -> str:
        return ""

    def flush(self) -> str:
        return ""


class _Run:
    """An engine with `size` slots, and so many that ask."""

    def __init__(
        self, model: Decoder, size: int, drafter: OnDevice | None, guesses: int | None
    ) -> None:
        self._size, self._vocabulary = size, model.shape.vocabulary
        self.engine = Engine(
            model, slots=size, context=PROMPT + ANSWER, prefill_tokens=8192, drafter=drafter,
            guesses=guesses,
        )  # fmt: skip
        self.engine.warm_up()
        self.engine.start()

    def tokens_per_second(self) -> float:
        dice, params = random.Random(0), SamplingParams(ANSWER, temperature=0.0)  # noqa: S311
        heard = [
            _Heard([dice.randrange(self._vocabulary) for _ in range(PROMPT)], params)
            for _ in range(self._size)
        ]
        self.engine.submit_all({one.request: one.deliver for one in heard})
        for one in heard:
            one.over.wait()
        if errors := [one.error for one in heard if one.error]:
            raise DifyopsError(f"bench gpu: {errors[0]}")
        begun = max(one.times[0][0] for one in heard)
        ended = min(one.times[-1][0] for one in heard)
        count = sum(n for one in heard for at, n in one.times if begun < at <= ended)
        return count / (ended - begun)


class _Heard:
    """One answer as it comes: when, and how many tokens."""

    def __init__(self, prompt: list[int], params: SamplingParams) -> None:
        self.request = Request(prompt, params, _NoText())
        self.times: list[tuple[float, int]] = []
        self.error: str | None = None
        self.over = threading.Event()

    def deliver(self, output: Output) -> None:
        self.times.append((time.perf_counter(), len(output.tokens)))
        if output.finish is not None:
            self.error = output.error
            self.over.set()
