"""`difyops chat`: a conversation with a model, and how fast its answers came."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from difyops import openai_client
from difyops.errors import DifyopsError, UsageError
from difyops.openai_client import Endpoint, Event, Message, Refused
from difyops.services import model as service

if TYPE_CHECKING:
    import httpx

    from difyops.core import Deployment

T = TypeVar("T")

#: Seconds that a server which is loading is waited for.
PATIENCE = 180.0
COMMANDS = "/reset forgets what was said, /exit (or Ctrl-D) ends, Ctrl-C stops an answer"


class View(Protocol):
    """Where a conversation is shown."""

    def question(self) -> str | None:
        """The next line that the person types; None at the end of the input."""
        ...

    def waiting(self, seconds: float) -> None:
        """The server has been loading for so long."""
        ...

    def piece(self, event: Event) -> None: ...

    def answered(self, answer: Answer) -> None: ...

    def problem(self, error: DifyopsError) -> None: ...

    def note(self, text: str) -> None: ...


@dataclass
class Answer:
    """What was said. `events` are those that carried text, `usage` the server's count of tokens;
    the moments are in seconds since the request was sent."""

    text: str = ""
    reasoning: str = ""
    finish: str | None = None
    interrupted: bool = False
    usage: int | None = None
    events: int = 0
    first: float | None = None
    last: float = 0.0

    def add(self, event: Event, moment: float) -> None:
        self.text += event.text
        self.reasoning += event.reasoning
        self.finish = event.finish or self.finish
        self.usage = self.usage if event.tokens is None else event.tokens
        if event.text or event.reasoning:
            self.events += 1
            self.first = moment if self.first is None else self.first
            self.last = moment

    @property
    def tokens(self) -> int:
        """The server's count; without one, as many as there were events."""
        return self.events if self.usage is None else self.usage

    @property
    def tokens_per_second(self) -> float | None:
        """From the first token to the last; None for fewer than two."""
        if self.first is None or self.tokens < 2 or self.last <= self.first:
            return None
        return (self.tokens - 1) / (self.last - self.first)

    def as_json(self, model: str) -> dict[str, Any]:
        return {
            "version": 1,
            "model": model,
            "answer": self.text,
            "reasoning": self.reasoning,
            "finish_reason": self.finish,
            "tokens": self.tokens,
            "tokens_exact": self.usage is not None,
            "tokens_per_second": self.tokens_per_second,
            "seconds_to_first_token": self.first,
        }


@dataclass
class Conversation:
    """The turns so far, and the model that answers. `options` are fields of the request."""

    endpoint: Endpoint
    client: httpx.Client
    view: View
    options: Mapping[str, Any] = field(default_factory=dict)
    system: str | None = None
    turns: list[Message] = field(default_factory=list)

    def ask(self, question: str, patience: float = PATIENCE) -> Answer:
        """One turn, shown as it comes. Ctrl-C ends the answer and keeps what was said of it.

        Raises DifyopsError when there is no whole answer; the turn is then as if never asked.
        """
        asked = [*self.turns, {"role": "user", "content": question}]
        answer = Answer()
        try:
            until_loaded(lambda: self._receive(asked, answer), self.view.waiting, patience)
        except KeyboardInterrupt:
            answer.interrupted = True
        if answer.text:
            self.turns = [*asked, {"role": "assistant", "content": answer.text}]
        return answer

    def _receive(self, turns: list[Message], answer: Answer) -> None:
        system = [{"role": "system", "content": self.system}] if self.system else []
        began = time.monotonic()
        events = openai_client.stream_chat(
            self.client, self.endpoint, [*system, *turns], self.options
        )
        # Closed here and now, and not by the garbage collector: Ctrl-C must free the server's slot.
        with closing(events):
            for event in events:
                answer.add(event, time.monotonic() - began)
                self.view.piece(event)


def talk(conversation: Conversation) -> None:
    """Question and answer until the input ends. Ctrl-C at the prompt is the caller's."""
    view = conversation.view
    view.note(f"{conversation.endpoint.model} at {conversation.endpoint.url}; {COMMANDS}")
    while (line := view.question()) is not None:
        question = line.strip()
        if question == "/exit":
            return
        if question == "/reset":
            conversation.turns = []
            view.note("forgotten")
        elif question.startswith("/") and question[1:].isalpha():
            view.note(COMMANDS)
        elif question:
            try:
                view.answered(conversation.ask(question))
            except DifyopsError as error:
                view.problem(error)


def until_loaded(action: Callable[[], T], waiting: Callable[[float], None], patience: float) -> T:
    """Do it, again while the server says that it is loading, for `patience` seconds at most."""
    began = time.monotonic()
    while True:
        try:
            return action()
        except Refused as error:
            waited = time.monotonic() - began
            pause = min(error.retry_after or 1.0, 10.0)
            if not error.loading or waited + pause > patience:
                raise
            waiting(waited)
            time.sleep(pause)


@contextmanager
def begin(
    view: View,
    deployment: Deployment | None,
    url: str | None,
    model: str | None,
    system: str | None,
    options: Mapping[str, Any],
) -> Iterator[Conversation]:
    """A conversation with the model of `deployment`, or of the server at `url`.

    `model` names it; without it, the deployment's, or the only one at `url`. An option that is
    None is the server's own choice. Raises UsageError when the server has several models.
    """
    import httpx

    if deployment is not None:
        base, key = service.llm_url(deployment), service.llm_key(deployment)
        model = model or deployment.settings.model.name
    elif url is not None:
        base, key = url.rstrip("/"), openai_client.key_for(url)
    else:
        raise UsageError("a conversation needs a deployment or a URL")
    with httpx.Client(**openai_client.connection(base, key)) as client:
        name = model or only_model(client, base, view.waiting)
        wanted = {name: value for name, value in options.items() if value is not None}
        yield Conversation(Endpoint(base, name, key), client, view, wanted, system)


def only_model(
    client: httpx.Client, url: str, waiting: Callable[[float], None], patience: float = PATIENCE
) -> str:
    """The name of the one chat model at `url`. Raises UsageError when there are several."""
    found = until_loaded(lambda: openai_client.chat_models(client, url), waiting, patience)
    if len(found) == 1:
        return found[0]
    if not found:
        raise UsageError(f"{url} has no chat model")
    raise UsageError(
        f"{url} has {len(found)} models", f"name one with --model: {', '.join(found[:20])}"
    )


def question(asked: str | None, piped: bytes | None) -> str | None:
    """What is asked once: the text of the command line, a blank line, and what stdin brings.

    None when neither is given. Raises UsageError for stdin that is not UTF-8, and for no text.
    """
    parts = [] if asked is None else [asked]
    if piped is not None and ((text := decoded(piped)).strip() or asked is None):
        parts.append(text)
    whole = "\n\n".join(part.strip("\n") for part in parts)
    if parts and not whole.strip():
        raise UsageError("the question is empty", "difyops chat --once TEXT")
    return whole if parts else None


def elsewhere(error: UsageError) -> UsageError:
    """An error about a deployment that is not here, with the other way to a model."""
    import httpx

    url = "http://127.0.0.1:8090/v1"
    with suppress(httpx.HTTPError):
        root = url.removesuffix("/v1")
        if httpx.get(f"{root}/health", timeout=1, trust_env=False).status_code in (200, 503):
            return UsageError(error.message, f"{error.hint or ''}; or name a server: --url {url}")
    return error


def decoded(question: bytes) -> str:
    """Raises UsageError for what is not UTF-8."""
    try:
        return question.decode()
    except UnicodeDecodeError:
        raise UsageError("stdin is not UTF-8 text") from None
