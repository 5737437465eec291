"""Requests that go another way, and doctor's comparison of all ways on our own engine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor

from difyops.backends import exact
from difyops.engine.state import Snapshot, StatePool
from difyops.secrets import Secret
from tests.engine.api.conftest import HI, KEY, MODEL, Local

EXACT: dict[str, Any] = {"dtype": "float32", "speculate": "ngram", "prefix_cache": 10**9}


def started(start: Callable[..., Local]) -> Local:
    """Two guesses in every pass, whether they pay or not."""
    server = start(**EXACT)
    guessing = server.engine._guessing
    assert guessing is not None
    guessing.adaptive, guessing.now = None, 2
    return server


def compared(server: Local) -> exact.Comparison:
    url = f"{server.url}/v1"
    return exact.compare(
        url, MODEL, Secret(KEY), ways=exact.ways("native", url, MODEL, Secret(KEY)), tokens=32
    )


def test_our_engine_is_exact_every_way(start: Callable[..., Local]) -> None:
    server = started(start)
    found = compared(server)
    assert found.difference is None, str(found.difference)
    assert found.answers == 7
    assert {"no speculation", "the second turn, nothing cached"} < set(found.seen)
    stats = server.engine.stats()
    assert sum(stats.counters.drafted.values()) > 0
    assert stats.prefix is not None
    assert stats.prefix.reused > 300


def test_a_cache_that_loses_some_state_is_found(
    start: Callable[..., Local], monkeypatch: pytest.MonkeyPatch
) -> None:
    server = started(start)
    right = StatePool.restore

    def restore(self: StatePool, slot: int, snapshot: Snapshot) -> None:
        right(self, slot, snapshot)
        tensors: list[Tensor] = list(self.main.layers[0].slot.values())
        tensors[0][slot] *= 0.5

    monkeypatch.setattr(StatePool, "restore", restore)
    found = compared(server)
    assert found.difference is not None
    # Every way but the first one resumes a state: which shows it depends on the story of the run.
    assert found.difference.ways[1] != "cold"
    assert found.difference.gap is not None
    assert not found.difference.near_tie


def test_a_request_without_speculation(start: Callable[..., Local]) -> None:
    server = started(start)

    def drafted() -> int:
        return sum(server.engine.stats().counters.drafted.values())

    body = {"model": MODEL, "messages": HI, "max_tokens": 60, "temperature": 0, "ignore_eos": True}
    said = []
    with server.http() as http:
        for speculate, guesses in ((False, False), (True, True), (None, True)):
            before = drafted()
            answer = http.post("/v1/chat/completions", json={**body, "speculate": speculate})
            said.append(answer.raise_for_status().json()["choices"][0]["message"]["content"])
            assert (drafted() > before) is guesses
    assert len(set(said)) == 1


def test_states_are_shared_only_with_the_same_salt(start: Callable[..., Local]) -> None:
    server = start(**EXACT)
    long = [{"role": "user", "content": "Say hello. " * 150}]  # of several chunks
    body = {"model": MODEL, "messages": long, "max_tokens": 4, "temperature": 0}
    cached = []
    with server.http() as http:
        for salt in (None, None, "a", "b", "a"):
            answer = http.post("/v1/chat/completions", json={**body, "cache_salt": salt})
            usage = answer.raise_for_status().json()["usage"]
            cached.append(usage["prompt_tokens_details"]["cached_tokens"] > 0)
        wrong = http.post("/v1/chat/completions", json={**body, "cache_salt": ""})
    assert cached == [False, True, False, False, True]
    assert wrong.status_code == 400
    assert "cache_salt" in wrong.text
