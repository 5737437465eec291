"""The parts of `difyops bench gpu` that run on a CPU, too: the server, the peers, what is right."""

from __future__ import annotations

import copy
import importlib.util
import threading
from collections.abc import Iterator

import pytest
import torch

from difyops.bench import gpu_engine, gpu_exact, gpu_http, gpu_load, gpu_spec
from difyops.bench.gpu_exact import Apart, Parting
from difyops.bench.gpu_model import SHAPES
from difyops.bench.gpu_server import words
from difyops.bench.peers import worker
from difyops.engine.load import Loaded
from difyops.engine.models.decoder import Decoder
from difyops.engine.slots import IntegrityError
from difyops.engine.state import StateSpec
from difyops.errors import DifyopsError
from tests.engine import tiny


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def trained() -> Loaded:
    return gpu_exact.trained("float32", "cpu")


def test_a_server_is_heard_by_several_readers() -> None:
    config = tiny.config("hybrid", vocabulary=300)
    heard = gpu_http.served(config, 5, device="cpu", length=9, tokens=12, readers=2)
    assert (heard["answered"], heard["tokens"], heard["errors"]) == (5, 60, [])
    assert heard["ended"] > heard["began"]


def test_what_several_readers_heard_is_one() -> None:
    parts = [
        {"began": 1.0, "ended": 5.0, "tokens": 7, "answered": 1, "errors": []},
        {"began": 2.0, "ended": 6.0, "tokens": 8, "answered": 1, "errors": ["refused"]},
    ]
    assert gpu_http.together(parts) == {
        "began": 1.0, "ended": 6.0, "tokens": 15, "answered": 2, "errors": ["refused"],
    }  # fmt: skip


def test_every_token_is_a_word_of_its_own() -> None:
    tokenizer = words(40)
    stream = tokenizer.stream()
    assert "".join(stream.push(token) for token in (0, 1, 39)) + stream.flush() == " 0 1 27"
    assert tokenizer.vocabulary == 40


def test_requests_that_fail_are_an_error() -> None:
    model = tiny.model("hybrid")[0]
    with gpu_engine.running(model, slots=2, context=32) as engine:
        heard = gpu_engine.ask(engine, gpu_engine.greedy([[1, 2], [3]], 5))
        assert [len(one.tokens) for one in heard] == [5, 5]
        with pytest.raises(ValueError, match="1 to 31 fit"):
            gpu_engine.ask(engine, gpu_engine.greedy([[1] * 40], 5))


def test_a_gain_is_beside_no_guesses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_spec, "RATES", {1: (0.5, 0.9), None: (0.7,)})
    monkeypatch.setattr(gpu_spec, "PROMPT", 5)
    monkeypatch.setattr(gpu_spec, "ANSWER", 12)
    pattern = [{"mixer": "softmax", **tiny.LAYERS["softmax"]}]
    model = tiny.model("hybrid", mtp=pattern, context=64)[0]
    off, *rows = gpu_spec.compared("a", model, 2, 1e9)
    assert [row.work for row in rows] == [
        "guesses: 1 at 50%", "guesses: 1 at 90%", "guesses: adaptive at 70%",
    ]  # fmt: skip
    assert all(row.facts["gain"] == row.rate / off.rate for row in rows if row.rate and off.rate)


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="no transformers")
def test_transformers_answers_or_says_why_not() -> None:
    small = {
        "vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16,
        "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
    }  # fmt: skip
    orders = {"peer": "transformers", "config": {**SHAPES["qwen3.5-0.8b"], **small},
              "context": 40, "device": "cpu"}  # fmt: skip
    with worker("difyops.bench.gpu_peer_child", {"HF_HUB_OFFLINE": "1"}) as ask:
        assert "transformers 5" in ask(orders)["with"]
        with pytest.raises(DifyopsError):
            ask({"sequences": -1, "length": 4, "tokens": 1})
        assert ask({"sequences": 2, "length": 7, "tokens": 3})["seconds"] > 0


def test_how_far_scores_are_apart() -> None:
    ours, theirs = torch.tensor([[0.0, 1.0], [2.0, 0.0]]), torch.tensor([[0.0, 1.5], [0.0, 1.0]])
    apart = Apart.of(ours, theirs)
    assert (apart.most, apart.mean, apart.same) == (2.0, pytest.approx(0.875), 0.5)
    both = Apart.over([apart, Apart(3.0, 0.125, 1.0, 1.0)])
    assert (both.most, both.mean, both.same) == (3.0, pytest.approx(0.5), 0.75)


def test_rounded_states_drift_and_equal_ones_do_not(
    trained: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = copy.deepcopy(trained.model).bfloat16()
    first, second = gpu_exact.drifting("m", model, (3, 9))
    assert (first.size, second.size) == (3, 9)
    assert 0 < second.facts["mean"] < 0.2 < second.facts["spread"]
    monkeypatch.setattr(StateSpec, "stored_in", lambda spec, dtype: spec)
    (row,) = gpu_exact.drifting("m", model, (5,))
    assert (row.facts["most"], row.facts["same"]) == (0.0, 1.0)


def test_the_first_token_that_is_not_the_best_is_found(trained: Loaded) -> None:
    (prompt,) = gpu_exact.chat_prompts(trained, 1)
    with gpu_engine.running(trained.model, slots=1, context=256) as engine:
        (said,) = gpu_engine.ask(engine, gpu_engine.greedy([prompt], 6))
    wrong = [*said.tokens[:3], said.tokens[3] ^ 1, *said.tokens[4:]]
    short = ([5, 6], [7])
    right, found, _ = gpu_exact.partings(
        trained.model, [prompt, prompt, short[0]], [said.tokens, wrong, short[1]]
    )
    assert right is None
    assert found is not None
    assert (found.place, found.gap > 0) == (3, True)


def test_partings_are_counted_by_margin() -> None:
    row = gpu_exact.summary("m", "plain", [None, Parting(2, 0.02), Parting(7, 0.2)], 30)
    assert row.facts["below"] == {"0.01": 0, "0.05": 1, "0.1": 1, "0.5": 2}
    assert (row.facts["part"], row.facts["largest"], row.failed) == (2, 0.2, False)
    assert gpu_exact.summary("m", "plain", [Parting(0, 0.6)], 1).failed


def test_speculation_and_prefixes_say_the_same(trained: Loaded) -> None:
    prompts = gpu_exact.chat_prompts(trained, 4)
    rows = list(gpu_exact.agreeing(trained.model, trained.model, prompts, 8))
    assert [row.work for row in rows] == [
        "float32, plain", "float32, guesses", "float32, prefixes",
    ]  # fmt: skip
    assert all(row.facts["part"] == 0 for row in rows)
    assert "0 are not the plain ones" in rows[1].note


@pytest.fixture
def a_short_load(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(gpu_load, "WAVE", (7, 8))
    monkeypatch.setattr(gpu_load, "AGAIN", 2)
    yield


def test_a_load_loses_nothing(trained: Loaded, a_short_load: None) -> None:
    rows = list(gpu_load.loading(trained, trained.model, 0.1, slots=7, pages=52))
    assert [row.work for row in rows] == ["load, mtp", "load, ngram", "load, again alone"]
    assert all(row.facts["requests"] >= 7 for row in rows[:2])
    assert sum(row.facts["preemptions"] for row in rows[:2]) > 0
    assert (rows[2].facts["part"], rows[2].failed) == (0, False)


def test_a_load_notices_what_is_lost() -> None:
    model: Decoder = tiny.model("hybrid")[0]
    with gpu_engine.running(model, slots=2, context=32) as engine:
        slot = engine.pool.table.acquire()
    with pytest.raises(DifyopsError, match="1 slots and 0 pages are lost"):
        gpu_load.emptied(engine)
    engine.pool.table._owned.pop(slot)  # type: ignore[arg-type]
    with pytest.raises(IntegrityError):
        gpu_load.emptied(engine)


def test_no_thread_is_left() -> None:
    assert not [thread for thread in threading.enumerate() if thread.name == "engine"]
