"""Others on the same shape, in the same run: transformers' `generate`, and vLLM where it is."""

from __future__ import annotations

import gc
import importlib.util
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch

from difyops.bench.gpu_model import (
    BEFORE,
    SHAPES,
    Row,
    Subject,
    prompt_limit,
    step_limit,
)
from difyops.bench.gpu_peer_child import PEERS, Orders
from difyops.bench.peers import worker
from difyops.errors import DifyopsError

#: Tokens of each answer behind the first.
ANSWER = 32

Ask = Callable[[Mapping[str, Any]], dict[str, Any]]


def peer(subject: Subject) -> Iterator[Row]:
    gc.collect()
    torch.cuda.empty_cache()  # the peer's memory is the same
    for name in subject.wanted.peers:
        yield from _measure(subject, name)


def _measure(subject: Subject, name: str) -> Iterator[Row]:
    module = PEERS[name][0]
    if importlib.util.find_spec(module) is None:
        yield Row(subject.name, name, None, note=f"left out: {module} is not installed here")
        return
    config = SHAPES[subject.name]
    if config["model_type"] == "difyops_native":
        yield Row(subject.name, name, None, note=f"left out: {name} knows no such model")
        return
    longest = max(subject.wanted.prompts)
    orders = Orders(
        peer=name, config=config, context=max(longest, BEFORE) + ANSWER + 1, device="cuda"
    )
    environment = {"HF_HUB_OFFLINE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    with worker("difyops.bench.gpu_peer_child", environment) as ask:
        about = ask(orders)["with"]
        for size in subject.wanted.sequences:
            yield _guarded(partial(_step, subject, name, ask, size, about), subject, name)
        yield _guarded(partial(_prompt, subject, name, ask, longest, about), subject, name)


def _guarded(work: Callable[[], Row], subject: Subject, name: str) -> Row:
    """One size that fails does not end the others."""
    try:
        return work()
    except DifyopsError as error:
        return Row(subject.name, name, None, note=error.message, failed=True)


def _step(subject: Subject, name: str, ask: Ask, size: int, about: str) -> Row:
    """The time of an answer less that of its first token, which a prompt's reading makes."""

    def seconds(tokens: int) -> float:
        order = {"sequences": size, "length": BEFORE, "tokens": tokens}
        return float(ask(order)["seconds"])

    seconds(2)
    each = (seconds(1 + ANSWER) - seconds(1)) / ANSWER
    limit = step_limit(subject.model, size, subject.limits)
    return Row(subject.name, f"{name}, step", size, each, size / each, limit, note=about)


def _prompt(subject: Subject, name: str, ask: Ask, length: int, about: str) -> Row:
    order = {"sequences": 1, "length": length, "tokens": 1}
    ask(order)
    seconds = float(ask(order)["seconds"])
    limit = prompt_limit(subject.model, length, subject.limits)
    return Row(subject.name, f"{name}, prompt", length, seconds, length / seconds, limit,
               note=about, unit="tokens")  # fmt: skip
