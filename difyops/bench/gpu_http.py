"""The server beside its engine: what HTTP, server-sent events and text cost of the throughput."""

from __future__ import annotations

import gc
import json
import socket
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from difyops.bench import gpu_client, gpu_engine, gpu_server
from difyops.bench.gpu_model import SHAPES, Row, Subject
from difyops.bench.peers import healthy, process, worker

#: The first is compared with the engine's own throughput, the second only has to be held.
STREAMS = (64, 256)
#: Tokens of each prompt and of each answer.
PROMPT, ANSWER = 128, 1024
#: Processes that the streams are read by.
READERS = 4


def http(subject: Subject) -> Iterator[Row]:
    for streams in STREAMS:
        own = gpu_engine.throughput(subject.model, streams, PROMPT, ANSWER)
        gc.collect()
        torch.cuda.empty_cache()
        heard = served(SHAPES[subject.name], streams)
        rate = heard["tokens"] / (heard["ended"] - heard["began"])
        note = f"{heard['answered']} of {streams} answered; limit: the engine's own throughput"
        if heard["errors"]:
            note += f"; {heard['errors'][0]}"
        yield Row(subject.name, "http", streams, streams / rate, rate, own, note, "streams",
                  facts={"answered": heard["answered"], "errors": heard["errors"]},
                  failed=bool(heard["errors"]))  # fmt: skip


def served(
    config: Mapping[str, Any], streams: int, *, device: str = "cuda", length: int = PROMPT,
    tokens: int = ANSWER, readers: int = READERS,
) -> gpu_client.Heard:  # fmt: skip
    """What `streams` clients hear of a server over the shape; once before, so that all is warm."""
    vocabulary = int(config.get("vocab_size", config.get("vocabulary", 0)))
    prompts = gpu_engine.prompts(vocabulary, streams, length)
    with ExitStack() as stack:
        port = stack.enter_context(_server(config, streams, length + tokens, device))
        asks = [
            stack.enter_context(worker("difyops.bench.gpu_client", {}))
            for _ in range(min(readers, streams))
        ]
        for number, ask in enumerate(asks):
            ask(gpu_client.Orders(port=port, model=gpu_server.MODEL,
                                  prompts=prompts[number :: len(asks)]))  # fmt: skip
        pool = stack.enter_context(ThreadPoolExecutor(len(asks)))

        def all_ask(tokens: int) -> gpu_client.Heard:
            return together(list(pool.map(lambda ask: ask({"tokens": tokens}), asks)))

        all_ask(4)
        return all_ask(tokens)


def together(parts: Sequence[Mapping[str, Any]]) -> gpu_client.Heard:
    """What several readers heard at the same time."""
    return gpu_client.Heard(
        began=min(part["began"] for part in parts),
        ended=max(part["ended"] for part in parts),
        tokens=sum(part["tokens"] for part in parts),
        answered=sum(part["answered"] for part in parts),
        errors=[error for part in parts for error in part["errors"]],
    )


@contextmanager
def _server(config: Mapping[str, Any], slots: int, context: int, device: str) -> Iterator[int]:
    """A server that is ready. -> its port."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    orders = gpu_server.Orders(
        config=config, device=device, port=port, slots=slots, context=context,
        prefill_tokens=gpu_engine.PREFILL,
    )  # fmt: skip
    command = [sys.executable, "-m", "difyops.bench.gpu_server", json.dumps(orders)]
    with process(command, {}) as (child, log):
        healthy(f"http://127.0.0.1:{port}/health", child, log)
        yield port
