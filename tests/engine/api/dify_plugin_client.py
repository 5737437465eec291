"""What Dify's own model SDK makes of a server: run by a Python that has `dify-plugin`.

Usage: python dify_plugin_client.py '{"url": …, "key": …, "llm": …, "embedding": …}'

Prints one JSON object: scenario -> what it saw, or {"error": the exception's name, "message"}.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

# It patches sockets, and wants to be the first that is imported.
from dify_plugin import OAICompatEmbeddingModel, OAICompatLargeLanguageModel
from dify_plugin.entities import I18nObject
from dify_plugin.entities.model import ParameterRule, ParameterType
from dify_plugin.entities.model.message import (
    AssistantPromptMessage,
    PromptMessageTool,
    SystemPromptMessage,
    ToolPromptMessage,
    UserPromptMessage,
)

import gevent  # isort: skip

SCHEMA = {
    "name": "answer",
    "description": "What is to be said.",
    "schema": {
        "type": "object",
        "properties": {"size": {"enum": ["small", "large"]}, "sure": {"type": "boolean"}},
        "required": ["size", "sure"],
        "additionalProperties": False,
    },
}
TOOL = PromptMessageTool(
    name="weather",
    description="The weather of a city.",
    parameters={"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
)
#: Dify's plugin adds these by what is ticked in its form ("extended" compatibility).
THINKING = {
    True: {
        "chat_template_kwargs": {"enable_thinking": True, "thinking": True},
        "thinking": {"type": "enabled"},
        "enable_thinking": True,
        "reasoning_format": "auto",
    },
    False: {
        "chat_template_kwargs": {"enable_thinking": False, "thinking": False},
        "thinking": {"type": "disabled"},
        "enable_thinking": False,
    },
}


class Offline:
    """The SDK counts tokens with a vocabulary that it downloads."""

    def _get_num_tokens_by_gpt2(self, text: str) -> int:
        return len(text) // 4


class Llm(Offline, OAICompatLargeLanguageModel):
    __module__ = "models.llm.llm"  # errors name the provider by it
    extra: dict[str, Any] = {}  # noqa: RUF012

    def get_customizable_model_schema(self, model: str, credentials: Any) -> Any:
        schema = super().get_customizable_model_schema(model, credentials)
        for name in ("response_format", "json_schema"):
            rule = ParameterRule(
                name=name, label=I18nObject(en_us=name), type=ParameterType.STRING, required=False
            )
            schema.parameter_rules.append(rule)
        return schema

    def _invoke(self, model: str, credentials: Any, messages: Any, parameters: Any, *rest: Any):
        return super()._invoke(model, credentials, messages, parameters | self.extra, *rest)


class Embedding(Offline, OAICompatEmbeddingModel):
    __module__ = "models.text_embedding.text_embedding"


class Client:
    def __init__(self, given: dict[str, Any]) -> None:
        self.given = given
        self.llm = Llm([])
        self.embedding = Embedding([])

    def credentials(self, **fields: Any) -> dict[str, Any]:
        return {
            "endpoint_url": f"{self.given['url']}/v1",
            "api_key": self.given["key"],
            "mode": "chat",
            "context_size": "1024",
            "function_calling_type": "tool_call",
            "stream_function_calling": "supported",
        } | fields

    def ask(
        self, messages: Any, *, stream: bool, extra: Any = None, tools: Any = None,
        stop: Any = None, credentials: Any = None, **parameters: Any,
    ) -> dict[str, Any]:  # fmt: skip
        self.llm.extra = extra or {}
        chunks = self.llm.invoke(
            self.given["llm"],
            self.credentials(**(credentials or {})),
            [UserPromptMessage(content=messages)] if isinstance(messages, str) else messages,
            {"temperature": 0, "max_tokens": 200} | parameters,
            tools,
            stop,
            stream,
            "someone",
        )
        seen: dict[str, Any] = {"text": "", "calls": [], "chunks": 0}
        for chunk in chunks:
            message = chunk.delta.message
            seen["chunks"] += 1
            seen["text"] += message.content or ""
            seen["calls"] += [
                [c.id, c.function.name, c.function.arguments] for c in message.tool_calls
            ]
            seen["finish"] = chunk.delta.finish_reason
            if chunk.delta.usage is not None:
                usage = chunk.delta.usage
                seen["usage"] = [usage.prompt_tokens, usage.completion_tokens]
        return seen

    # Scenarios

    def validate(self) -> None:
        for fields in ({}, {"mode": "completion"}, {"stream_mode_auth": "use"}):
            self.llm.validate_credentials(self.given["llm"], self.credentials(**fields))
        self.embedding.validate_credentials(self.given["embedding"], self.credentials())

    def validate_with_a_wrong_key(self) -> None:
        self.llm.validate_credentials(self.given["llm"], self.credentials(api_key="wrong"))

    def blocking(self) -> Any:
        return self.ask("Well?", stream=False)

    def streamed(self) -> Any:
        usage = {"stream_options": {"include_usage": True}}
        return self.ask("Well?", stream=True, extra=usage)

    def every_parameter(self) -> Any:
        parameters = {"top_p": 0, "frequency_penalty": 0, "presence_penalty": 0, "temperature": 0.7}
        return self.ask("Well?", stream=True, stop=["so"], **parameters)

    def completion(self) -> Any:
        return self.ask("Well?", stream=True, max_tokens=5, credentials={"mode": "completion"})

    def called(self) -> Any:
        return [self.ask("Weather?", stream=stream, tools=[TOOL]) for stream in (False, True)]

    def after_a_call(self) -> Any:
        function = AssistantPromptMessage.ToolCall.ToolCallFunction(name="weather", arguments="")
        call = AssistantPromptMessage.ToolCall(id="call_1", type="function", function=function)
        messages = [
            SystemPromptMessage(content="You are helpful."),
            UserPromptMessage(content="Weather?"),
            AssistantPromptMessage(content="", tool_calls=[call]),
            ToolPromptMessage(content="rain", tool_call_id="call_1", name="weather"),
        ]
        return self.ask(messages, stream=True, tools=[TOOL], max_tokens=5)

    def json_schema(self) -> Any:
        given = {"response_format": "json_schema", "json_schema": json.dumps(SCHEMA)}
        return [self.ask("Which?", stream=stream, **given) for stream in (False, True)]

    def json_object(self) -> Any:
        return self.ask("Which?", stream=False, response_format="json_object")

    def reasoning(self) -> Any:
        return self.ask("Well?", stream=True, extra=THINKING[True])

    def no_reasoning(self) -> Any:
        return self.ask("Well?", stream=True, extra=THINKING[False])

    def wrong_key(self) -> Any:
        return self.ask("Well?", stream=True, credentials={"api_key": "wrong"})

    def too_long(self) -> Any:
        return self.ask("Well? " * 2000, stream=True)

    def functions(self) -> Any:
        """OpenAI's way before tools, which the server lacks."""
        old = {"function_calling_type": "function_call"}
        return self.ask("Weather?", stream=True, tools=[TOOL], credentials=old)

    def busy(self) -> Any:
        """More at once than there is room for."""

        def ask() -> Any:
            other = Client(self.given)  # the SDK's models run one request at a time
            return run(lambda: other.ask("Go on.", stream=True, extra={"ignore_eos": True}))

        room = self.given["slots"] + self.given["waiting"]
        answers = gevent.joinall([gevent.spawn(ask) for _ in range(room + 3)])
        return next(one.value for one in answers if "error" in one.value)

    def tokens(self) -> Any:
        messages = [UserPromptMessage(content="Well? " * 20)]
        return self.llm.get_num_tokens(self.given["llm"], self.credentials(), messages, [TOOL])

    def embedded(self) -> Any:
        texts = ["a slot", "the sea"]
        answer = self.embedding.invoke(
            self.given["embedding"], self.credentials(), texts, "someone"
        )
        return [[len(vector) for vector in answer.embeddings], answer.usage.tokens]

    def embedded_with_a_wrong_key(self) -> None:
        credentials = self.credentials(api_key="wrong")
        self.embedding.invoke(self.given["embedding"], credentials, ["a slot"])


SCENARIOS = [
    name for name, value in vars(Client).items()
    if callable(value) and name not in ("__init__", "credentials", "ask")
]  # fmt: skip


def run(scenario: Callable[[], Any]) -> Any:
    try:
        return scenario()
    except Exception as error:
        return {"error": type(error).__name__, "message": str(error)}


if __name__ == "__main__":
    client = Client(json.loads(sys.argv[1]))
    json.dump({name: run(getattr(client, name)) for name in SCENARIOS}, sys.stdout)
