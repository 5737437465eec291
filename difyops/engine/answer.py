"""The engine's outputs -> OpenAI's choices, in pieces and whole."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

from difyops.engine.request import FinishReason, Output, TokenLogprob
from difyops.engine.tokens import Tokenizer
from difyops.engine.toolcalls import Call, ChatParser, Delta

#: JSON has no infinity; OpenAI writes this for what can never be chosen.
_NEVER = -9999.0

Json = dict[str, Any]


class Choice(Protocol):
    """One of the answers to a request."""

    index: int
    #: OpenAI's finish_reason; None until the end.
    finish: str | None
    tokens: int

    def push(self, output: Output) -> list[Json]:
        """What `output` adds, as entries of a chunk's `choices`; the last has finish_reason."""
        ...

    def whole(self) -> Json:
        """All of it, as an entry of `choices`."""
        ...


class TokenTexts:
    """Tokens as the fields of `logprobs` show them."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def text(self, token: int) -> str:
        return self._tokenizer.token_bytes(token).decode("utf-8", "replace")

    def entry(self, token: int, logprob: float) -> Json:
        data = self._tokenizer.token_bytes(token)
        return {
            "token": data.decode("utf-8", "replace"),
            "logprob": _finite(logprob),
            "bytes": list(data),
        }


class ChatChoice:
    """A message of the assistant. With `one_call`, it ends where a second tool call begins."""

    def __init__(
        self, index: int, parser: ChatParser, texts: TokenTexts, *, one_call: bool = False
    ) -> None:
        self.index = index
        self.finish: str | None = None
        self.tokens = 0
        self._parser = parser
        self._texts = texts
        self._one_call = one_call
        self._began = False
        self._content = ""
        self._reasoning = ""
        self._calls: list[Json] = []
        self._logprobs: list[Json] | None = None

    def push(self, output: Output) -> list[Json]:
        deltas = self._parser.push(output.text)
        if output.finish is not None:
            deltas += self._parser.flush()
        self.tokens += len(output.tokens)
        shown = [{"role": "assistant", "content": ""}] if not self._began else []
        self._began = True
        for delta in deltas:
            if self._one_call and delta.call is not None and delta.call.index > 0:
                self.finish = self._reason(FinishReason.STOP)
                break
            shown.append(self._keep(delta))
        logprobs = self._keep_logprobs(output.logprobs)
        if logprobs and not shown:
            shown.append({})
        chunks = [self._chunk(delta) for delta in shown]
        if logprobs:
            # Beside the text, not beside the role.
            chunks[-1]["logprobs"] = {"content": logprobs, "refusal": None}
        if output.finish is not None and self.finish is None:
            self.finish = self._reason(output.finish)
        if self.finish is not None:
            chunks.append(self._chunk({}) | {"finish_reason": self.finish})
        return chunks

    def whole(self) -> Json:
        message: Json = {"role": "assistant", "content": self._content}
        if self._calls:
            message |= {"content": self._content or None, "tool_calls": self._calls}
        if self._reasoning:
            message |= {"reasoning_content": self._reasoning, "reasoning": self._reasoning}
        logprobs = None if self._logprobs is None else {"content": self._logprobs, "refusal": None}
        return {
            "index": self.index,
            "message": message,
            "logprobs": logprobs,
            "finish_reason": self.finish,
        }

    def _chunk(self, delta: Json) -> Json:
        return {"index": self.index, "delta": delta, "logprobs": None, "finish_reason": None}

    def _reason(self, finish: FinishReason) -> str:
        """A client runs what ends by `tool_calls`: calls cut short do not count as calls."""
        called = self._calls and self._parser.complete(len(self._calls))
        return "tool_calls" if finish is FinishReason.STOP and called else str(finish)

    def _keep(self, delta: Delta) -> Json:
        """Add to the whole; answer what a chunk says of it."""
        if delta.call is not None:
            return {"tool_calls": [self._keep_call(delta.call)]}
        if delta.reasoning:
            self._reasoning += delta.reasoning
            return {"reasoning_content": delta.reasoning, "reasoning": delta.reasoning}
        self._content += delta.content
        return {"content": delta.content}

    def _keep_call(self, call: Call) -> Json:
        if call.id is None:
            self._calls[call.index]["function"]["arguments"] += call.arguments
            return {"index": call.index, "function": {"arguments": call.arguments}}
        function = {"name": call.name, "arguments": call.arguments}
        self._calls.append({"id": call.id, "type": "function", "function": function})
        return {"index": call.index, **self._calls[-1], "function": dict(function)}

    def _keep_logprobs(self, logprobs: Sequence[TokenLogprob]) -> list[Json]:
        entries = [
            self._texts.entry(one.token, one.logprob)
            | {"top_logprobs": [self._texts.entry(*pair) for pair in one.top]}
            for one in logprobs
        ]
        if entries:
            self._logprobs = self._logprobs or []
            self._logprobs += entries
        return entries


class TextChoice:
    """A completion; `echo` is put before it."""

    def __init__(self, index: int, texts: TokenTexts, *, echo: str = "") -> None:
        self.index = index
        self.finish: str | None = None
        self.tokens = 0
        self._texts = texts
        self._echo = echo
        self._text = ""
        self._offset = 0
        self._logprobs: Json | None = None

    def push(self, output: Output) -> list[Json]:
        text, self._echo = self._echo + output.text, ""
        self._text += text
        self.tokens += len(output.tokens)
        if output.finish is not None:
            self.finish = str(output.finish)
        logprobs = self._keep_logprobs(output.logprobs)
        if not text and logprobs is None and self.finish is None:
            return []
        return [self._chunk(text, logprobs, self.finish)]

    def whole(self) -> Json:
        return self._chunk(self._text, self._logprobs, self.finish)

    def _chunk(self, text: str, logprobs: Json | None, finish: str | None) -> Json:
        return {"index": self.index, "text": text, "logprobs": logprobs, "finish_reason": finish}

    def _keep_logprobs(self, logprobs: Sequence[TokenLogprob]) -> Json | None:
        if not logprobs:
            return None
        new: Json = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for one in logprobs:
            text = self._texts.text(one.token)
            new["tokens"].append(text)
            new["token_logprobs"].append(_finite(one.logprob))
            # Its keys are texts: of two tokens that look alike, the likelier one is shown.
            top = reversed(one.top)
            new["top_logprobs"].append({self._texts.text(t): _finite(p) for t, p in top})
            new["text_offset"].append(self._offset)
            self._offset += len(text)
        if self._logprobs is None:
            self._logprobs = {key: [] for key in new}
        for key, values in new.items():
            self._logprobs[key] += values
        return new


def usage(prompt_tokens: int, cached_tokens: int, choices: Sequence[Choice]) -> Json:
    completion = sum(choice.tokens for choice in choices)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion,
        "total_tokens": prompt_tokens + completion,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }


def _finite(logprob: float) -> float:
    return logprob if math.isfinite(logprob) else _NEVER
