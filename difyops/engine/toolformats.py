"""How models write tool calls, and how a chat template tells which way is its model's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

#: hermes: a JSON object {"name", "arguments"} between tags. qwen3_coder: tags for each parameter.
ToolFormat = Literal["hermes", "qwen3_coder"]

CALL_OPEN, CALL_CLOSE = "<tool_call>", "</tool_call>"
FUNCTION_OPEN, FUNCTION_CLOSE = "<function=", "</function>"
PARAMETER_OPEN, PARAMETER_CLOSE = "<parameter=", "</parameter>"
THINK_OPEN, THINK_CLOSE = "<think>", "</think>"


@dataclass(frozen=True)
class Tool:
    """A function a model may call; `parameters` is a JSON schema of an object.

    Where calls are constrained, a `strict` one's arguments keep to the schema, others are any.
    """

    name: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    strict: bool = True


def detect_format(chat_template: str | None) -> ToolFormat | None:
    """The format that a template teaches its model; None when it has no tool calls we can read."""
    if not chat_template or CALL_OPEN not in chat_template or "tools" not in chat_template:
        return None
    return "qwen3_coder" if FUNCTION_OPEN in chat_template else "hermes"


def detect_reasoning(chat_template: str | None) -> bool:
    """Whether the template knows reasoning between <think> and </think>."""
    return bool(chat_template) and THINK_CLOSE in (chat_template or "")


def starts_inside(prompt: str) -> bool:
    """Whether a rendered prompt has opened the reasoning that the model goes on with."""
    return prompt.rstrip().endswith(THINK_OPEN)
