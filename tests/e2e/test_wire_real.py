"""Wire a real Dify 0.15, twice, and count what is there afterwards.

Needs a Dify with its worker, and an OpenAI-compatible server that the API process reaches:
DIFYOPS_E2E_URL         where the API listens, such as http://127.0.0.1:5001
DIFYOPS_E2E_MODEL_URL   the chat model, with /v1
and, when they differ from what stands below: DIFYOPS_E2E_MODEL, DIFYOPS_E2E_MODEL_KEY,
DIFYOPS_E2E_EMAIL, DIFYOPS_E2E_PASSWORD. With DIFYOPS_E2E_EMBEDDING_URL (with /v1), knowledge too.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace

import pytest

from difyops import wire
from difyops.console import BearerConsole, DifyApiError
from difyops.errors import DifyopsError
from difyops.knowledge import DATASET, RIGHT, prove_knowledge
from difyops.secrets import Secret

URL = os.environ.get("DIFYOPS_E2E_URL", "")
MODEL_URL = os.environ.get("DIFYOPS_E2E_MODEL_URL", "")
EMBEDDING_URL = os.environ.get("DIFYOPS_E2E_EMBEDDING_URL", "")

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(
        not (URL and MODEL_URL),
        reason="needs a real Dify: DIFYOPS_E2E_URL and DIFYOPS_E2E_MODEL_URL",
    ),
]


@pytest.fixture
def target() -> wire.WireTarget:
    key = Secret(os.environ.get("DIFYOPS_E2E_MODEL_KEY", ""))
    llm = wire.ModelTarget(
        name=os.environ.get("DIFYOPS_E2E_MODEL", "smollm2-135m"),
        endpoint_url=MODEL_URL,
        api_key=key,
        context=2048,
        max_output=512,
    )
    embedding = wire.ModelTarget("minilm-l6", EMBEDDING_URL, key, 256) if EMBEDDING_URL else None
    return wire.WireTarget(
        base_url=URL,
        admin_email=os.environ.get("DIFYOPS_E2E_EMAIL", "admin@example.com"),
        admin_name="Admin",
        admin_password=Secret(os.environ.get("DIFYOPS_E2E_PASSWORD", "e2e-Passw0rd")),
        llm=llm,
        embedding=embedding,
    )


@pytest.fixture
def console(target: wire.WireTarget) -> Iterator[BearerConsole]:
    with BearerConsole(URL) as console:
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


@pytest.mark.skipif(not EMBEDDING_URL, reason="needs DIFYOPS_E2E_EMBEDDING_URL")
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
