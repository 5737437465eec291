"""Streams that cost their reader little, in a process of their own:
`python -m difyops.bench.gpu_client`.

At some ten thousand events a second a general client would be what is measured. Protocol: JSON
lines. The first on stdin is `Orders`, answered by `{"ready": true}`. Each `{"tokens": N}` asks for
an answer of N tokens to each prompt, all at once, and is answered by `Heard`. The end of stdin
means stop.
"""

from __future__ import annotations

import asyncio
import json
import re
import signal
import sys
import time
from collections.abc import Sequence
from typing import TypedDict

_TOKENS = re.compile(rb'"completion_tokens":(\d+)')


class Orders(TypedDict):
    port: int
    model: str
    prompts: list[list[int]]


class Heard(TypedDict):
    """Moments are by time.monotonic, which all processes of a machine share."""

    began: float
    ended: float
    tokens: int
    answered: int
    errors: list[str]


async def stream(orders: Orders, prompt: Sequence[int], tokens: int) -> int:
    """Ask for one stream and read it to its end. -> its tokens. Raises OSError or ValueError."""
    asked = {
        "model": orders["model"], "prompt": list(prompt), "max_tokens": tokens, "temperature": 0,
        "ignore_eos": True, "stream": True, "stream_options": {"include_usage": True},
    }  # fmt: skip
    body = json.dumps(asked).encode()
    head = (
        "POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    reader, writer = await asyncio.open_connection("127.0.0.1", orders["port"])
    try:
        writer.write(head.encode() + body)
        parts = [chunk async for chunk in _chunks(reader)]
    finally:
        writer.close()
    heard = b"".join(parts)
    if not heard.startswith(b"HTTP/1.1 200 ") or b"data: [DONE]" not in heard:
        raise ValueError(heard[-200:].decode("utf-8", "replace"))
    return int(_TOKENS.findall(heard)[-1])


async def _chunks(reader: asyncio.StreamReader):  # type: ignore[no-untyped-def]
    while chunk := await reader.read(1 << 16):
        yield chunk


async def ask(orders: Orders, tokens: int) -> Heard:
    began = time.monotonic()
    work = (stream(orders, prompt, tokens) for prompt in orders["prompts"])
    answers = await asyncio.gather(*work, return_exceptions=True)
    counted = [one for one in answers if isinstance(one, int)]
    errors = [f"{type(e).__name__}: {e}"[:300] for e in answers if isinstance(e, BaseException)]
    return Heard(
        began=began,
        ended=time.monotonic(),
        tokens=sum(counted),
        answered=len(counted),
        errors=errors,
    )


def main() -> None:
    # Ctrl-C is for the parent to act on: it closes our stdin, or kills.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    orders: Orders = json.loads(sys.stdin.readline())
    answer: object = {"ready": True}
    while True:
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()
        if not (line := sys.stdin.readline()):
            return
        answer = asyncio.run(ask(orders, json.loads(line)["tokens"]))


if __name__ == "__main__":
    main()
