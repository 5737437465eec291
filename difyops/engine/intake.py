"""A request of the API -> requests of the engine: prompt, sampling, constraint."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel

from difyops.engine.answer import ChatChoice, Choice, TextChoice, TokenTexts
from difyops.engine.chat import ChatTemplate
from difyops.engine.grammar import GrammarConstraint, Grammars
from difyops.engine.protocol import (
    THINKING_NAMES,
    ChatRequest,
    CompletionRequest,
    GenerationRequest,
    StructuredOutputs,
)
from difyops.engine.request import Constraint, Request, SamplingDefaults, SamplingParams
from difyops.engine.schema import UnsupportedSchema
from difyops.engine.tokens import Tokenizer
from difyops.engine.toolcalls import ChatParser
from difyops.engine.toolformats import (
    THINK_CLOSE,
    THINK_OPEN,
    Tool,
    ToolFormat,
    detect_format,
    detect_reasoning,
    starts_inside,
)
from difyops.serving.errors import bad_field, too_long, unsupported

if TYPE_CHECKING:
    from difyops.engine.runner import Engine

_SEEDS = 2**63
#: Role and field of what some chat templates do not read.
_OPTIONAL = (
    ("system", "name"),
    ("user", "name"),
    ("assistant", "name"),
    ("assistant", "tool_calls"),
    ("tool", "content"),
)
Number = TypeVar("Number", int, float)


@dataclass(frozen=True)
class Llm:
    """A model that is served. Without a chat template it only completes text; without an end
    token in its tokenizer there are no grammars."""

    id: str
    engine: Engine
    tokenizer: Tokenizer
    template: ChatTemplate | None
    grammars: Grammars | None
    defaults: SamplingDefaults

    @property
    def context(self) -> int:
        """Tokens of one request, its answer included."""
        return self.engine.context

    @cached_property
    def longest_token(self) -> int:
        """The most bytes of a text that one token stands for."""
        tokenizer = self.tokenizer
        longest = max(
            (len(tokenizer.token_bytes(i)) for i in range(tokenizer.vocabulary)), default=1
        )
        # A normaliser composes characters, and makes ASCII of what has four bytes.
        return longest if tokenizer.backend.normalizer is None else 4 * longest

    @property
    def tool_format(self) -> ToolFormat | None:
        """How the model writes tool calls; None when its template teaches none that we read."""
        return detect_format(self.template.source) if self.template is not None else None


@dataclass(frozen=True)
class Job:
    """The engine's requests for one HTTP request, each with the choice that its output becomes.

    `prompt_tokens` counts every prompt once, whatever `n` is.
    """

    requests: Sequence[Request]
    choices: Sequence[Choice]
    prompt_tokens: int

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens whose state was kept from before, over the distinct prompts."""
        return sum({tuple(r.prompt): r.reused for r in self.requests}.values())


def chat_job(llm: Llm, asked: ChatRequest) -> Job:
    """Raises ApiError (400) naming the field that cannot be honoured."""
    text = _render(llm, asked)
    source = llm.template.source if llm.template is not None else None
    tools = [
        Tool(
            t.function.name, t.function.parameters or {}, asked.must_call or bool(t.function.strict)
        )
        for t in asked.callable_tools
    ]
    form = llm.tool_format if tools else None
    if tools and form is None:
        raise unsupported("tools", f"{llm.id} does not call tools")
    # A grammar that holds from the first token on leaves no room for reasoning.
    inside = starts_inside(text)
    reasoning = inside or (detect_reasoning(source) and not asked.whole_is_constrained)
    prompt = _encode(llm, text, "messages")
    sampling = _sampling(llm, asked, len(prompt), "messages")
    requests, choices = [], []
    of_all = _chat_constraint(llm, asked, tools, form, reasoning=reasoning, inside=inside)
    for index in range(asked.n or 1):
        constraint = of_all.fresh() if of_all is not None else None
        requests.append(_request(llm, asked, prompt, sampling, index, constraint))
        parser = ChatParser(form, tools, reasoning=reasoning, inside=inside)
        one_call = asked.parallel_tool_calls is False
        choices.append(ChatChoice(index, parser, TokenTexts(llm.tokenizer), one_call=one_call))
    return Job(requests, choices, len(prompt))


def completion_job(llm: Llm, asked: CompletionRequest) -> Job:
    """Raises ApiError (400) naming the field that cannot be honoured."""
    requests: list[Request] = []
    choices = []
    total = 0
    of_all = _structured(llm, asked.structured_outputs, None)
    for given in asked.prompts:
        prompt = _encode(llm, given, "prompt", bos=True) if isinstance(given, str) else given
        sampling = _sampling(llm, asked, len(prompt), "prompt")
        _check_tokens(llm, prompt)
        total += len(prompt)
        echo = given if isinstance(given, str) else llm.tokenizer.decode(given)
        for _ in range(asked.n or 1):
            index = len(requests)
            constraint = of_all.fresh() if of_all is not None else None
            requests.append(_request(llm, asked, prompt, sampling, index, constraint))
            choices.append(
                TextChoice(index, TokenTexts(llm.tokenizer), echo=echo if asked.echo else "")
            )
    return Job(requests, choices, total)


def _render(llm: Llm, asked: ChatRequest) -> str:
    template = llm.template
    if template is None:
        raise bad_field("model", f"{llm.id} has no chat template; it answers on /v1/completions")
    given = template_kwargs(llm.id, asked, template)
    tools = [
        tool.model_dump(exclude_none=True, exclude={"function": {"strict"}})
        for tool in ([] if asked.tool_choice == "none" else asked.tools or [])
    ]
    messages = [_message(message) for message in asked.messages]

    def render(messages: list[dict[str, Any]]) -> str:
        return template.render(messages, tools=tools, kwargs=given)

    try:
        text = render(messages)
    except ValueError as error:
        raise bad_field("messages", str(error)) from None
    if found := _unread(messages, text, render):
        index, field = found
        raise unsupported(
            f"messages.{index}.{field}", f"the chat template of {llm.id} does not read it"
        )
    return text


def _unread(
    messages: list[dict[str, Any]], text: str, render: Callable[[list[dict[str, Any]]], str]
) -> tuple[int, str] | None:
    """The index and the field of what the template leaves out of `text`: it is the same with
    something else there.

    Not looked at are an assistant's reasoning, which templates leave out of what is over, and
    clients send back as they got it; and `tool_call_id` and `name` of a tool's message, which
    only say again which call it answers.
    """
    for role, field in _OPTIONAL:
        places = [i for i, m in enumerate(messages) if m["role"] == role and m.get(field)]
        if not places:
            continue
        others = [_without(m, field) if m["role"] == role and m.get(field) else m for m in messages]
        try:
            same = render(others) == text
        except ValueError:  # it misses what was taken away
            same = False
        if same:
            return places[0], field
    return None


def _without(message: dict[str, Any], field: str) -> dict[str, Any]:
    other = {k: v for k, v in message.items() if k != field}
    # An empty content might be left out by a template that reads contents.
    return other | ({"content": secrets.token_hex(8)} if field == "content" else {})


def template_kwargs(model: str, asked: ChatRequest, template: ChatTemplate) -> dict[str, Any]:
    """What the template of `model` is given beside the conversation. Raises ApiError (400) for what
    it does not read."""
    given = dict(asked.chat_template_kwargs or {})
    if asked.thinks is not None:
        # Clients send every name that some model has for it; this model's is the one that counts.
        names = [name for name in THINKING_NAMES if name in template.reads]
        if not names and asked.thinks != detect_reasoning(template.source):
            how = "never" if asked.thinks else "always"
            raise unsupported("enable_thinking", f"{model} {how} reasons")
        given = {k: v for k, v in given.items() if k not in THINKING_NAMES}
        given |= dict.fromkeys(names, asked.thinks)
    for name in given:
        if name not in template.reads:
            raise unsupported(
                f"chat_template_kwargs.{name}", f"the chat template of {model} does not read it"
            )
    if asked.reasoning_effort is not None:
        if "reasoning_effort" not in template.reads:
            raise unsupported("reasoning_effort", f"the chat template of {model} does not read it")
        if given.setdefault("reasoning_effort", asked.reasoning_effort) != asked.reasoning_effort:
            raise bad_field("reasoning_effort", "chat_template_kwargs says something else")
    return given


def _message(message: BaseModel) -> dict[str, Any]:
    """As templates know it: the developer is the system, and reasoning has one name."""
    plain = message.model_dump(exclude_none=True)
    if plain["role"] == "developer":
        plain["role"] = "system"
    if "reasoning" in plain:
        plain["reasoning_content"] = plain.pop("reasoning")
    return plain


def _sampling(llm: Llm, asked: GenerationRequest, prompt: int, field: str) -> SamplingParams:
    """All but the seed. `prompt` is its length in tokens, `field` where the client gave it."""
    room = llm.context - prompt
    if room < 1:
        raise too_long(prompt, llm.context, llm.id, field)
    if (wanted := asked.most_tokens) is not None and wanted > room:
        raise bad_field(
            "max_tokens",
            f"the prompt has {prompt} tokens and {wanted} are asked for, but the context of "
            f"{llm.id} is {llm.context} tokens: at most {room} fit",
        )
    bias = {int(token): value for token, value in (asked.logit_bias or {}).items()}
    if wrong := [token for token in bias if token >= llm.tokenizer.vocabulary]:
        raise bad_field("logit_bias", f"{llm.id} has no token {wrong[0]}")
    return SamplingParams(
        max_tokens=wanted or room,
        temperature=_or(asked.temperature, llm.defaults.temperature),
        top_p=_or(asked.top_p, llm.defaults.top_p),
        top_k=max(0, _or(asked.top_k, llm.defaults.top_k)),
        min_p=_or(asked.min_p, llm.defaults.min_p),
        presence_penalty=asked.presence_penalty or 0.0,
        frequency_penalty=asked.frequency_penalty or 0.0,
        repetition_penalty=_or(asked.repetition_penalty, llm.defaults.repetition_penalty),
        logit_bias=bias,
        logprobs=asked.alternatives,
        stop_ids=frozenset() if asked.ignore_eos else llm.tokenizer.stop_ids,
    )


def _or(value: Number | None, default: Number) -> Number:
    return default if value is None else value


def _request(
    llm: Llm,
    asked: GenerationRequest,
    prompt: Sequence[int],
    sampling: SamplingParams,
    index: int,
    constraint: Constraint | None,
) -> Request:
    """The choice number `index`; each has a seed of its own, so that they differ."""
    if constraint is not None and asked.ignore_eos:
        raise bad_field("ignore_eos", "not together with a constraint, which ends by itself")
    seed = secrets.randbelow(_SEEDS) if asked.seed is None else (asked.seed + index) % _SEEDS
    text = llm.tokenizer.stream(asked.stop or ())
    return Request(
        prompt,
        replace(sampling, seed=seed),
        text,
        constraint,
        speculate=asked.speculate is not False,
        salt=asked.cache_salt or "",
    )


def _chat_constraint(
    llm: Llm,
    asked: ChatRequest,
    tools: Sequence[Tool],
    form: ToolFormat | None,
    *,
    reasoning: bool,
    inside: bool,
) -> GrammarConstraint | None:
    """`reasoning`: the answer may begin with it; `inside`: the prompt has opened it."""
    after = THINK_CLOSE if reasoning else None
    parallel = asked.parallel_tool_calls is not False
    if form is not None and asked.must_call:
        with _explained("tools"):
            return _grammars(llm).tools(tools, form, parallel=parallel, after=after)
    # Without a strict tool nothing was promised, and the model writes its calls as it likes.
    if form is not None and any(tool.strict for tool in tools):
        begins = THINK_OPEN if reasoning and not inside else None
        with _explained("tools"):
            return _grammars(llm).optional_tools(
                tools, form, parallel=parallel, begins=begins, after=after
            )
    wanted = asked.response_format
    if wanted is not None and wanted.type != "text":
        with _explained("response_format"):
            if wanted.json_schema is None:
                return _grammars(llm).json_object(after=after)
            return _grammars(llm).json_schema(wanted.json_schema.schema_, after=after)
    return _structured(llm, asked.structured_outputs, after)


def _structured(
    llm: Llm, wanted: StructuredOutputs | None, after: str | None
) -> GrammarConstraint | None:
    if wanted is None:
        return None
    with _explained("structured_outputs"):
        if wanted.regex is not None:
            return _grammars(llm).regex(wanted.regex, after=after)
        if wanted.choice is not None:
            return _grammars(llm).choice(wanted.choice, after=after)
        return _grammars(llm).json_schema(wanted.json_, after=after)


def _grammars(llm: Llm) -> Grammars:
    if llm.grammars is None:
        raise ValueError(f"the tokenizer of {llm.id} names no end token, so no output can end")
    return llm.grammars


@contextlib.contextmanager
def _explained(field: str) -> Iterator[None]:
    """What a grammar refuses, as a 400. UnsupportedSchema has pointer and keyword in its text."""
    try:
        yield
    except UnsupportedSchema as error:
        raise unsupported(field, str(error)) from None
    except ValueError as error:
        raise bad_field(field, str(error)) from None


def _encode(llm: Llm, text: str, field: str, *, bos: bool = False) -> list[int]:
    """The tokens of a prompt. Raises ApiError (400) for a text that cannot fit, without the
    seconds that reading it would take."""
    size = len(text.encode())
    if (least := -(-size // llm.longest_token)) > llm.context:
        raise too_long(least, llm.context, llm.id, field, size=size)
    return llm.tokenizer.encode(text, bos=bos)


def _check_tokens(llm: Llm, prompt: Sequence[int]) -> None:
    if not prompt:
        raise bad_field("prompt", f"is empty, and {llm.id} has no token to begin with")
    if (greatest := max(prompt)) >= llm.tokenizer.vocabulary:
        raise bad_field("prompt", f"{llm.id} has no token {greatest}")
