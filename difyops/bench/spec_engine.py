"""An engine in this process, asked and timed without a server around it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from difyops.engine import drafters, opening
from difyops.engine import load as checkpoints
from difyops.engine.chat import ChatTemplate
from difyops.engine.config import LlmConfig
from difyops.engine.models.decoder import Decoder
from difyops.engine.request import FinishReason, Output, Request, SamplingParams
from difyops.engine.runner import Engine
from difyops.errors import DifyopsError, PrerequisiteError

#: More than a conversation leaves behind.
PREFIX_BYTES = 2**30
#: Guesses of one pass that are measured.
MOST = 4


@dataclass(frozen=True)
class Asked:
    """What came of prompts that were asked together. `firsts` counts the tokens that prefill made,
    `passes` those of decoding over a sequence; `drafted` and `accepted` are by place."""

    answers: tuple[tuple[int, ...], ...]
    seconds: float
    first: float  # seconds to the first token of the first prompt
    prompt_tokens: int
    kept: int
    firsts: int
    passes: int
    drafted: tuple[int, ...]
    accepted: tuple[int, ...]

    @property
    def tokens(self) -> int:
        return sum(map(len, self.answers))


class Model:
    """A loaded model, from which engines are made."""

    def __init__(self, loaded: checkpoints.Loaded, small: Decoder | None) -> None:
        self.words = loaded.tokenizer
        self.context = loaded.context
        self._model, self._small = loaded.model, small
        self._template = None
        if self.words.chat_template is not None:
            self._template = ChatTemplate(self.words.chat_template, self.words.special)

    @property
    def dtype(self) -> str:
        return str(self._model.dtype).removeprefix("torch.")

    @property
    def device(self) -> str:
        return str(self._model.embed.weight.device)

    def drafters(self) -> dict[str, int]:
        """What can guess for this model, and how many tokens at most."""
        kinds = drafters.kinds(self._model) + (["draft"] if self._small is not None else [])
        made = {kind: drafters.choose(kind, self._model, self._small) for kind in kinds}
        return {kind: min(MOST, drafter.most) for kind, drafter in made.items() if drafter}

    def prompt(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """The tokens of a conversation. Raises PrerequisiteError when the template refuses it."""
        if self._template is None:
            return self.words.encode("\n".join(m["content"] for m in messages) + "\n", bos=True)
        try:
            return self.words.encode(self._template.render(messages))
        except ValueError as error:
            raise PrerequisiteError(f"the model's chat template: {error}") from error

    @contextmanager
    def engine(
        self, slots: int, context: int, kind: str, guesses: int | None, *, prefix_bytes: int
    ) -> Iterator[Asking]:
        """A warm engine that runs. `kind` is a drafter, or off."""
        drafter = drafters.choose(kind, self._model, self._small)
        engine = Engine(
            self._model,
            slots=slots,
            context=context,
            max_waiting=10**6,
            drafter=drafter,
            guesses=guesses,
            prefix_bytes=prefix_bytes,
        )
        engine.warm_up()
        engine.start()
        try:
            yield Asking(self, engine)
        finally:
            engine.stop()


def load(model: str, draft: str | None, device: str, dtype: str, threads: int) -> Model:
    """As `difyops serve` does. Raises DifyopsError."""

    def loaded(name: str) -> checkpoints.Loaded:
        fields = {"id": "bench", "model": name, "device": device, "dtype": dtype}
        return opening.load_model(LlmConfig.model_validate({**fields, "threads": threads}))

    return Model(loaded(model), loaded(draft).model if draft is not None else None)


@dataclass
class _Heard:
    """One answer as it comes."""

    began: float
    first: float = 0.0
    ended: float = 0.0
    tokens: list[int] = field(default_factory=list)
    error: str | None = None
    over: threading.Event = field(default_factory=threading.Event)

    def deliver(self, output: Output) -> None:
        now = time.perf_counter()
        self.first = self.first or now
        self.tokens += output.tokens
        if output.finish is not None:
            if output.finish is FinishReason.ERROR:
                self.error = output.error or "the engine failed"
            self.ended = now
            self.over.set()


class Asking:
    """An engine, and who asks it."""

    def __init__(self, model: Model, engine: Engine) -> None:
        self.context = engine.context
        self._words = model.words
        self._engine = engine

    def ask(self, prompts: Sequence[Sequence[int]], tokens: int) -> Asked:
        """All of `prompts` at once, greedily; as many run at a time as there are slots.

        Raises DifyopsError when one of them fails.
        """
        params = SamplingParams(tokens, temperature=0.0, stop_ids=self._words.stop_ids)
        requests = [Request(prompt, params, self._words.stream()) for prompt in prompts]
        before = self._engine.stats().counters
        heard = [_Heard(time.perf_counter()) for _ in requests]
        for request, one in zip(requests, heard, strict=True):
            self._engine.submit(request, one.deliver)
        for one in heard:
            one.over.wait()
            if one.error is not None:
                raise DifyopsError(f"a request failed: {one.error}")
        after = self._engine.stats().counters
        drafted, accepted = (
            tuple(now.get(place, 0) - then.get(place, 0) for place in range(MOST))
            for now, then in (
                (after.drafted, before.drafted),
                (after.accepted, before.accepted),
            )
        )
        return Asked(
            tuple(tuple(one.tokens) for one in heard),
            max(one.ended for one in heard) - heard[0].began,
            heard[0].first - heard[0].began,
            sum(map(len, prompts)),
            sum(request.reused for request in requests),
            len(requests),
            after.passes - before.passes,
            drafted,
            accepted,
        )


class Talk:
    """A conversation with one engine; every turn is asked with all that was said before."""

    def __init__(self, model: Model, asking: Asking) -> None:
        self._model = model
        self._asking = asking
        self._messages: list[dict[str, str]] = []

    def fits(self, question: str, tokens: int) -> bool:
        return len(self._prompt(question)) + tokens <= self._asking.context

    def turn(self, question: str, tokens: int) -> Asked:
        asked = self._asking.ask([self._prompt(question)], tokens)
        answer = self._model.words.decode(asked.answers[0])
        self._messages += [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
        return asked

    def _prompt(self, question: str) -> list[int]:
        return self._model.prompt([*self._messages, {"role": "user", "content": question}])
