"""What a request may say: OpenAI's chat and text completions, and a few extensions.

Nothing that is accepted is ignored. A field of OpenAI's that this server lacks may be null, which
says nothing; any other value of it is refused by name, and so is a field that nobody knows. Where a
default of OpenAI's is the only value that can be honoured, that value is accepted.

What a request leaves out is as OpenAI's reference says: temperature 1, top_p 1, no penalties, a
fresh seed; `max_tokens` is 16 for text completions and what the context holds for chat. A model
may bring its own temperature, top_p, top_k, min_p and repetition penalty: generation_config.json.

Extensions, named as vLLM names them: `top_k`, `min_p`, `repetition_penalty`, `ignore_eos`,
`structured_outputs`, `chat_template_kwargs`, `cache_salt`; `reasoning_content` (or `reasoning`) in
the messages of an assistant. Dify's provider switches reasoning by `enable_thinking` and
`thinking`, too. Our own: `speculate` (false: guess no tokens ahead for this request). Neither it
nor `cache_salt` changes an answer: `difyops doctor` compares answers with and without.

An assistant's reasoning is the one thing that may stay out of the prompt: clients send back what
they got, and most chat templates leave out what was thought before. intake.py refuses all else
that the model's template does not read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    model_validator,
)

from difyops.serving.errors import ApiError, bad_field, unsupported

#: Choices of one request, over all its prompts.
MAX_CHOICES = 128
MAX_STOPS = 16
MAX_MESSAGES = 8192
MAX_BIASES = 300
#: What chat templates call the switch of the reasoning.
THINKING_NAMES = ("enable_thinking", "thinking")

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
NonEmpty = Annotated[str, StringConstraints(min_length=1)]
# fail_fast: pydantic would otherwise write an error for each of a million ids.
Tokens = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1, fail_fast=True)]
Texts = Annotated[list[str], Field(min_length=1, fail_fast=True)]
Schema = dict[str, Any] | bool

_TOKEN_ID = re.compile(r"0|[1-9][0-9]{0,9}")


def _token_ids(bias: dict[str, float]) -> dict[str, float]:
    for key in bias:
        if not _TOKEN_ID.fullmatch(key):
            raise ValueError(f"{key[:20]!r} is not a token id")
    return bias


def _a_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _few(prompts: Any) -> Any:
    if isinstance(prompts, list) and len(prompts) > MAX_CHOICES and not isinstance(prompts[0], int):
        raise ValueError(f"more than {MAX_CHOICES} prompts")
    return prompts


Bias = Annotated[dict[str, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=MAX_BIASES)]
Stops = Annotated[
    list[Annotated[str, StringConstraints(min_length=1, max_length=1000)]],
    Field(max_length=MAX_STOPS),
]


class _Body(BaseModel):
    """Strict: no number in quotes, no unknown key."""

    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(_Body):
    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class JsonSchema(_Body):
    """All but the schema labels it: the schema is always enforced to the letter."""

    name: Name
    schema_: Schema = Field(alias="schema")
    strict: bool | None = None
    description: str | None = None


class ResponseFormat(_Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_its_schema(self) -> Self:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema is needed with the type json_schema, and only there")
        return self


class StructuredOutputs(_Body):
    """vLLM's name for a constraint that OpenAI has no field for. Exactly one is given."""

    json_: Schema | None = Field(None, alias="json")
    regex: NonEmpty | None = None
    choice: Annotated[list[NonEmpty], Field(min_length=1)] | None = None

    @model_validator(mode="after")
    def _is_one(self) -> Self:
        if sum(x is not None for x in (self.json_, self.regex, self.choice)) != 1:
            raise ValueError("exactly one of json, regex and choice is needed")
        return self


class TextPart(_Body):
    type: Literal["text"]
    text: str


Content = str | Annotated[list[TextPart], Field(min_length=1)]


class SystemMessage(_Body):
    role: Literal["system", "developer"]
    content: Content
    name: str | None = None


class UserMessage(_Body):
    role: Literal["user"]
    content: Content
    name: str | None = None


class ToolMessage(_Body):
    role: Literal["tool"]
    content: Content
    tool_call_id: NonEmpty
    name: str | None = None


class CalledFunction(_Body):
    name: Name
    arguments: str

    @model_validator(mode="after")
    def _is_json(self) -> Self:
        try:
            arguments = json.loads(self.arguments or "{}")
        except (ValueError, RecursionError):
            arguments = None
        if not isinstance(arguments, dict):
            raise ValueError("arguments is not the text of a JSON object")
        return self


class ToolCall(_Body):
    id: NonEmpty
    type: Literal["function"]
    function: CalledFunction


class AssistantMessage(_Body):
    role: Literal["assistant"]
    content: Content | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    # Answers of other servers carry these, empty.
    refusal: None = None
    audio: None = None
    function_call: None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if self.content is None and not self.tool_calls:
            raise ValueError("content or tool_calls is needed")
        if None not in (self.reasoning, self.reasoning_content) and (
            self.reasoning != self.reasoning_content
        ):
            raise ValueError("reasoning and reasoning_content are two names of one thing")
        return self


Message = Annotated[
    SystemMessage | UserMessage | AssistantMessage | ToolMessage, Field(discriminator="role")
]


class Function(_Body):
    """Arguments keep to `parameters` where `strict` says so, and in every call that must be made
    (`tool_choice`)."""

    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None

    @model_validator(mode="after")
    def _has_named_arguments(self) -> Self:
        schema = self.parameters or {}
        if schema.get("type", "object") != "object":
            raise ValueError("parameters.type must be object: arguments have names")
        if not isinstance(schema.get("properties", {}), dict):
            raise ValueError("parameters.properties must be an object")
        return self


class FunctionTool(_Body):
    type: Literal["function"]
    function: Function


class FunctionName(_Body):
    name: Name


class NamedTool(_Body):
    type: Literal["function"]
    function: FunctionName


class Thinking(_Body):
    type: Literal["enabled", "disabled"]


class GenerationRequest(_Body):
    """What chat and text completions have in common."""

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None  # 0: the likeliest token alone
    top_k: Annotated[int, Field(ge=-1)] | None = None  # 0 and -1: all
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    logit_bias: Annotated[Bias, AfterValidator(_token_ids)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Annotated[Stops, BeforeValidator(_a_list)] | None = None
    ignore_eos: bool | None = None
    structured_outputs: StructuredOutputs | None = None
    # Prompts share what is kept of them only where the salt is the same.
    cache_salt: Annotated[str, StringConstraints(min_length=1, max_length=200)] | None = None
    speculate: bool | None = None
    # A tag of an end user; it changes no answer.
    user: str | None = None

    @model_validator(mode="after")
    def _options_of_a_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options: only with stream: true")
        return self

    @property
    def usage_in_stream(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def count(self) -> int:
        """Choices, over all prompts."""
        return self.n or 1

    @property
    def most_tokens(self) -> int | None:
        """The most tokens of an answer; None: what the context holds."""
        return self.max_tokens

    @property
    def alternatives(self) -> int | None:
        """SamplingParams.logprobs."""
        raise NotImplementedError


class ChatRequest(GenerationRequest):
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[FunctionTool], Field(min_length=1, max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: NonEmpty | None = None
    enable_thinking: bool | None = None
    thinking: Thinking | None = None
    # What changes no answer here: tags, hints, and the values that mean what is done anyway.
    metadata: dict[str, str] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    store: Literal[False] | None = None
    service_tier: Literal["auto", "default"] | None = None
    modalities: list[Literal["text"]] | None = None
    reasoning_format: Literal["auto", "deepseek"] | None = None  # llama.cpp's
    # OpenAI's fields that this server lacks.
    audio: None = None
    function_call: None = None
    functions: None = None
    moderation: None = None
    prediction: None = None
    prompt_cache_options: None = None
    prompt_cache_retention: None = None
    verbosity: None = None
    web_search_options: None = None

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs: only with logprobs: true")
        if None not in (self.max_tokens, self.max_completion_tokens) and (
            self.max_tokens != self.max_completion_tokens
        ):
            raise ValueError("max_tokens: max_completion_tokens says something else")
        if len(set(self._switches)) > 1:
            raise ValueError(
                "enable_thinking: thinking or chat_template_kwargs says something else"
            )
        self._check_tools()
        if self.structured_outputs and self.response_format:
            raise ValueError("structured_outputs: not together with response_format")
        return self

    def _check_tools(self) -> None:
        names = [tool.function.name for tool in self.tools or ()]
        if len(set(names)) < len(names):
            raise ValueError("tools: two of them have the same name")
        choice = self.tool_choice
        if isinstance(choice, NamedTool) and choice.function.name not in names:
            raise ValueError(f"tool_choice: no tool {choice.function.name!r}")
        for field in ("tool_choice", "parallel_tool_calls"):
            if getattr(self, field) is not None and not names:
                raise ValueError(f"{field}: only with tools")
        if self.callable_tools and (self.structured_outputs or self.wants_json):
            field = "structured_outputs" if self.structured_outputs else "response_format"
            raise ValueError(f"{field}: not together with tools that may be called")

    @property
    def _switches(self) -> list[bool]:
        """Of the reasoning, under all the names that clients have for it."""
        named = [(self.chat_template_kwargs or {}).get(name) for name in THINKING_NAMES]
        found = [self.enable_thinking, *named]
        if self.thinking is not None:
            found.append(self.thinking.type == "enabled")
        return [value for value in found if isinstance(value, bool)]

    @property
    def thinks(self) -> bool | None:
        """Whether the answer is to begin with reasoning; None: as the template has it."""
        return next(iter(self._switches), None)

    @property
    def wants_json(self) -> bool:
        return self.response_format is not None and self.response_format.type != "text"

    @property
    def callable_tools(self) -> Sequence[FunctionTool]:
        """The tools that the answer may call; with tool_choice none, the model sees none."""
        tools = [] if self.tool_choice == "none" else self.tools or []
        if isinstance(self.tool_choice, NamedTool):
            return [t for t in tools if t.function.name == self.tool_choice.function.name]
        return tools

    @property
    def must_call(self) -> bool:
        return self.tool_choice == "required" or isinstance(self.tool_choice, NamedTool)

    @property
    def whole_is_constrained(self) -> bool:
        """From the answer's first token on, but for a reasoning that the prompt has opened."""
        return self.must_call or self.wants_json or self.structured_outputs is not None

    @property
    def most_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def alternatives(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(GenerationRequest):
    prompt: Annotated[
        str | Texts | Tokens | Annotated[list[Tokens], Field(min_length=1, fail_fast=True)],
        BeforeValidator(_few),
    ]
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    # OpenAI's fields that this server lacks.
    best_of: None = None
    suffix: None = None

    @model_validator(mode="after")
    def _is_possible(self) -> Self:
        if self.echo and self.logprobs is not None:
            raise ValueError("logprobs: not together with echo; a prompt's are not computed")
        if self.count > MAX_CHOICES:
            raise ValueError(f"prompt: with n, more than {MAX_CHOICES} choices")
        return self

    @property
    def count(self) -> int:
        return len(self.prompts) * (self.n or 1)

    @property
    def prompts(self) -> Sequence[str | list[int]]:
        given: Any = self.prompt
        return [given] if isinstance(given, str) or isinstance(given[0], int) else given

    @property
    def most_tokens(self) -> int | None:
        return self.max_tokens or 16

    @property
    def alternatives(self) -> int | None:
        return self.logprobs


Kind = TypeVar("Kind", ChatRequest, CompletionRequest)


def parse(kind: type[Kind], fields: dict[str, Any]) -> Kind:
    """Raises ApiError (400) naming the first field that is wrong."""
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        details = error.errors(include_url=False, include_context=False)
    # Of a union's alternatives, the one that got furthest is the one that was meant.
    raise _explain(max(details, key=lambda detail: len(detail["loc"])), fields)


#: Fields of several types, where pydantic would name only one.
_SHAPES = {
    "prompt": "a string, a list of strings, or one or more lists of token ids is needed",
    "content": "a string, or a list of parts of type text, is needed",
}


def _explain(detail: Any, fields: dict[str, Any]) -> ApiError:
    where = _path(detail, fields)
    message = detail["msg"].removeprefix("Value error, ")
    if not where:  # from the request's own validator, whose message begins with the field
        field, _, rest = message.partition(": ")
        return bad_field(field, rest)
    if detail["type"] in ("extra_forbidden", "none_required"):
        return unsupported(where)
    if detail["type"].endswith("_type"):
        keys = where.split(".")
        message = _SHAPES.get(keys[0], _SHAPES.get(keys[-1], message))
    return bad_field(where, message)


def _path(detail: Any, fields: dict[str, Any]) -> str:
    """The keys on the way to what is wrong, without what pydantic says of a union's choices."""
    value: Any = fields
    path = []
    for i, part in enumerate(detail["loc"]):
        if (isinstance(value, dict) and part in value) or (
            isinstance(value, list) and isinstance(part, int)
        ):
            value = value[part]
        elif not (detail["type"] == "missing" and i == len(detail["loc"]) - 1):
            continue
        path.append(str(part))
    return ".".join(path)
