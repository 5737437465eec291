"""Outputs of the engine as choices: what no random model can be made to say."""

from __future__ import annotations

import asyncio
import json
import math
import threading
from typing import Any

import pytest

from difyops.engine.answer import ChatChoice, TextChoice, TokenTexts
from difyops.engine.inbox import Inbox, merged
from difyops.engine.request import FinishReason, Output, TokenLogprob
from difyops.engine.tokens import Tokenizer
from difyops.engine.toolcalls import ChatParser
from difyops.engine.toolformats import Tool, ToolFormat
from tests.engine import tiny

CALL = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'


@pytest.fixture(scope="module")
def texts() -> TokenTexts:
    return TokenTexts(Tokenizer(tiny.tokenizer(), {}))


def said(text: str, finish: FinishReason | None = None) -> list[Output]:
    """One output a character, as slow as a model can be."""
    outputs = [Output(text=char, tokens=(7,)) for char in text]
    return [*outputs, Output(finish=finish)] if finish else outputs


def push(choice: ChatChoice, outputs: list[Output]) -> list[dict[str, Any]]:
    chunks = []
    for output in outputs:
        if choice.finish is None:
            chunks += choice.push(output)
    return chunks


@pytest.mark.parametrize("one_call", [False, True])
def test_calls_beside_text(texts: TokenTexts, one_call: bool) -> None:
    choice = ChatChoice(0, ChatParser("hermes", [Tool("f")]), texts, one_call=one_call)
    chunks = push(choice, said(f"Let me see.\n{CALL}\n{CALL}", FinishReason.STOP))
    message = choice.whole()["message"]
    assert message["content"] == "Let me see."
    calls = message["tool_calls"]
    assert [json.loads(call["function"]["arguments"]) for call in calls] == [{"a": 1}] * (
        1 if one_call else 2
    )
    assert len({call["id"] for call in calls}) == len(calls)
    assert chunks[-1]["finish_reason"] == choice.finish == "tool_calls"
    pieces = [p for c in chunks for p in c["delta"].get("tool_calls", ())]
    assert [p["id"] for p in pieces if "id" in p] == [call["id"] for call in calls]
    for call, index in zip(calls, range(2), strict=False):
        parts = [p["function"]["arguments"] for p in pieces if p["index"] == index]
        assert "".join(parts) == call["function"]["arguments"]


def test_a_call_cut_short_ends_by_length(texts: TokenTexts) -> None:
    choice = ChatChoice(0, ChatParser("hermes", [Tool("f")]), texts)
    push(choice, said(CALL[:-15], FinishReason.LENGTH))
    assert choice.whole()["message"]["tool_calls"] and choice.finish == "length"


@pytest.mark.parametrize(
    ("form", "text"),
    [
        ("hermes", CALL[:-17]),  # as if a stop string had been met
        ("hermes", CALL.replace('{"a": 1}', "{a: NaN, }")),
        ("hermes", f"{CALL}\n{CALL[:-17]}"),
        ("qwen3_coder", "<tool_call><function=f>"),
    ],
)
def test_a_call_that_is_no_json_does_not_end_by_tool_calls(
    texts: TokenTexts, form: ToolFormat, text: str
) -> None:
    """A client that trusts finish_reason would read the arguments."""
    choice = ChatChoice(0, ChatParser(form, [Tool("f")]), texts)
    push(choice, said(text, FinishReason.STOP))
    assert choice.whole()["message"]["tool_calls"] and choice.finish == "stop"


def test_a_second_call_does_not_make_the_first_one_whole(texts: TokenTexts) -> None:
    for first, finish in (('{"a": 1}', "tool_calls"), ("{a}", "stop")):
        choice = ChatChoice(0, ChatParser("hermes", [Tool("f")]), texts, one_call=True)
        push(choice, said(CALL.replace('{"a": 1}', first) + CALL[:-17]))
        assert choice.finish == finish


def test_reasoning_is_apart(texts: TokenTexts) -> None:
    choice = ChatChoice(0, ChatParser(None, reasoning=True, inside=True), texts)
    push(choice, said("hm\n</think>\n\nyes", FinishReason.STOP))
    message = choice.whole()["message"]
    assert (message["reasoning"], message["reasoning_content"]) == ("hm", "hm")
    assert (message["content"], choice.finish) == ("yes", "stop")


def test_what_can_never_be_chosen_is_still_json(texts: TokenTexts) -> None:
    one = TokenLogprob(5, -0.5, ((5, -0.5), (6, -math.inf)))
    chat, text = ChatChoice(0, ChatParser(None), texts), TextChoice(0, texts)
    for choice in (chat, text):
        choice.push(Output(text="", tokens=(5,), logprobs=(one,)))
        choice.push(Output(text="ab", tokens=(6,), logprobs=(one,), finish=FinishReason.STOP))
        json.dumps(choice.whole(), allow_nan=False)
    assert chat.whole()["logprobs"]["content"][0]["top_logprobs"][1]["logprob"] == -9999.0
    assert len(text.whole()["logprobs"]["tokens"]) == 2


def test_outputs_that_piled_up_become_one() -> None:
    first, second = said("ab"), said("xyz", FinishReason.STOP)
    pairs = [(0, first[0]), (1, second[0]), (0, first[1]), *((1, o) for o in second[1:])]
    assert merged(pairs) == [
        (0, Output("ab", (7, 7))),
        (1, Output("xyz", (7, 7, 7), finish=FinishReason.STOP)),
    ]


def test_nothing_is_lost_between_the_threads() -> None:
    async def main() -> list[int]:
        inbox, outputs = Inbox(), asyncio.Queue[list[tuple[int, Output]]]()
        puts = [inbox.deliver(outputs, index) for index in range(3)]

        def engine() -> None:
            for number in range(3000):
                puts[number % 3](Output(tokens=(number,)))

        thread = threading.Thread(target=engine)
        thread.start()
        got = []
        while len(got) < 3000:
            for index, output in await asyncio.wait_for(outputs.get(), 5):
                assert output.tokens[0] % 3 == index
                got.append(output.tokens[0])
        thread.join()
        return got

    assert asyncio.run(main()) == list(range(3000))
