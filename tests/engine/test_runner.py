"""The engine over a tiny model: what it says is what the model says, whatever runs beside it."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from difyops.engine.layers import GatedMLP, RMSNorm
from difyops.engine.mixers import Softmax
from difyops.engine.models.decoder import Block, Decoder, Shape
from difyops.engine.request import (
    EngineStopped,
    FinishReason,
    Output,
    QueueFull,
    Request,
    SamplingParams,
)
from difyops.engine.runner import Engine
from difyops.engine.state import StatePool

VOCABULARY = 50


def tiny(seed: int = 0) -> Decoder:
    torch.manual_seed(seed)
    options = Softmax.Options(heads=4, kv_heads=2, head_dim=6, rotary_dim=6)
    blocks = [
        Block(RMSNorm(16), Softmax(16, options), RMSNorm(16), GatedMLP(16, 24)) for _ in range(2)
    ]
    model = Decoder(Shape(16, VOCABULARY, 128), blocks, RMSNorm(16), tied=False)
    return model.double().requires_grad_(False)


class Words:
    """A stand-in for a tokenizer: token 7 is "<7>"; `stop` is a token's number."""

    def __init__(self, stop: int | None = None) -> None:
        self.stop = stop
        self.stopped = False

    def push(self, token: int) -> str:
        self.stopped = self.stopped or token == self.stop
        return "" if self.stopped else f"<{token}>"

    def flush(self) -> str:
        return ""


def greedy(model: Decoder, prompt: list[int], count: int) -> list[int]:
    """Without an engine: the whole sequence read anew for every token."""
    tokens = list(prompt)
    for _ in range(count):
        pool = StatePool(model.state_specs(), slots=1, context=128)
        slot = pool.table.acquire()
        assert slot == 1
        assert pool.table.grow(slot, len(tokens))
        pool.sync()
        hidden = model.prefill(
            torch.tensor(tokens), pool, torch.tensor([1]), torch.tensor([0, len(tokens)])
        )
        tokens.append(int(model.logits(hidden[-1]).argmax()))
    return tokens[len(prompt) :]


def request(prompt: list[int], count: int = 8, stop: int | None = None, **params: Any) -> Request:
    params = {"temperature": 0.0} | params
    return Request(prompt, SamplingParams(max_tokens=count, **params), Words(stop))


class Heard:
    """What the engine delivers of one request."""

    def __init__(self, engine: Engine, wanted: Request) -> None:
        self.request = wanted
        self.outputs: queue.SimpleQueue[Output] = queue.SimpleQueue()
        engine.submit(wanted, self.outputs.put)

    def all(self) -> list[Output]:
        got = [self.outputs.get(timeout=30)]
        while got[-1].finish is None:
            got.append(self.outputs.get(timeout=30))
        return got

    def tokens(self) -> list[int]:
        return [token for output in self.all() for token in output.tokens]


@pytest.fixture(scope="module")
def model() -> Decoder:
    torch.set_num_threads(1)
    return tiny()


@pytest.fixture
def engine(model: Decoder) -> Iterator[Engine]:
    made = Engine(model, slots=3, context=64, pages=7, prefill_tokens=8, max_waiting=40)
    made.warm_up()
    made.start()
    yield made
    made.stop()
    made.pool.check()
    assert made.stats().free_slots == 3
    assert made.stats().free_pages == 7
    assert made.failure is None


def test_greedy_tokens_are_the_models(engine: Engine, model: Decoder) -> None:
    """Many at a time over three slots and few pages: chunks, mixed steps and preemptions."""
    prompts = [[(7 * i + j) % VOCABULARY for j in range(1 + 5 * i % 38)] for i in range(16)]
    heard = [Heard(engine, request(prompt, 20)) for prompt in prompts]
    for prompt, one in zip(prompts, heard, strict=True):
        assert one.tokens() == greedy(model, prompt, 20)
    stats = engine.stats()
    assert stats.preemptions > 0
    assert stats.counters.generated_tokens == 16 * 20
    assert stats.counters.finished[FinishReason.LENGTH] == 16


def test_text_and_finish_at_a_stop_string_a_stop_token_and_the_length(
    engine: Engine, model: Decoder
) -> None:
    said = greedy(model, [3, 1], 8)
    cut = next(i for i in range(1, 8) if said[i] not in said[:i])
    got = Heard(engine, request([3, 1], stop=said[cut])).all()
    assert "".join(o.text for o in got) == "".join(f"<{t}>" for t in said[:cut])
    assert got[-1].finish is FinishReason.STOP
    ended = Heard(engine, request([3, 1], stop_ids=frozenset({said[cut]}))).all()
    assert [t for o in ended for t in o.tokens] == said[:cut]
    assert ended[-1].finish is FinishReason.STOP
    full = Heard(engine, request([3] * 60, 100)).all()
    assert sum(len(o.tokens) for o in full) == 4
    assert full[-1].finish is FinishReason.LENGTH


def test_a_cancelled_request_frees_its_slot_at_once(engine: Engine) -> None:
    heard = [Heard(engine, request([i], 60)) for i in range(6)]
    heard[0].outputs.get(timeout=30)
    for one in heard:
        engine.cancel(one.request)
    for one in heard:
        assert one.all()[-1].finish in (FinishReason.CANCELLED, FinishReason.LENGTH)
    assert engine.stats().free_slots == 3


def test_the_queue_is_bounded(model: Decoder) -> None:
    engine = Engine(model, slots=1, context=64, max_waiting=2)
    heard = [Heard(engine, request([1])) for _ in range(3)]
    with pytest.raises(QueueFull):
        engine.submit(request([1]), lambda output: None)
    engine.start()
    assert [len(one.tokens()) for one in heard] == [8, 8, 8]
    engine.stop()


def test_stopping_ends_every_request_with_a_reason(model: Decoder) -> None:
    engine = Engine(model, slots=1, context=128)
    engine.start()
    heard = [Heard(engine, request([1], 120)) for _ in range(3)]
    heard[0].outputs.get(timeout=30)
    engine.stop()
    ends = [one.all()[-1] for one in heard]
    assert [o.finish for o in ends] == [FinishReason.ERROR] * 3
    assert all(o.error and "stopping" in o.error for o in ends)
    with pytest.raises(EngineStopped):
        engine.submit(request([1]), lambda output: None)
    engine.pool.check()


def test_a_step_that_fails_ends_its_requests_and_no_others(model: Decoder) -> None:
    engine = Engine(tiny(), slots=2, context=64)
    real, broken = engine.model.prefill, threading.Event()

    def fails(*args: Any) -> torch.Tensor:
        if not broken.is_set():
            broken.set()
            raise RuntimeError("planted")
        return real(*args)

    engine.model.prefill = fails  # type: ignore[method-assign]
    engine.start()
    end = Heard(engine, request([1, 2])).all()[-1]
    assert end.finish is FinishReason.ERROR
    assert len(Heard(engine, request([1, 2])).tokens()) == 8
    engine.stop()
    engine.pool.check()


def test_scores_that_are_no_numbers_end_the_request() -> None:
    model = tiny()
    model.norm.weight.fill_(float("nan"))
    engine = Engine(model, slots=1, context=64)
    engine.start()
    end = Heard(engine, request([1, 2])).all()[-1]
    assert end.finish is FinishReason.ERROR
    assert "not numbers" in str(end.error)
    engine.stop()


class Doomed(Words):
    """A stand-in for a library that panics: PyO3's PanicException is no Exception."""

    def push(self, token: int) -> str:
        raise KeyboardInterrupt("planted")


def test_a_panic_ends_the_engine_and_says_so(model: Decoder) -> None:
    engine = Engine(model, slots=2, context=64)
    engine.start()
    doomed = Heard(engine, Request([1], SamplingParams(max_tokens=9), Doomed()))
    assert doomed.all()[-1].finish is FinishReason.ERROR
    engine._thread.join(10)
    assert "planted" in str(engine.failure)
    with pytest.raises(EngineStopped, match="planted"):
        engine.submit(request([1]), lambda output: None)


def test_a_grammar_that_fails_ends_its_request_and_no_other(engine: Engine, model: Decoder) -> None:
    class Broken:
        finished = False

        def mask(self) -> Any:
            raise RuntimeError("planted")

        def advance(self, token: int) -> None: ...

        def rollback(self, tokens: int) -> None: ...

    bystander = Heard(engine, request([3, 1], 20))
    broken = request([3, 1])
    broken.constraint = Broken()
    end = Heard(engine, broken).all()[-1]
    assert end.finish is FinishReason.ERROR and "planted" in str(end.error)
    assert bystander.tokens() == greedy(model, [3, 1], 20)


def test_prompt_tokens_are_all_counted(engine: Engine) -> None:
    lengths = (1, 8, 9, 17)  # a chunk is 8: of some, one token is left for a step
    for length in lengths:
        Heard(engine, request([2] * length)).all()
    assert engine.stats().counters.prompt_tokens == sum(lengths)


def test_a_lost_page_is_noticed_when_idle(model: Decoder) -> None:
    engine = Engine(model, slots=1, context=64)
    engine.start()
    Heard(engine, request([1])).all()
    engine.pool.table._free_pages.pop()
    Heard(engine, request([1])).all()
    deadline = time.monotonic() + 10
    while engine.failure is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert "lost" in str(engine.failure)
    with pytest.raises(EngineStopped, match="lost"):
        engine.submit(request([1]), lambda output: None)
    engine.stop()


def test_state_bytes_are_the_predicted(engine: Engine, model: Decoder) -> None:
    stats = engine.stats()
    assert stats.slot_bytes == sum(s.slot_bytes for s in model.state_specs()) == 0
    assert stats.token_bytes == sum(s.token_bytes for s in model.state_specs())
    assert stats.token_bytes == 2 * 2 * (2 * 6) * 8  # layers, k and v, heads x dims, float64
