"""Wire a real Dify 0.15, twice, and count what is there afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

from difyops import proof, wire
from difyops.console import BearerConsole, DifyApiError
from difyops.core import Deployment
from difyops.errors import DifyopsError
from difyops.knowledge import DATASET, RIGHT, prove_knowledge
from difyops.secrets import Secret


@pytest.fixture
def target(dify: Deployment) -> wire.WireTarget:
    return proof.target(dify)


@pytest.fixture
def console(target: wire.WireTarget) -> Iterator[BearerConsole]:
    with BearerConsole(target.base_url) as console:
        wire.ensure_account(console, target)
        yield console


def _quiet(step: str, detail: str) -> None:
    pass


def test_twice_leaves_one_of_everything(target: wire.WireTarget, console: BearerConsole) -> None:
    first = wire.run(target, _quiet)
    second = wire.run(target, _quiet)

    assert set(second.changes.values()) == {"same"}
    assert (second.app_id, second.api_key) == (first.app_id, first.api_key)
    for report in (first, second):
        assert report.chat is not None
        assert report.chat.answer.strip()
        assert report.chat.streamed.strip()
        assert 0 < report.chat.first_token_seconds <= report.chat.stream_seconds
    assert len(console.apps(target.app_name)) == 1
    assert len(console.app_keys(first.app_id)) == 1
    ours = [
        m for m in console.models() if (m["model_type"], m["model"]) == ("llm", target.llm.name)
    ]
    assert [m["status"] for m in ours] == ["active"]
    assert ours[0]["model_properties"]["context_size"] == target.llm.context
    assert console.default_model("llm") == (console.provider, target.llm.name)


def test_a_changed_context_is_an_update_and_only_that(target: wire.WireTarget) -> None:
    wire.run(target, _quiet)
    changed = replace(target, llm=replace(target.llm, context=1024))

    report = wire.run(changed, _quiet)

    updated = [name for name, change in report.changes.items() if change != "same"]
    assert updated == ["model llm"]
    assert wire.run(target, _quiet).changes["model llm"] == "updated"


def test_a_model_that_is_not_there_is_refused_with_difys_words(target: wire.WireTarget) -> None:
    gone = replace(target.llm, name="nowhere", endpoint_url="http://127.0.0.1:9/v1")

    with pytest.raises(DifyApiError, match="refused") as caught:
        wire.run(replace(target, llm=gone), _quiet)

    assert caught.value.hint is not None
    assert "http://127.0.0.1:9/v1" in caught.value.hint


def test_another_password_says_so(target: wire.WireTarget, console: BearerConsole) -> None:
    wrong = replace(target, admin_password=Secret("wrong-Passw0rd"))

    with pytest.raises(DifyopsError, match="another password") as caught:
        wire.run(wrong, _quiet)

    # A successful login resets Dify's count of failures, so this test never locks the account.
    console.login(target.admin_email, target.admin_password)
    assert "wrong-Passw0rd" not in caught.value.message
    assert "flask reset-password" in (caught.value.hint or "")


def test_knowledge_finds_the_passage_and_is_made_once(
    target: wire.WireTarget, console: BearerConsole
) -> None:
    wire.run(target, _quiet)

    first = prove_knowledge(console, "minilm-l6", _quiet)
    second = prove_knowledge(console, "minilm-l6", _quiet)

    assert first.passage == second.passage == RIGHT
    assert second.change == "same"
    assert len(console.datasets(DATASET)) == 1
    assert len(console.documents(first.dataset_id)) == 1
